"""watching: policies see the body while it arrives, cut as it may be, and no watch can touch the message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.gatekeeper import Answer
from gateway.plan import Override, Step
from gateway.policy import Mode, NoSettings, OnError, Policy, Watch
from gateway.session import Slot, Transaction
from gateway.smtp import reply
from gateway.smtp.content import Fault, stuff
from gateway.verdict import Stage, Verdict, proceed
from gateway.watching import Failure, Watching
from tests.fakes import STORED, FakeServices
from tests.world import ABOVE, MESSAGE, World, send

HEADER, BODY = MESSAGE.split(b"\r\n\r\n", 1)


@dataclass
class Seen:
    """A watch that keeps what it saw."""

    blocks: list[bytes] = field(default_factory=list)
    ended: int = 0

    def block(self, data: bytes) -> None:
        self.blocks.append(data)

    def end(self) -> None:
        self.ended += 1

    @property
    def body(self) -> bytes:
        return b"".join(self.blocks)


SEEN = Slot[Seen]("seen")


class Watches(Policy[NoSettings]):
    """Watches with what `make` gives, and keeps what EOM found in its slot."""

    name = "watches"

    def __init__(self, make: Callable[[], Any] = Seen) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.make = make
        self.headers: list[list[bytes]] = []
        self.at_eom: list[Seen | None] = []

    def on_header(self, tx: Transaction) -> Watch | None:
        assert tx.message is not None
        self.headers.append([each.name for each in tx.message.header.fields])
        watch: Watch | None = self.make()
        if isinstance(watch, Seen):
            SEEN.put(tx, watch)
        return watch

    async def on_eom(self, tx: Transaction) -> Verdict:
        self.at_eom.append(SEEN.get(tx))
        return proceed(reason="judged")


class OnlyWatches(Policy[NoSettings]):
    """Has no hook at EOM."""

    name = "only_watches"

    def on_header(self, tx: Transaction) -> Watch | None:
        raise ConnectionError("no")


def step(policy: Policy[Any], **keys: Any) -> Step:
    return Step(policy, keys.pop("timeout_s", 10), keys.pop("on_error", OnError.DEFER), **keys)


# --- what a watch sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stuffed", [True, False], ids=["data", "bdat"])
async def test_a_watch_sees_the_body_as_the_sender_meant_it(is_stuffed: bool) -> None:
    watches = Watches()
    world = World(step(watches))

    assert await world.message(is_stuffed=is_stuffed) == Answer(STORED)

    (seen,) = watches.at_eom
    assert seen is not None
    assert (seen.body, seen.ended) == (BODY, 1)
    assert watches.headers == [[b"from", b"subject"]]
    assert world.relay.delivered[0].message == ABOVE + MESSAGE


@given(
    st.lists(st.sampled_from([b".", b"\r\n", b"\r\n.", b"a", b"\r", b"\n"]), max_size=20).map(b"".join),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_a_watch_sees_the_same_however_the_body_is_cut(plain: bytes, cuts: list[int]) -> None:
    plain += b"\r\n"
    wire = stuff(plain)
    watching = Watching(lambda: 0.0, lambda *_: None, is_stuffed=True)
    seen = Seen()
    watching.add("p", 1, lambda: seen)

    at = 0
    for cut in [*sorted(cuts), len(wire)]:
        watching.feed(wire[at:cut])
        at = max(at, cut)
    watching.end()

    assert seen.body == plain
    assert b"" not in seen.blocks


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (b"", b""),
        (b"A: 1\r\n", b""),
        (b"A: 1\r\n\r\n", b""),
        (b"\r\nbody\r\n", b"body\r\n"),
        (b"A: 1\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
    ],
)
async def test_a_watch_of_an_odd_message(message: bytes, body: bytes) -> None:
    watches = Watches()

    await World(step(watches)).message(message)

    (seen,) = watches.at_eom
    assert seen is not None
    assert (seen.body, seen.ended) == (body, 1)


async def test_a_large_message_in_one_block_is_seen_in_full() -> None:
    watches = Watches()
    world = World(step(watches))
    talk = await world.rcpt()
    talk.begin_content(is_stuffed=False)
    talk.content(MESSAGE + b"x" * 200_000 + b"\r\n")

    await talk.eom(None)

    (seen,) = watches.at_eom
    assert seen is not None
    assert seen.body == BODY + b"x" * 200_000 + b"\r\n"


async def test_who_does_not_want_to_watch_is_asked_at_eom_all_the_same() -> None:
    watches = Watches(make=lambda: None)

    await World(step(watches)).message()

    assert watches.at_eom == [None]


@pytest.mark.parametrize(
    "keys", [{"exempt": (ip_network("192.0.2.0/24"),)}, {"mode": Mode.OFF}], ids=["exempt", "off"]
)
async def test_who_is_not_run_does_not_watch(keys: dict[str, Any]) -> None:
    watches = Watches()

    assert await World(step(watches, **keys)).message() == Answer(STORED)
    assert watches.headers == []


async def test_clients_that_are_not_exempt_are_watched() -> None:
    watches = Watches()

    await World(step(watches, exempt=(ip_network("198.51.100.0/24"),))).message()

    assert len(watches.headers) == 1


async def test_the_watch_is_that_of_the_recipients_domain() -> None:
    base, other = Watches(), Watches()

    await World(step(base, overrides=(Override("example.org", Mode.ENFORCE, other),))).message()

    assert (len(base.headers), len(other.headers)) == (0, 1)


@pytest.mark.parametrize("fault", [Fault.LINE_END, Fault.TOO_BIG])
async def test_a_watch_of_content_that_is_refused_never_ends(fault: Fault) -> None:
    seen = Seen()
    watches = Watches(make=lambda: seen)
    talk = await World(step(watches)).content()

    await talk.eom(fault)

    assert (seen.ended, watches.at_eom) == (0, [])


async def test_a_message_that_goes_in_a_circle_is_not_watched() -> None:
    watches = Watches()

    answer = await World(step(watches)).message(b"Received: x\r\n" * 101 + MESSAGE)

    assert answer == Answer(reply.TOO_MANY_HOPS)
    assert watches.headers == []


# --- failures ---------------------------------------------------------------------------------------------


class FailsAtBlock(Seen):
    def block(self, data: bytes) -> None:
        super().block(data)
        raise ConnectionError("no")


class FailsAtEnd(Seen):
    def end(self) -> None:
        super().end()
        raise ConnectionError("no")


def fails() -> Watch:
    raise ConnectionError("no")


@pytest.mark.parametrize("on_error", OnError)
@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.OBSERVE])
@pytest.mark.parametrize(
    ("make", "failure", "error"),
    [
        (fails, "exception", "ConnectionError('no')"),
        (FailsAtBlock, "exception", "ConnectionError('no')"),
        (FailsAtEnd, "exception", "ConnectionError('no')"),
        (lambda: 42, "verdict", "on_header returned int"),
    ],
    ids=["on_header", "block", "end", "nonsense"],
)
async def test_a_watch_that_fails_is_a_failure_of_its_policy_at_eom(
    make: Callable[[], Any], failure: str, error: str, on_error: OnError, mode: Mode
) -> None:
    broken, fine = Watches(make), Watches()
    fine.name = "fine"  # type: ignore[misc]  # of the class elsewhere
    world = World(step(broken, on_error=on_error, mode=mode), step(fine))
    is_deferred = on_error is OnError.DEFER and mode is Mode.ENFORCE

    answer = await world.message()

    assert answer == Answer(reply.INTERNAL if is_deferred else STORED)
    if not is_deferred:
        assert world.relay.delivered[0].message == ABOVE + MESSAGE
    assert broken.at_eom == [], "its EOM hook is not asked"
    assert fine.at_eom[0] is not None
    assert fine.at_eom[0].body == BODY
    assert world.services.metrics.of("mxgate_policy_failures_total") == {("watches", "eom", failure): 1}
    (line,) = world.services.log.of("error")
    assert (line.event, line.keys["reason"], line.keys["error"]) == ("policy.failed", failure, error)
    assert world.spool.used_bytes == 0


async def test_a_watch_that_failed_gets_no_more_blocks() -> None:
    seen = FailsAtBlock()
    world = World(step(Watches(lambda: seen)))

    await world.message()

    assert (len(seen.blocks), seen.ended) == (1, 0)


async def test_a_policy_that_only_watches_fails_too() -> None:
    world = World(step(OnlyWatches(NoSettings(), FakeServices())))

    assert await world.message() == Answer(reply.INTERNAL)
    assert world.services.metrics.of("mxgate_policy_failures_total") == {
        ("only_watches", "eom", "exception"): 1
    }


async def test_a_watch_has_no_more_time_than_a_hook_and_a_long_step_is_told() -> None:
    services = FakeServices()

    class Slow(Seen):
        def block(self, data: bytes) -> None:
            super().block(data)
            services.clock.uptime_s += 0.6

    seen = Slow()
    world = World(step(Watches(lambda: seen), timeout_s=1), services=services)
    talk = await world.rcpt()
    send(talk, MESSAGE + b"x" * 30 + b"\r\n")

    assert await talk.eom(None) == Answer(reply.INTERNAL)

    assert len(seen.blocks) == 2
    assert services.metrics.of("mxgate_policy_failures_total") == {("watches", "eom", "timeout"): 1}
    assert [line.keys["seconds"] for line in services.log.of("warning")] == [0.6, 0.6]


def test_system_exit_is_nobodys_failure() -> None:
    def leave() -> Watch:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        Watching(lambda: 0.0, lambda *_: None, is_stuffed=False).add("p", 1, leave)


def test_nothing_is_watched_where_nobody_wants_to() -> None:
    watching = Watching(lambda: 0.0, lambda *_: None, is_stuffed=False)
    watching.add("p", 1, lambda: None)
    assert not watching
    watching.add("q", 1, fails)
    assert watching
    assert watching.failures == {"q": Failure("exception", "ConnectionError('no')")}


async def test_a_watch_is_given_up_with_its_transaction() -> None:
    watches = Watches()
    world = World(step(watches))
    talk = await world.content()

    talk.reset()

    assert watches.at_eom == []
    assert world.count("transactions") == {"aborted": 1}


def test_on_header_belongs_to_eom() -> None:
    assert OnlyWatches.stages() == {Stage.EOM}
