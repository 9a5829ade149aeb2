"""gateway.app: what the configuration becomes for the parts of a worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import app
from gateway.adapters.dns import DnsSettings, Nameserver
from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.relay import HostSettings, RouteSettings, TlsMode
from gateway.adapters.relay.settings import Identity, Protocol
from gateway.app import (
    Worker,
    dns_settings,
    gatekeeper_settings,
    listener_settings,
    relay_settings,
    server_settings,
    views,
)
from gateway.channel import Json, Message, MetricsPush, Request, Response, State
from gateway.config import load
from gateway.plugins import plan
from gateway.session import Role
from tests.decision.records import decision
from tests.fakes import FakeLog, FakeServices
from tests.submission_keys import SUBMISSION

CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org", "example.net"]
relay.connect_timeout_s = 3
[[relay.routes]]
domains = ["example.net"]
downstream = ["192.0.2.1:25", "mta.example.net:2525"]
tls = "none"
verify_recipients = false
[[relay.routes]]
name = "mailboxes"
downstream = [["192.0.2.2:24", "[2001:db8::2]:24"], ["192.0.2.3:24"]]
protocol = "lmtp"
identity = "xclient"
tls = "verify"
tls_implicit = true
tls_ca_file = "/etc/ca.pem"
tls_name = "mailboxes.example.org"
"""


def test_routes_become_groups_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    settings = relay_settings(load(path, environ={}))

    def mailboxes(host: str) -> HostSettings:
        return HostSettings(
            host, 24, TlsMode.VERIFY, "mailboxes.example.org", "/etc/ca.pem", tls_implicit=True
        )

    assert (settings.hostname, settings.connect_timeout_s) == ("mx.example.org", 3)
    assert settings.routes == (
        RouteSettings(
            "route1",
            ("example.net",),
            ((HostSettings("192.0.2.1", 25), HostSettings("mta.example.net", 2525)),),
            verify_recipients=False,
        ),
        RouteSettings(
            "mailboxes",
            ("*",),
            ((mailboxes("192.0.2.2"), mailboxes("2001:db8::2")), (mailboxes("192.0.2.3"),)),
            protocol=Protocol.LMTP,
            identity=Identity.XCLIENT,
        ),
    )


class FakeChannel:
    """What a worker sent to its supervisor."""

    def __init__(self) -> None:
        self.is_writable = True
        self.sent: list[Any] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def states(self) -> list[State]:
        """Those sent since the last call; with each push there are metrics."""
        states = [message for message in self.sent if isinstance(message, State)]
        assert len(self.sent) - len(states) == 1
        assert isinstance(self.sent[-1], MetricsPush)
        self.sent.clear()
        return states


class FakeListener:
    """Its clients are hidden."""

    def state(self) -> dict[str, str]:
        return {"hidden_by": "10.0.0.1"}


class FakeRelay:
    """A relay that is as the test says."""

    def __init__(self) -> None:
        self.is_up = True

    def state(self) -> dict[str, Json]:
        return {"routes": [{"name": "route1", "hosts": [{"host": "mta:25", "up": self.is_up}]}]}


async def test_the_relays_state_goes_to_the_supervisor_with_a_push_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    worker: Any = Worker(load(path, environ={}), (), FakeLog(), ProcessMetrics())
    channel = worker._channel = FakeChannel()
    relay, listener = FakeRelay(), FakeListener()
    worker._sides = [SimpleNamespace(role=Role.MX, relay=relay, listener=listener)]
    detail = {"clients": listener.state()}
    worker._state = State(
        listening=True, draining=False, policies_started=True, detail=detail | {"relay": relay.state()}
    )

    def push() -> list[State]:
        worker._push()
        worker._pushing.cancel()
        return channel.states()

    assert push() == []
    relay.is_up = False
    assert push() == [
        State(listening=True, draining=False, policies_started=True, detail=detail | {"relay": relay.state()})
    ]
    assert push() == []


