"""Dovecot behind the gateway: LMTP, one recipient in a transaction, and content as it was sent.

LMTP answers behind the dot for each recipient (RFC 2033), which one SMTP reply cannot pass on: a client's other
recipients get 452 4.5.3 and come again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.e2e.dovecot import Dovecot
from tests.e2e.gateway import Gateway, StartGateway, route
from tests.e2e.net import wait_until
from tests.e2e.postfix import sending_postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = (
    b"Subject: =?utf-8?q?f=C3=BCr?=\r\n  you\r\nFrom: <sender@client.example.net>\r\nTO:<user@example.org>\r\n"
    b"Date: Sun, 22 Nov 2026 05:00:00 +0000\r\nMessage-ID: <1@client.example.net>\r\n\r\n"
    b"first\r\n.\r\n..\r\n.dot\r\n trailing blanks  \t\r\n\r\n"
)
USERS = tuple(f"user-{number}@example.org" for number in range(40))


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    server = Dovecot(USERS, xclient_from="127.0.0.0/8")
    yield server
    server.close()


@pytest.fixture(scope="module")
def new_users() -> Callable[[int], list[str]]:
    """Users who have no mail yet."""
    users = iter(USERS)
    return lambda count: list(itertools.islice(users, count))


def start(start_gateway: StartGateway, dovecot: Dovecot, **keys: str) -> Gateway:
    lmtp = route([dovecot.address], protocol="lmtp", **keys)
    return start_gateway(dovecot.address, {"relay": {"routes": [lmtp]}})


def submit_until_all_are_served(gateway: Gateway, rcpts: Sequence[str], content: bytes) -> list[int]:
    """Send to those who get 452 4.5.3 in further transactions, as RFC 5321 4.5.3.1.10 asks; served by each."""
    served: list[int] = []
    with gateway.connect() as client:
        client.hello()
        while rcpts:
            mail, *replies = client.envelope(SENDER, rcpts)
            assert mail.code == 250
            later = [
                rcpt
                for rcpt, reply in zip(rcpts, replies, strict=True)
                if (reply.code, reply.enhanced) == (452, "4.5.3")
            ]
            assert {reply.code for reply in replies} <= {250, 452}, replies
            assert client.data(content).code == 250
            served.append(len(rcpts) - len(later))
            rcpts = later
    return served


def test_each_recipient_has_a_transaction_of_its_own(
    start_gateway: StartGateway, dovecot: Dovecot, new_users: Callable[[int], list[str]]
) -> None:
    gateway = start(start_gateway, dovecot)
    users = new_users(3)
    assert submit_until_all_are_served(gateway, users, CONTENT) == [1, 1, 1]
    assert [dovecot.contents_for(user) for user in users] == [[CONTENT]] * 3


def test_passes_on_dovecots_refusal_of_a_user(
    start_gateway: StartGateway, dovecot: Dovecot, new_users: Callable[[int], list[str]]
) -> None:
    gateway = start(start_gateway, dovecot)
    (user,) = new_users(1)
    with gateway.connect() as client:
        client.hello()
        _, unknown, known = client.envelope(SENDER, ["nobody@example.org", user])
        assert (unknown.code, unknown.enhanced, known.code) == (550, "5.1.1", 250)
        assert client.data(CONTENT).code == 250
    assert dovecot.contents_for(user) == [CONTENT]


@pytest.mark.full
def test_postfix_brings_a_mail_to_all_its_recipients(
    start_gateway: StartGateway, dovecot: Dovecot, new_users: Callable[[int], list[str]]
) -> None:
    sender = sending_postfix(start(start_gateway, dovecot).address)
    users = new_users(4)
    try:
        sender.inject(SENDER, users, CONTENT.replace(b"\r\n", b"\n"))
        wait_until(
            lambda: all(dovecot.stored_for(user) for user in users), within_s=60, what="mail for all users"
        )
        # nothing is left that could come twice
        wait_until(sender.is_queue_empty, within_s=15, what="the sender's queue is empty")
    finally:
        sender.close()
    for user in users:
        (content,) = dovecot.contents_for(user)
        # the client's own Received field is in front
        assert content.endswith(b"\r\n" + CONTENT)


@pytest.mark.full
def test_stores_25_mebibytes(
    start_gateway: StartGateway, dovecot: Dovecot, new_users: Callable[[int], list[str]]
) -> None:
    gateway = start(start_gateway, dovecot)
    (user,) = new_users(1)
    line = b"." + b"0123456789abcdef" * 4 + b"\r\n"
    content = b"Subject: large\r\n\r\n" + line * (25 * (1 << 20) // len(line))
    assert submit_until_all_are_served(gateway, [user], content) == [1]
    (stored,) = dovecot.contents_for(user)
    assert len(stored) == len(content)
    assert (stored == content) is True


@pytest.mark.full
def test_dovecot_learns_the_client_by_xclient(
    start_gateway: StartGateway, dovecot: Dovecot, new_users: Callable[[int], list[str]]
) -> None:
    gateway = start(start_gateway, dovecot, identity="xclient")
    users = new_users(4)
    sources = ["127.0.0.2", "127.0.0.3"] * 2
    for source, user in zip(sources, users, strict=True):
        with gateway.connect(source) as client:
            client.hello(f"client-{source[-1]}.example.net")
            assert client.submit(SENDER, [user], CONTENT).code == 250
    for source, user in zip(sources, users, strict=True):
        (stored,) = dovecot.stored_for(user)
        assert f"from client-{source[-1]}.example.net ([{source}])".encode() in stored
