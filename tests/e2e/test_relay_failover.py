"""Two Postfix instances behind one route: one dies, comes back, hangs; no mail is lost or doubled meanwhile.

Every attempt to send has a recipient of its own, so that what became of it can be told for sure. What was answered
250 is stored once, on one of the two. What was answered 4xx is stored nowhere; only where the downstream had the whole
message and its answer did not come (451 4.4.2), it may be stored once: its sender brings it again.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import pytest

from tests.e2e.client import Reply
from tests.e2e.gateway import Gateway, StartGateway, Value, route
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until
from tests.e2e.postfix import Postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = (
    b"From: <sender@client.example.net>\r\nMessage-ID: <1@client.example.net>\r\n"
    b"Subject: failover\r\n\r\nHello\r\n"
)
CONNECT_TIMEOUT_S = 2
# Other waits are shorter than in production, so that what is in flight when a downstream hangs ends within the test.
QUICK: dict[str, Value] = {"connect_timeout_s": CONNECT_TIMEOUT_S, "reply_timeout_s": 4, "final_timeout_s": 4}
# Recipient and message are asked about one after the other, and the first of both may meet an idle connection whose
# host hangs, and then a new one to it before it is known to be down.
TAKEN_OVER_WITHIN_S = 3 * CONNECT_TIMEOUT_S + 2
UNCONFIRMED = "4.4.2"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One message with one recipient, and what it was answered."""

    rcpt: str
    began: float
    took_s: float
    reply: Reply