async def test_decisions_are_answered_between_mail_and_mail(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    worker: Any = Worker(load(path, environ={}), (), FakeLog(), ProcessMetrics())
    channel = worker._channel = FakeChannel()
    for number in range(1, 41):
        worker._decisions.add(decision(number))

    worker._on_message(Request(1, "decisions", {"limit": 40}))
    assert channel.sent == []  # other work of the loop comes first
    for _ in range(10):
        await asyncio.sleep(0)
    worker._on_message(Request(2, "decisions", {"tx": "1m80vxzckjnp007-7"}))
    worker._on_message(Request(3, "decisions", {"limit": 0}))
    worker._on_message(Request(4, "decisions", {"limit": 1}))
    many, one, bad, latest = channel.sent
    assert [record["tx"][-3:] for record in many.result["decisions"][:2]] == ["-40", "-39"]
    assert (many.id, len(many.result["decisions"]), many.result["truncated"]) == (1, 40, False)
    assert (one.id, [record["tx"] for record in one.result["decisions"]]) == (2, ["1m80vxzckjnp007-7"])
    assert bad == Response(3, error="limit '0' is not in 1..1000")
    assert latest.result["truncated"]


def test_a_transaction_has_one_recipient_where_all_routes_are_lmtp(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    both = server_settings(load(path, environ={}))
    path.write_text(CONFIG.replace('tls = "none"', 'tls = "none"\nprotocol = "lmtp"'))
    lmtp = server_settings(load(path, environ={}))

    assert (both.max_recipients, lmtp.max_recipients) == (200, 1)


def test_clients_learn_that_recipients_of_several_routes_do_not_go_together(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    both = server_settings(load(path, environ={}))
    path.write_text(
        CONFIG.partition("[[relay.routes]]")[0] + '[[relay.routes]]\ndownstream = ["192.0.2.1:25"]'
    )

    assert both.has_recipient_groups
    assert not server_settings(load(path, environ={})).has_recipient_groups


def test_a_route_for_quarantine_parts_no_recipients_and_overrides_do(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    text = CONFIG.partition("[[relay.routes]]")[0] + (
        '[[relay.routes]]\ndownstream = ["192.0.2.1:25"]\n'
        '[[relay.routes]]\nname = "jail"\ndomains = []\ndownstream = ["192.0.2.2:25"]\n'
        '[quarantine]\nroute = "jail"\nheader = "X-Jail"\n'
    )
    path.write_text(text)
    config = load(path, environ={})

    assert not server_settings(config).has_recipient_groups
    assert server_settings(config, has_groups=True).has_recipient_groups
    settings = gatekeeper_settings(config)
    assert (settings.quarantine_route, settings.quarantine_header) == ("jail", "X-Jail")


def test_the_listener_learns_who_the_balancers_are_and_how_often_a_client_may_come(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    keys = (
        "server.proxy_protocol_from = ['10.0.0.0/28', '2001:db8::/64']\n"
        "server.max_new_connections_per_client_per_minute = 30\n"
    )
    path.write_text(keys + CONFIG)
    settings = listener_settings(load(path, environ={}))

    assert [str(network) for network in settings.proxy_protocol_from] == ["10.0.0.0/28", "2001:db8::/64"]
    assert settings.max_new_connections_per_client_per_minute == 30


def test_a_balancer_that_hides_its_clients_is_told_to_the_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    worker: Any = Worker(load(path, environ={}), (), FakeLog(), ProcessMetrics())
    worker._sides = [SimpleNamespace(role=Role.MX, relay=FakeRelay(), listener=FakeListener())]

    own = {"clients": {"hidden_by": "10.0.0.1"}, "relay": FakeRelay().state()}
    assert worker._detail() == own

    worker._sides.append(SimpleNamespace(role=Role.SUBMISSION, relay=FakeRelay(), listener=FakeListener()))
    assert worker._detail() == own | {"submission": own}


def test_name_servers_become_the_resolvers(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(f'{CONFIG}\n[dns]\nnameservers = ["192.0.2.53", "[2001:db8::53]:5353"]\ntimeout_s = 2\n')
    assert dns_settings(load(path, environ={})) == DnsSettings(
        (Nameserver("192.0.2.53"), Nameserver("2001:db8::53", 5353)), 2, 20
    )


class FakeDns:
    """Keeps how long each policy may wait."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}

    def for_policy(self, name: str, limit_s: float) -> FakeDns:
        self.limits[name] = limit_s
        return self


def test_each_policy_may_wait_for_dns_a_part_of_the_time_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "quick.py"
    file.write_text(
        "from gateway.api import Policy\n"
        "class Quick(Policy):\n"
        "    name = 'quick'\n"
        "    timeout_s = 2\n"
        "    async def on_eom(self, tx): ...\n"
    )
    path = tmp_path / "mxgate.toml"
    path.write_text(f"{CONFIG}\n[policy.quick]\nfile = '{file}'\n")
    config = load(path, environ={})
    planned = plan(config)
    worker: Any = Worker(config, [(config, planned)], FakeLog(), ProcessMetrics())
    dns = FakeDns()
    worker._pipeline(config, planned, FakeServices(), dns)
    assert dns.limits["quick"] == pytest.approx(2 * 0.85)
    assert dns.limits["relay_guard"] == pytest.approx(10 * 0.85)


def test_one_reserve_has_room_for_the_connections_of_all_roles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def reserve(connections: int, memory_bytes: int) -> SimpleNamespace:
        asked.append((connections, memory_bytes))
        return SimpleNamespace(limit=1000, wanted=1000)

    monkeypatch.setattr(app, "Reserve", reserve)
    path = tmp_path / "mxgate.toml"
    server = (
        "server.max_connections = 300\nserver.max_worker_memory_bytes = 1000000000\n"
        'server.tls = { cert_file = "/etc/cert.pem", key_file = "/etc/key.pem" }\n'
    )
    path.write_text(server + CONFIG + SUBMISSION + "max_connections = 200\n")
    config = load(path, environ={})
    worker: Any = Worker(config, [(view, ()) for view in views(config)], FakeLog(), ProcessMetrics())
    worker._reserve()
    assert asked == [(500, 1_000_000_000)]
