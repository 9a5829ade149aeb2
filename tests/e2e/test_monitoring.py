"""Dashboards and alerts with a real Prometheus, which scrapes a gateway with real mail and real faults.

Every expression of every panel has a value, every alert's expression does, and alerts fire by their faults and end with
them. The rules are those of grafana/rules with shorter windows, made by the same code.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import trustme

from grafana.model import RELOADS, expression
from grafana.pages import DASHBOARDS
from grafana.promtool import rule_file
from grafana.rules import Alert, Windows, alerts
from tests.e2e.certificates import Tls, issue
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, config_for, route
from tests.e2e.net import LOOPBACK, free_port, wait_until
from tests.e2e.prometheus import Prometheus
from tests.e2e.redis import RedisServer
from tests.nameserver import Unbound

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(600)]

WINDOWS = Windows(rate="10s", slow="30s", day="1m", soon="1s", patient="1s", late="1s")
RECORDS = """
    pass.example.com. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
    _dmarc.pass.example.com. 300 IN TXT "v=DMARC1; p=reject"
    fail.example.com. 300 IN TXT "v=spf1 -all"
    broken.example.com. 300 IN TXT "v=spf1 nonsense -all"
    forged.example.com. 300 IN TXT "v=spf1 -all"
    _dmarc.forged.example.com. 300 IN TXT "v=DMARC1; p=reject"
    apart.example.com. 300 IN TXT "v=spf1 -all"
    _dmarc.apart.example.com. 300 IN TXT "v=DMARC1; p=quarantine"
"""
# Known to the greylist's exemption; strangers are not.
KNOWN, STRANGER = "127.0.0.2", "127.0.0.3"
# What is wrong with this policy stands in a file.
POLICY = """
import asyncio, time
from pathlib import Path
from gateway.api import NoSettings, Policy, Reply, proceed, reject

class Odd(Policy[NoSettings]):
    name = "odd"

    async def on_rcpt(self, tx, rcpt):
        fault = Path({fault!r})
        match fault.read_text() if fault.exists() else "":
            case "raise":
                raise RuntimeError("as the test says")
            case "block":
                time.sleep(1.5)
            case "slow":
                await asyncio.sleep(6)
        if rcpt.mailbox.local.startswith("observed"):
            return reject("odd", Reply(550, "5.7.1", "Odd"))
        return proceed()