class Traffic:
    """Clients that send one message after the other, from entering to leaving the context."""

    def __init__(self, gateway: Gateway, new_rcpt: Callable[[], str], clients: int = 4) -> None:
        self.attempts: list[Attempt] = []
        self._gateway = gateway
        self._new_rcpt = new_rcpt
        self._is_over = threading.Event()
        self._failed: list[BaseException] = []
        self._threads = [threading.Thread(target=self._send_all) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert self._failed == []

    def since(self, moment: float) -> list[Attempt]:
        """The finished attempts that began at that moment or later."""
        return [attempt for attempt in list(self.attempts) if attempt.began >= moment]

    def wait_for(self, count: int, what: str) -> list[Attempt]:
        """So many attempts that begin from now on."""
        moment = time.monotonic()
        wait_until(lambda: len(self.since(moment)) >= count, within_s=30, what=f"{count} {what}")
        return self.since(moment)

    def _send_all(self) -> None:
        try:
            # the pause keeps a machine of two cores usable; nothing depends on it
            while not self._is_over.wait(0.01):
                self.attempts.append(send(self._gateway, self._new_rcpt()))
        except BaseException as exc:  # noqa: BLE001 - it is the test's failure, and not this thread's
            self._failed.append(exc)


def send(gateway: Gateway, rcpt: str, content: bytes = CONTENT) -> Attempt:
    """One message on a connection of its own."""
    began = time.monotonic()
    with gateway.connect() as client:
        client.hello()
        reply = client.submit(SENDER, [rcpt], content)
    return Attempt(rcpt, began, time.monotonic() - began, reply)


@pytest.fixture
def pair() -> Iterator[tuple[Postfix, Postfix]]:
    first, second = Postfix(), Postfix()
    yield first, second
    first.close()
    second.close()


def start(start_gateway: StartGateway, pair: tuple[Postfix, Postfix], *, balanced: bool) -> Gateway:
    """A gateway that prefers the first, or that balances."""
    first, second = (server.address for server in pair)
    hosts = route([first, second]) if balanced else route([first], [second])
    return start_gateway(first, {"relay": {**QUICK, "routes": [hosts]}})


def check_stored(attempts: list[Attempt], pair: tuple[Postfix, Postfix]) -> None:
    """Nothing is lost, nothing is doubled, and what was not taken is not there."""
    stored = sum((server.wait_copies_of_all() for server in pair[1:]), pair[0].wait_copies_of_all())
    for attempt in attempts:
        if attempt.reply.code == 250:
            assert stored[attempt.rcpt] == 1, attempt
        elif attempt.reply.enhanced == UNCONFIRMED:
            assert stored[attempt.rcpt] <= 1, attempt
        else:
            assert attempt.reply.code == 451, attempt
            assert stored[attempt.rcpt] == 0, attempt
    assert stored.keys() <= {attempt.rcpt for attempt in attempts}


def check_taken_over(attempts: list[Attempt]) -> None:
    """All of these mails were taken, none of them late."""
    assert {attempt.reply.code for attempt in attempts} == {250}, attempts
    assert max(attempt.took_s for attempt in attempts) < TAKEN_OVER_WITHIN_S


def is_up(gateway: Gateway, server: Postfix) -> bool:
    """Whether the metric says so."""
    return gateway.metric("mxgate_relay_up", host=f"{server.address[0]}:{server.address[1]}") == 1


def test_the_second_takes_over_and_the_first_comes_back(
    start_gateway: StartGateway, pair: tuple[Postfix, Postfix], new_rcpt: Callable[[], str]
) -> None:
    first, second = pair
    gateway = start(start_gateway, pair, balanced=False)
    attempts = [send(gateway, new_rcpt()) for _ in range(3)]
    first.kill()
    attempts += [send(gateway, new_rcpt()) for _ in range(3)]
    check_taken_over(attempts)
    wait_until(lambda: not is_up(gateway, first), within_s=5, what="the first is known to be down")
    first.start()
    # it has no mail to notice by that the first is there again: the probe does
    wait_until(lambda: is_up(gateway, first), within_s=15, what="the first is known to be up")
    attempts += [send(gateway, new_rcpt()) for _ in range(3)]
    check_stored(attempts, pair)
    assert first.wait_copies_of_all().keys() == {item.rcpt for item in (*attempts[:3], *attempts[6:])}
    assert second.wait_copies_of_all().keys() == {item.rcpt for item in attempts[3:6]}


@pytest.fixture
def deaf() -> Iterator[Address]:
    """An address whose connections are neither taken nor refused: the queue of a listener that accepts none is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        address = (LOOPBACK, free_port())
        listener.bind(address)
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.3)
        yield address


def test_another_host_is_used_within_the_connect_timeout_where_one_does_not_answer(
    start_gateway: StartGateway, postfix: Postfix, deaf: Address, new_rcpt: Callable[[], str]
) -> None:
    hosts = route([deaf], [postfix.address])
    gateway = start_gateway(deaf, {"relay": {**QUICK, "routes": [hosts]}})
    attempt = send(gateway, new_rcpt())
    check_taken_over([attempt])
    postfix.wait_stored(attempt.rcpt)
    # the deaf one is known to be down now, and is waited for no more
    again = [send(gateway, new_rcpt()) for _ in range(5)]
    check_taken_over(again)
    assert sum(attempt.took_s for attempt in again) < CONNECT_TIMEOUT_S


@pytest.mark.full
@pytest.mark.parametrize("balanced", [False, True], ids=["preferred", "balanced"])
def test_no_mail_is_lost_or_doubled_while_one_dies_and_hangs(
    balanced: bool,
    start_gateway: StartGateway,
    pair: tuple[Postfix, Postfix],
    new_rcpt: Callable[[], str],
) -> None:
    first, _ = pair
    gateway = start(start_gateway, pair, balanced=balanced)
    with Traffic(gateway, new_rcpt) as traffic:
        check_taken_over(traffic.wait_for(10, "mails while both are well"))
        for ail, recover in ((first.kill, first.start), (first.freeze, first.thaw)):
            ail()
            check_taken_over(traffic.wait_for(10, "mails that began while the first was away"))
            wait_until(lambda: not is_up(gateway, first), within_s=15, what="the first is known to be down")
            recover()
            wait_until(lambda: is_up(gateway, first), within_s=30, what="the first is known to be up")
            check_taken_over(recovered := traffic.wait_for(10, "mails behind the recovery"))
            wait_until(
                lambda: first.wait_copies_of_all().keys() & {item.rcpt for item in recovered},
                within_s=15,
                what="mail at the first again",
            )
    check_stored(traffic.attempts, pair)


@pytest.mark.full
@pytest.mark.parametrize("ail", ["kill", "freeze"])
def test_mail_is_deferred_when_the_downstream_goes_behind_its_dot(
    ail: str, start_gateway: StartGateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    # it has the whole message and takes its time for the answer
    slow = Postfix({"smtpd_end_of_data_restrictions": "sleep 3, permit"})
    hosts = route([slow.address], [postfix.address])
    try:
        gateway = start_gateway(slow.address, {"relay": {**QUICK, "routes": [hosts]}})
        lost, again = new_rcpt(), new_rcpt()
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(send, gateway, lost, CONTENT + b"0123456789abcdef\r\n" * 2000)
            # Postfix reads the header when the content is with it; what is so small went out in one write with its dot
            wait_until(lambda: "message-id=<1@" in slow.log(), within_s=10, what="the content at Postfix")
            getattr(slow, ail)()
            unconfirmed = sending.result()
        assert (unconfirmed.reply.code, unconfirmed.reply.enhanced) == (451, UNCONFIRMED)
        check_taken_over([send(gateway, again)])
        postfix.wait_stored(again)
        # nothing was retried behind the dot
        assert postfix.stored_for(lost) == []
        getattr(slow, {"kill": "start", "freeze": "thaw"}[ail])()
        # a Postfix that only paused has stored the message; the sender's retry doubles it, which cannot be helped
        assert slow.wait_copies_of_all()[lost] <= 1
    finally:
        slow.close()


@pytest.mark.full
def test_mail_in_flight_when_both_die_is_deferred_and_comes_again(
    start_gateway: StartGateway, pair: tuple[Postfix, Postfix], new_rcpt: Callable[[], str]
) -> None:
    gateway = start(start_gateway, pair, balanced=True)
    with Traffic(gateway, new_rcpt) as traffic:
        traffic.wait_for(5, "mails while both are well")
        for server in pair:
            server.kill()
        refused = traffic.wait_for(5, "mails without a downstream")
        assert {attempt.reply.code for attempt in refused} == {451}, refused
        for server in pair:
            server.start()
        wait_until(
            lambda: all(is_up(gateway, server) for server in pair), within_s=30, what="both are up again"
        )
        check_taken_over(traffic.wait_for(5, "mails behind the recovery"))
    check_stored(traffic.attempts, pair)
