"""Every metric family of the gateway: a worker with all policies is put together as `mxgate serve` does, and drained.

So nothing has to be written down twice, and what a policy or adapter adds is here as soon as it is there.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from gateway import plugins
from gateway.adapters.metrics import Definition, Family, ProcessMetrics
from gateway.app import Worker, views
from gateway.channel import Drain, channel_sockets, open_channel
from gateway.config import Config, load
from gateway.connection_counts import lone_counts
from gateway.generation import Generation
from gateway.listening import Sockets
from gateway.overview import Overview
from gateway.session import Role
from gateway.workers import Workers

# Nobody answers there: port 9 is discard, and nothing has to answer before the drain.
_NOWHERE = "127.0.0.1:9"
# Policies that need something before they start.
_SETTINGS = {
    "dnsbl": 'policy.dnsbl.settings.lists=[{zone="bl.example.org"}]',
    "http_hook": 'policy.http_hook.settings.url="http://127.0.0.1:9/"',
}
# Policies of submission alone.
_PREFIX = {"dkim_sign": "submission.", "sender_login": "submission."}
# Labels of one value for each thing of the operator's or of the plan; what counts as bound is only an example.
OPEN_LABELS = frozenset(
    {"code", "hash", "host", "policy", "process", "python", "reason", "route", "stage", "version"}
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A family, and of each label the values that are known beforehand, none where they are not."""

    definition: Definition
    values: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.definition.name


def catalogue() -> tuple[Metric, ...]:
    """All metrics, by name."""
    with tempfile.TemporaryDirectory() as directory:
        config = _config(Path(directory))
        worker, supervisor = ProcessMetrics(), Overview(Workers(), _generation(config), None)
        asyncio.run(_begin_and_end(config, worker))
        supervisor.metrics("")
    known: dict[str, Family[Any]] = {}
    for family in (*supervisor.merged.own.families(), *worker.families()):
        known[family.definition.name] = family
    return tuple(_metric(known[name]) for name in sorted(known))


def _metric(family: Family[Any]) -> Metric:
    labels = family.definition.labels
    # in the order in which the code names them, which is that of their meaning
    values = {
        label: tuple(dict.fromkeys(each[place] for each in family.children()))
        for place, label in enumerate(labels)
    }
    is_closed = {label: label not in OPEN_LABELS or family.definition.name in _CLOSED for label in labels}
    return Metric(family.definition, {label: values[label] if is_closed[label] else () for label in labels})


# Families whose label is in OPEN_LABELS for others, but a closed set here.
_CLOSED = frozenset({"mxgate_dns_cut_total", "mxgate_store_errors_total", "mxgate_tls_sessions_total"})


class Silence:
    """A Log that nobody reads."""

    def debug(self, event: str, **keys: object) -> None: ...
    def info(self, event: str, **keys: object) -> None: ...
    def warning(self, event: str, **keys: object) -> None: ...
    def error(self, event: str, **keys: object) -> None: ...


async def _begin_and_end(config: Config, metrics: ProcessMetrics) -> None:
    planned = [(view, plugins.plan(view)) for view in views(config)]
    ours, theirs = channel_sockets()
    ended = asyncio.Event()
    channel = await open_channel(ours, on_message=lambda _: None, on_close=lambda _: ended.set())
    with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_server(("127.0.0.1", 0)) as implicit:
        channel.send(Drain())
        sockets = {Role.MX: Sockets((plain,), (implicit,))}
        counts = {role: lone_counts() for role in Role}
        await Worker(config, planned, Silence(), metrics).run(sockets, theirs, counts)
    await ended.wait()


def _config(directory: Path) -> Config:
    certificate, key = _certificate(directory)
    own = distribution("mxgate").entry_points.select(group="gateway.policies")
    policies = [f'{_PREFIX.get(each.name, "")}policy.{each.name}.mode="enforce"' for each in own]
    return load(
        None,
        environ={},
        overrides=(
            'server.hostname="mx.example.org"',
            f'server.tls.cert_file="{certificate}"',
            f'server.tls.key_file="{key}"',
            f'server.spool_dir="{directory}"',
            'relay.domains=["example.org"]',
            f'relay.routes=[{{downstream=["{_NOWHERE}"]}},{{name="out",domains=[],downstream=["{_NOWHERE}"]}}]',
            'submission.listen=["127.0.0.1:587"]',
            'submission.route="out"',
            'submission.auth.backend="dovecot"',
            'submission.auth.address="unix:/nowhere"',
            f'submission.policy.dkim_sign.settings.keys=[{{domain="example.org",selector="s",key_file="{key}"}}]',
            f'dns.nameservers=["{_NOWHERE}"]',
            'state.url="memory:"',
            *policies,
            *(_SETTINGS[each.name] for each in own if each.name in _SETTINGS),
        ),
    )


def _generation(config: Config) -> Generation:
    return Generation(1, config, cast("Any", None), 1)


def _certificate(directory: Path) -> tuple[Path, Path]:
    key = rsa.generate_private_key(65537, 2048)  # of TLS, and what dkim_sign takes
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mx.example.org")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files
