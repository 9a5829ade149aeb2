"""Attempts to authenticate: slow when they fail, counted before they are judged, cut, and never at the user's cost."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest

from gateway.authentication import (
    AuthenticationSettings,
    Authenticator,
    AuthUnavailableError,
    Judged,
)
from gateway.policy import OnError
from gateway.services import Instruments
from gateway.session import AddressSource, Session
from gateway.smtp import reply
from gateway.smtp.sasl import Credentials, Mechanism
from gateway.store import Keyspace, StoreDownError
from gateway.testing.store import FakeStore
from tests.fakes import FakeServices

ANN = "ann@example.org"
REFUSED = Judged(reply.AUTH_REFUSED)
LIMITED = Judged(reply.TOO_MANY_AUTH_FAILURES, close=True)
UNAVAILABLE = Judged(reply.AUTH_UNAVAILABLE)


class Known:
    """A back-end; each attempt takes `takes_s` of the clock."""

    def __init__(self, services: FakeServices) -> None:
        self.services = services
        self.asked = 0
        self.takes_s = 0.0
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def check(self, credentials: Credentials, session: Session) -> str | None:
        self.asked += 1
        self.services.clock.advance(self.takes_s)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        # as Dovecot does it: the name in its own form
        return credentials.user.lower() if credentials.password == "right" else None


class World:
    def __init__(self, **settings: float) -> None:
        self.services = FakeServices()
        self.store = FakeStore(self.services.clock)
        self.backend = Known(self.services)
        self.slept: list[float] = []
        values = {"max_failures_per_client": 3, "max_failures_per_user": 5} | settings
        self.authenticator = Authenticator(
            AuthenticationSettings(**values),  # type: ignore[arg-type]
            self.backend,
            Keyspace(self.store, "auth:"),
            Instruments(self.services.clock, self.services.log, self.services.metrics),
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.services.clock.advance(seconds)

    async def attempt(
        self,
        password: str,
        user: str = ANN,
        *,
        client: str = "192.0.2.1",
        authzid: str = "",
        source: AddressSource = AddressSource.SOCKET,
    ) -> Judged:
        session = Session("S", ip_address(client), 1, address_source=source)
        return await self.authenticator.judge(Credentials(Mechanism.PLAIN, user, password, authzid), session)

    def count(self, outcome: str) -> float:
        return self.services.metrics["mxgate_auth_attempts_total", outcome]


async def test_who_has_the_password_is_the_user_whom_the_backend_names() -> None:
    world = World()
    assert await world.attempt("right", "Ann@Example.org") == Judged(reply.AUTH_OK, ANN)
    assert world.slept == []
    assert world.count("accepted") == 1


@pytest.mark.parametrize(("takes_s", "rest_s"), [(0.0, 2.0), (0.5, 1.5), (2.0, 0.0), (2.5, 1.5), (7.0, 1.0)])
async def test_a_failure_is_told_a_whole_number_of_delays_later(takes_s: float, rest_s: float) -> None:
    world = World()
    world.backend.takes_s = takes_s
    assert await world.attempt("wrong") == REFUSED
    assert world.slept == [pytest.approx(rest_s)]


@pytest.mark.parametrize(
    ("user", "authzid"), [("nobody@example.org", ""), ("", ""), (ANN, "bob@example.org"), ("", ANN)]
)
async def test_all_refusals_are_alike(user: str, authzid: str) -> None:
    world = World()
    is_somebody = user == ANN
    assert await world.attempt("right" if is_somebody else "wrong", user, authzid=authzid) == REFUSED
    assert world.slept == [2.0]


async def test_the_same_name_twice_is_no_other_name() -> None:
    assert (await World().attempt("right", authzid=ANN)).user == ANN


async def test_a_client_that_fails_too_often_is_cut_without_a_look() -> None:
    world = World()
    for number in range(3):
        assert await world.attempt("wrong", f"user{number}") == REFUSED
    for user in ("user9", ANN):
        assert await world.attempt("right", user) == LIMITED
    assert world.backend.asked == 3
    assert world.slept == [2.0] * 5
    assert world.count("limited") == 2
    # others are not concerned, and after the window nobody is
    assert (await world.attempt("right", client="192.0.2.2")).user == ANN
    world.services.clock.advance(3600)
    assert (await world.attempt("right", "user9")).user == "user9"


async def test_a_name_that_is_guessed_at_from_everywhere_is_closed() -> None:
    world = World()
    for number in range(5):
        assert await world.attempt("wrong", client=f"198.51.100.{number}") == REFUSED
    assert await world.attempt("right", client="198.51.100.9") == LIMITED
    # the case of the name is no way around it
    assert await world.attempt("right", ANN.upper(), client="198.51.100.10") == LIMITED
    # and what is cut counts for nothing
    assert (await world.attempt("right", "bob", client="198.51.100.9")).user == "bob"


async def test_the_user_goes_on_from_where_the_user_has_been() -> None:
    world = World()
    assert (await world.attempt("right")).user == ANN
    for number in range(5):
        await world.attempt("wrong", client=f"198.51.100.{number}")
    for number in range(3):
        await world.attempt("wrong", f"user{number}")
    # neither the name's nor the address's failures matter
    assert (await world.attempt("right")).user == ANN
    # but there is an end to guessing from there too
    for _ in range(5):
        assert await world.attempt("wrong") == REFUSED
    assert await world.attempt("right") == LIMITED


async def test_attempts_at_the_same_moment_do_not_slip_through() -> None:
    world = World()
    world.backend.gate = asyncio.Event()
    attempts = [asyncio.ensure_future(world.attempt("wrong")) for _ in range(10)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert world.backend.asked == 3
    world.backend.gate.set()
    judged = await asyncio.gather(*attempts)
    assert judged.count(REFUSED) == 3
    assert judged.count(LIMITED) == 7


async def test_an_attempt_that_is_given_up_counts() -> None:
    world = World()
    world.backend.gate = asyncio.Event()
    for _ in range(3):
        attempt = asyncio.ensure_future(world.attempt("wrong"))
        for _ in range(20):
            await asyncio.sleep(0)
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
    assert await world.attempt("right") == LIMITED


async def test_ipv6_clients_are_their_64() -> None:
    world = World()
    for number in range(3):
        await world.attempt("wrong", f"user{number}", client=f"2001:db8::{number}")
    assert await world.attempt("right", client="2001:db8::ffff") == LIMITED
    assert (await world.attempt("right", client="2001:db8:0:1::1")).user == ANN


async def test_an_address_that_hides_its_clients_is_not_counted() -> None:
    world = World()
    for number in range(4):
        await world.attempt("wrong", f"user{number}", source=AddressSource.HIDDEN)
    assert (await world.attempt("right", source=AddressSource.HIDDEN)).user == ANN
    # and nobody is known from there: the name's limit is for all
    for _ in range(5):
        await world.attempt("wrong", source=AddressSource.HIDDEN)
    assert await world.attempt("right", source=AddressSource.HIDDEN) == LIMITED


async def test_an_outage_is_454_and_nobodys_failure() -> None:
    world = World()
    world.backend.error = AuthUnavailableError("dovecot: gone")
    for _ in range(10):
        assert await world.attempt("right") == UNAVAILABLE
    assert world.slept == []
    world.backend.error = None
    assert (await world.attempt("right")).user == ANN
    [line, *_] = world.services.log.of("error")
    assert (line.event, line.keys["error"]) == ("auth.unavailable", "dovecot: gone")


async def test_a_defect_of_a_backend_is_an_outage_and_nobodys_failure() -> None:
    world = World()
    world.backend.error = RuntimeError("s3cret")
    for _ in range(10):
        assert await world.attempt("right") == UNAVAILABLE
    assert "s3cret" not in repr(world.services.log.lines)
    world.backend.error = None
    assert (await world.attempt("right")).user == ANN


async def test_a_backend_that_hangs_is_an_outage() -> None:
    world = World(timeout_s=0.001)
    world.backend.gate = asyncio.Event()
    assert await world.attempt("right") == UNAVAILABLE


async def test_without_the_store_it_is_as_the_operator_wants() -> None:
    world = World()
    world.store.error = StoreDownError("timeout", OnError.DEFER)
    assert await world.attempt("right") == UNAVAILABLE
    assert world.backend.asked == 0
    world.store.error = StoreDownError("timeout", OnError.CONTINUE)
    assert (await world.attempt("right")).user == ANN
    assert await world.attempt("wrong") == REFUSED


async def test_a_store_that_goes_away_meanwhile_changes_nothing_for_the_client() -> None:
    world = World()
    world.backend.gate = asyncio.Event()
    attempt = asyncio.ensure_future(world.attempt("right"))
    for _ in range(5):
        await asyncio.sleep(0)
    world.store.error = StoreDownError("timeout", OnError.DEFER)
    world.backend.gate.set()
    assert (await attempt).user == ANN
    assert [line.event for line in world.services.log.of("warning")] == ["auth.not_recorded"]


async def test_no_secret_and_no_name_is_kept() -> None:
    world = World()
    await world.attempt("right")
    await world.attempt("wr0ng", "my secret typed into the wrong box")
    kept = repr(world.store.entries) + repr(world.store.asked)
    assert "ann" not in kept
    assert "secret" not in kept
    logged = repr(world.services.log.lines)
    assert "wr0ng" not in logged
    assert "right" not in logged
