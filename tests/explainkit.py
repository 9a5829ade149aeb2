"""What tests of `mxgate explain` share: a configuration, the built-in policies as they are planned, a client's case."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from gateway.adapters.dns.resolver import CachingResolver
from gateway.adapters.metrics import ProcessMetrics
from gateway.config import Config, load
from gateway.decision import DecisionRing, read_record, to_json
from gateway.explain.given import case_of
from gateway.explain.mail_file import MailFile
from gateway.explain.replay import Replayed, replay
from gateway.explain.run import Case, Explained, explain, world_of
from gateway.explain.stand_ins import ZoneServer
from gateway.plugins import PlannedPolicy
from gateway.policy import Mode, Policy
from gateway.services import Instruments
from gateway.testing import Zone
from policies.arc import Arc
from policies.dkim import Dkim
from policies.dmarc import Dmarc
from policies.relay_guard import RelayGuard
from policies.spf import Spf
from tests.fakes import FakeClock, FakeLog


def config_of(*overrides: str) -> Config:
    """A gateway for example.org with one route."""
    given = (
        'server.hostname="mx.example.org"',
        'relay.domains=["example.org"]',
        'relay.routes=[{downstream=["127.0.0.1:25"]}]',
        *overrides,
    )
    return load(None, environ={}, overrides=given)


def planned_of(
    *more: type[Policy[Any]],
    settings: Mapping[str, Mapping[str, object]] | None = None,
    mode: str = "enforce",
) -> list[PlannedPolicy]:
    """The default plan for example.org, and `more`; `settings` by the name of the policy."""
    given = {"relay_guard": {"domains": ("example.org",)}, **(settings or {})}
    plan: tuple[type[Policy[Any]], ...] = (RelayGuard, Spf, Dkim, Arc, Dmarc, *more)
    return [
        PlannedPolicy(
            name=each.name,
            policy=each,
            settings=each.Settings(**given.get(each.name, {})),
            mode=Mode.ENFORCE if each is RelayGuard else Mode(mode),
            timeout_s=each.timeout_s,
            on_error=each.on_error,
            exempt=each.exempt,
            source="tests",
        )
        for each in plan
    ]


def case(message: bytes, **given: Any) -> Case:
    """A client at 192.0.2.1 that sends this message to ann@example.org."""
    said: dict[str, Any] = {
        "ip": "192.0.2.1",
        "helo": "mail.author.example",
        "mail_from": "ann@author.example",
        "rcpts": ("bob@example.org",),
        **given,
    }
    content = MailFile(BytesIO(message), max_bytes=10_000_000, max_line_bytes=10_000)
    return replace(case_of(**said), content=content)


def explained(
    of: Case, zone: Zone, planned: Sequence[PlannedPolicy], config: Config | None = None
) -> Explained:
    """What comes of a case in a world with this zone."""
    config, clock = config or config_of(), FakeClock()
    clock.time_s = time.time() + 10  # behind that of the signatures

    async def play() -> Explained:
        instruments = Instruments(clock, FakeLog(), ProcessMetrics())
        dns = CachingResolver(ZoneServer(zone), instruments, total_timeout_s=20.0)
        try:
            return await explain(of, world_of(config, planned, clock, dns))
        finally:
            await dns.close()

    return asyncio.run(play())


def record_of(live: Explained) -> dict[str, Any]:
    """Its record as the admin port gives it, once it was in the ring."""
    ring = DecisionRing()
    ring.add(live.decision)
    read: dict[str, Any] = json.loads(json.dumps(to_json(next(ring.latest(1)))))
    return read


def replayed(
    record: Mapping[str, Any], planned: Sequence[PlannedPolicy], config: Config | None = None
) -> Replayed:
    """What comes of a record where the clock shows the year 2023, in which no signature of these tests is valid."""
    return asyncio.run(replay(read_record(record), config or config_of(), planned, FakeClock()))
