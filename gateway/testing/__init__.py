"""The kit for those who test policies: public like gateway.api, and what the project's own tests are made of.

`Harness` plays sessions through the real gatekeeper and pipeline, `PolicyContract` is the suite that every policy
should pass, `Zone` is DNS from zone text, `gateway.testing.mail` composes and signs messages, the fakes stand for
time, log, metrics, DNS and downstream. With pytest, fixtures come by themselves (gateway.pytest_fixtures).
"""

from gateway.testing.contract import PolicyContract
from gateway.testing.fakes import (
    FakeClock,
    FakeDns,
    FakeHttp,
    FakeLog,
    FakeMetrics,
    FakeRelay,
    FakeServices,
    HttpRequest,
    Line,
)
from gateway.testing.harness import Client, Harness, NotAskedError, Played, PolicyFailedError
from gateway.testing.store import FakeStore
from gateway.testing.zone import Zone, ZoneError

__all__ = [
    "Client",
    "FakeClock",
    "FakeDns",
    "FakeHttp",
    "FakeLog",
    "FakeMetrics",
    "FakeRelay",
    "FakeServices",
    "FakeStore",
    "Harness",
    "HttpRequest",
    "Line",
    "NotAskedError",
    "Played",
    "PolicyContract",
    "PolicyFailedError",
    "Zone",
    "ZoneError",
]