"""
CHAIN = (
    b"ARC-Seal: i=1; a=rsa-sha256; cv=none; d=pass.example.com; s=s; t=1; b=AAAA\r\n"
    b"ARC-Message-Signature: i=1; a=rsa-sha256; c=relaxed/relaxed; d=pass.example.com; s=s; h=from; bh=AAAA; b=AAAA\r\n"
    b"ARC-Authentication-Results: i=1; pass.example.com; spf=pass\r\n"
)


class Agrees(BaseHTTPRequestHandler):
    """The service of http_hook: it has nothing against any mail."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """It has nothing to say either."""


@dataclass
class World:
    """A gateway, all that it talks to, and who watches it."""

    gateway: Gateway
    downstream: Downstream
    unbound: Unbound
    redis: RedisServer
    tls: Tls
    fault: Path
    spool: Path
    prometheus: Prometheus
    start: Callable[[], Gateway]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._pems = [(file, file.read_bytes()) for file in (self.tls.cert_file, self.tls.key_file)]

    def restore_certificate(self) -> None:
        """That of the beginning, which clients trust."""
        for file, octets in self._pems:
            file.write_bytes(octets)

    def send(
        self, domain: str, *, rcpt: str = "ann", source: str = KNOWN, tls: bool = False, more: bytes = b""
    ) -> int:
        """One session with one message; the code of the last reply."""
        number = next(self.numbers)
        content = more + f"From: <you@{domain}>\r\nSubject: {number}\r\n\r\nHello\r\n".encode()
        with self.gateway.connect(source) as client:
            client.hello()
            if tls:
                assert client.command("STARTTLS").code == 220
                client.start_tls(self.tls.trusting)
                client.command("EHLO client.example.net")
            # never a recipient that is in the relay's cache
            code = client.submit(f"you@{domain}", [f"{rcpt}-{number}@example.org"], content).code
            client.command("QUIT")
        return code

    def mix(self) -> None:
        """What becomes of mail, once each."""
        assert self.send("pass.example.com") == 250
        assert self.send("pass.example.com", tls=True) == 250
        assert self.send("pass.example.com", rcpt="observed") == 250
        assert self.send("pass.example.com", more=CHAIN) == 250
        assert self.send("fail.example.com") == 250
        assert self.send("broken.example.com") == 250
        assert self.send("forged.example.com") == 550
        assert self.send("apart.example.com") == 250
        assert self.send("fail.example.com", source=STRANGER) == 451
        with self.gateway.connect(KNOWN) as client:
            client.hello()
            client.command("MAIL FROM:<you@pass.example.com>")
            assert client.command("RCPT TO:<ann@elsewhere.example>").code == 550
            assert client.command("NONSENSE").code == 500
        with self.gateway.connect(KNOWN) as client:
            client.hello()
            assert client.command("STARTTLS").code == 220
            client.send(b"this is no handshake\r\n\r\n")
            client.is_at_eof()

    def good(self) -> None:
        """Mail of which nothing is to be said."""
        for _ in range(3):
            self.send("pass.example.com")

    def all_firing(self, names: Sequence[str]) -> bool:
        return {*names} <= self.prometheus.firing().keys()

    def watch(self, names: Sequence[str], meanwhile: Callable[[], object]) -> None:
        """Wait until these alerts fire, with this traffic."""

        def fires() -> bool:
            meanwhile()
            return self.all_firing(names)

        wait_until(fires, within_s=90, what=f"{names} fire, of {[*self.prometheus.firing()]}")
        for alert in (each for name in names for each in self.prometheus.firing()[name]):
            for text in alert["annotations"].values():
                # what a template says of a label or a function that there is not
                assert "<no value>" not in text
                assert "<error" not in text
                assert "%!" not in text

    def watch_end(self, names: Sequence[str], meanwhile: Callable[[], object]) -> None:
        """Wait until they do not fire any more."""

        def is_over() -> bool:
            meanwhile()
            return not {*names} & self.prometheus.firing().keys()

        wait_until(is_over, within_s=90, what=f"{names} are over")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("monitoring")
    fault, spool, policy = directory / "fault", directory / "spool", directory / "odd.py"
    spool.mkdir()
    policy.write_text(POLICY.format(fault=str(fault)), "utf-8")
    with ExitStack() as stack:

        def closing(made: object) -> None:
            stack.callback(made.close)  # type: ignore[attr-defined]

        downstream = Downstream()
        closing(downstream)
        unbound = Unbound(RECORDS, directory)
        closing(unbound)
        redis = RedisServer()
        closing(redis)
        tls = issue(directory)
        service = ThreadingHTTPServer((LOOPBACK, 0), Agrees)
        Thread(target=service.serve_forever, daemon=True).start()
        stack.callback(service.server_close)
        stack.callback(service.shutdown)
        admin = f"{LOOPBACK}:{free_port()}"
        config = config_for(
            downstream.address,
            overrides={
                "server": {
                    **tls.server_section(),
                    "workers": 2,
                    "max_connections": 20,
                    "spool_dir": str(spool),
                    "spool_memory_bytes": 65536,
                },
                "relay": {
                    "connect_timeout_s": 1,
                    "reply_timeout_s": 1,
                    "final_timeout_s": 1,
                    "routes": [
                        route([downstream.address]),
                        route([downstream.address], domains=[], name="out"),
                    ],
                },
                "submission": {
                    "listen": [f"{LOOPBACK}:{free_port()}"],
                    "route": "out",
                    "auth": {"backend": "dovecot", "address": f"unix:{directory}/nobody"},
                },
                "dns": {"nameservers": [f"{LOOPBACK}:{unbound.address[1]}"], "timeout_s": 0.3},
                "state": {"url": redis.url},
                "admin": {"listen": admin},
                "policy": {
                    "greylist": {"mode": "enforce", "exempt": [f"{KNOWN}/32"]},
                    "http_hook": {
                        "mode": "enforce",
                        "settings": {"url": f"http://{LOOPBACK}:{service.server_port}/"},
                    },
                    "odd": {"file": str(policy), "mode": "observe"},
                },
            },
        )

        def start() -> Gateway:
            gateway = Gateway(config, directory)
            stack.callback(gateway.kill)
            gateway.wait_ready()
            return gateway

        gateway = start()
        prometheus = Prometheus(admin, rule_file(WINDOWS), directory)
        closing(prometheus)
        yield World(gateway, downstream, unbound, redis, tls, fault, spool, prometheus, start)
        assert prometheus.unhealthy() == []


def vectors(expr: str) -> list[str]:
    """What an alert compares: each side of `and`, without the comparison."""
    parts = [re.sub(r" (?:>|<|==) [^a-z]*$", "", part) for part in expr.split(" and ")]
    parts = [each for part in parts for each in part.split(" > ")]
    parts = [re.sub(r"^2 \* |^on \([^)]*\) ", "", part) for part in parts]
    return [re.sub(r"^absent\((.*)\)$", r"\1", part) for part in parts]


def chosen(expr: str) -> str:
    """An expression of a dashboard as Grafana asks it."""
    for name, value in {
        "$__rate_interval": "20s",
        "$__interval": "20s",
        "$job": ".*",
        "$instance": ".*",
    }.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


PANELS = [
    (f"{board.uid}: {panel.title}", chosen(expression(query)))
    for board in DASHBOARDS
    for panel in board.panels
    for query in panel.queries
]
RULES = [(alert.name, vector) for alert in alerts(WINDOWS) for vector in vectors(alert.expr)]


def test_every_expression_of_every_panel_and_alert_has_a_value(world: World) -> None:
    world.gateway.process.send_signal(signal.SIGHUP)
    wanted = dict.fromkeys([*PANELS, *RULES, ("reloads", chosen(RELOADS.replace("$F", 'job=~"$job"')))])
    until = time.monotonic() + 120
    while wanted:
        world.mix()
        # so that there is connecting to see
        world.downstream.behave()
        for each in [*wanted]:
            if any(math.isfinite(value) for _, value in world.prometheus.query(each[1])):
                del wanted[each]
        assert not wanted or time.monotonic() < until, [*wanted]


def test_promtool_finds_nothing_wrong_with_the_page(world: World) -> None:
    _, page = world.gateway.admin("/metrics")
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_exemplars_lead_to_decisions(world: World) -> None:
    name = "mxgate_transaction_duration_seconds_bucket"
    begun = time.time()
    world.mix()

    def found() -> list[str]:
        exemplars = world.prometheus.exemplars(f'{name}{{action="accepted"}}', begun, time.time() + 5)
        return [each["labels"]["tx"] for each in exemplars]

    tx = wait_until(found, within_s=20, what="exemplars of accepted mail")[-1]
    assert world.gateway.admin_status(f"/api/v1/decisions/{tx}") == 200


@dataclass(frozen=True)
class Fault:
    """What is broken, which alerts have to fire with which traffic, and how it is repaired."""

    alerts: tuple[str, ...]
    break_: Callable[[World], object]
    repair: Callable[[World], object]
    meanwhile: Callable[[World], object] = World.good


def _no_dns(world: World) -> None:
    # nothing of it is in a cache
    world.send(f"d{next(world.numbers)}.example.com")


def _rejected(world: World) -> None:
    for _ in range(5):
        assert world.send("forged.example.com") == 550


def _large(world: World) -> None:
    world.send("pass.example.com", more=b"X-Large: x\r\n" + b"X-Line: %b\r\n" % (b"x" * 900) * 120)


def _certificate(world: World, lasts: timedelta) -> None:
    made = trustme.CA().issue_cert("mx.example.org", not_after=datetime.now(UTC) + lasts)
    made.private_key_pem.write_to_path(str(world.tls.key_file))
    made.cert_chain_pems[0].write_to_path(str(world.tls.cert_file))


def _reload(world: World, more: str) -> None:
    file = world.gateway.config_file
    file.write_text(file.read_text("utf-8").replace("\nnonsense = 1\n", "") + more, "utf-8")
    world.gateway.process.send_signal(signal.SIGHUP)


def _crowd(world: World) -> None:
    """19 of 20 connections."""
    clients = [Client(world.gateway.address, source=f"127.0.1.{place}") for place in range(19)]
    wait_until(lambda: world.all_firing(["MxgateConnectionsNearLimit"]), within_s=60, what="the alert")
    for client in clients:
        client.close()


def _hang(world: World) -> None:
    """A worker that says nothing for ten seconds; after thirty it would be killed."""
    os.kill(world.gateway.worker_pids()[0], signal.SIGSTOP)


def _go_on(world: World) -> None:
    for pid in world.gateway.worker_pids():
        os.kill(pid, signal.SIGCONT)


def _start_again(world: World) -> None:
    world.gateway = world.start()


def _kill_workers(world: World) -> None:
    for pid in world.gateway.worker_pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: world.gateway.admin_status("/readyz") == 200, within_s=30, what="new workers")


FAULTS = {
    "the downstream is down": Fault(
        ("MxgateDownstreamDown", "MxgateDownstreamHostDown", "MxgateDeferSpike"),
        lambda world: world.downstream.down(),
        lambda world: world.downstream.up(),
    ),
    "the name server is down": Fault(
        ("MxgateDnsDown",),
        lambda world: world.unbound.stop(),
        lambda world: world.unbound.start(),
        _no_dns,
    ),
    "Redis is down": Fault(
        ("MxgateStoreDown",),
        lambda world: world.redis.kill(),
        lambda world: world.redis.start(),
        lambda world: world.send("fail.example.com", source=STRANGER),
    ),
    "forged mail": Fault(("MxgateRejectSpike",), lambda _: None, lambda _: None, _rejected),
    "a certificate that ends in three days": Fault(
        ("MxgateCertificateEndsSoon",),
        lambda world: _certificate(world, timedelta(days=3)),
        lambda world: world.restore_certificate(),
    ),
    "a certificate that ends in an hour": Fault(
        ("MxgateCertificateEndsSoon", "MxgateCertificateEnds"),
        lambda world: _certificate(world, timedelta(hours=1)),
        lambda world: world.restore_certificate(),
    ),
    "a configuration that is wrong": Fault(
        ("MxgateReloadFailed",),
        lambda world: _reload(world, "\nnonsense = 1\n"),
        lambda world: _reload(world, ""),
    ),
    "a policy that fails": Fault(
        ("MxgatePolicyFailures",),
        lambda world: world.fault.write_text("raise"),
        lambda world: world.fault.unlink(),
    ),
    "a policy that blocks its worker": Fault(
        ("MxgateLoopLag",),
        lambda world: world.fault.write_text("block"),
        lambda world: world.fault.unlink(),
        lambda world: world.send("pass.example.com"),
    ),
    "a policy that is slow": Fault(
        ("MxgatePolicySlow",),
        lambda world: world.fault.write_text("slow"),
        lambda world: world.fault.unlink(),
        lambda world: world.send("pass.example.com"),
    ),
    "a spool that is gone": Fault(
        ("MxgateSpoolFailing",),
        lambda world: shutil.rmtree(world.spool),
        lambda world: world.spool.mkdir(),
        _large,
    ),
    "a worker that hangs": Fault(("MxgateNotReady",), _hang, _go_on, lambda _: None),
    "the gateway is down": Fault(
        ("MxgateDown",), lambda world: world.gateway.stop(), _start_again, lambda _: None
    ),
    "workers that die": Fault(("MxgateWorkerRestarts",), lambda _: None, lambda _: None, _kill_workers),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_fires_by_its_fault_and_ends_with_it(world: World, name: str) -> None:
    fault = FAULTS[name]
    # what another test has left behind is over
    world.watch_end(fault.alerts, world.good)
    fault.break_(world)
    try:
        world.watch(fault.alerts, lambda: fault.meanwhile(world))
    finally:
        fault.repair(world)
    world.watch_end(fault.alerts, world.good)


def test_an_alert_tells_of_a_crowd(world: World) -> None:
    _crowd(world)
    world.watch_end(["MxgateConnectionsNearLimit"], world.good)


def test_alerts_that_are_not_made_to_fire_here_are_known() -> None:
    """Their unit tests (promtool) have them fire; their expressions have values above."""
    fired = {name for fault in FAULTS.values() for name in fault.alerts} | {"MxgateConnectionsNearLimit"}
    assert {alert.name for alert in alerts(WINDOWS)} - fired == {
        "MxgateAbsent",
        "MxgateFilesNearLimit",
        "MxgateSessionsFailed",
        "MxgateDownstreamBusy",
        "MxgateConfigurationsDiffer",
        "MxgateClientsHidden",
    }


def test_vectors_are_what_alerts_compare() -> None:
    def of(expr: str) -> list[str]:
        return vectors(Alert("", expr, "", "", "", "", ()).expr)

    assert of("absent(a)") == ["a"]
    assert of("max (a) == 0") == ["max (a)"]
    assert of("up == 0 and on (job) last_over_time(a[1d])") == ["up", "last_over_time(a[1d])"]
    assert of("min (a) - time() < 7 * 86400") == ["min (a) - time()"]
    assert of("a > 0.3 and a > 2 * avg_over_time(a[1d]) and b > 0.1") == [
        "a",
        "a",
        "avg_over_time(a[1d])",
        "b",
    ]
