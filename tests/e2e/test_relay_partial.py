"""One envelope that cannot go on in one transaction: real clients come again, and each recipient gets it once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.client import Reply
from tests.e2e.gateway import Gateway, StartGateway, route
from tests.e2e.net import Address, wait_until
from tests.e2e.policy_service import FULL, QuotaService
from tests.e2e.postfix import Postfix, sending_postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = (
    b"From: <sender@client.example.net>\r\nDate: Sun, 22 Nov 2026 05:00:00 +0000\r\n"
    b"Message-ID: <1@client.example.net>\r\nSubject: partial\r\n\r\nHello\r\n"
)
OTHER_DOMAIN = "example.com"
# A real client comes again after a few seconds; with 120 recipients several times.
ALL_WITHIN_S = 60


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Closes the servers of a test when it is over."""
    with ExitStack() as stack:
        yield stack


def start_postfix(servers: ExitStack, settings: dict[str, str] | None = None) -> Postfix:
    """A Postfix with these settings until the test is over."""
    server = Postfix(settings or {})
    servers.callback(server.close)
    return server


def start_sender(servers: ExitStack, gateway: Address, settings: dict[str, str] | None = None) -> Postfix:
    """A Postfix that sends to the gateway, with retries after seconds."""
    sender = sending_postfix(gateway, settings)
    servers.callback(sender.close)
    return sender


def inject_and_wait(sender: Postfix, rcpts: list[str]) -> None:
    """One message to all of these; returns when the sender has nothing left to do, and nothing was bounced."""
    sender.inject(SENDER, rcpts, CONTENT.replace(b"\r\n", b"\n"))

    def is_done() -> bool:
        return sender.log().count("status=sent (250") >= len(rcpts) and sender.is_queue_empty()

    try:
        wait_until(is_done, within_s=ALL_WITHIN_S, what=f"{len(rcpts)} recipients are served")
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{sender.log()[-5000:]}") from exc
    assert "status=bounced" not in sender.log()


def refuse_late(gateway: Gateway, rcpts: list[str], content: bytes) -> tuple[list[Reply], Reply]:
    """A message whose size is not declared: the replies to its RCPTs, and to its content."""
    with gateway.connect() as client:
        client.hello()
        mail, *replies = client.envelope(SENDER, rcpts)
        assert mail.code == 250
        return replies, client.data(content)


def test_a_second_route_gets_its_own_transaction(
    start_gateway: StartGateway, servers: ExitStack, new_rcpt: Callable[[], str]
) -> None:
    one = start_postfix(servers)
    two = start_postfix(servers, {"virtual_mailbox_domains": OTHER_DOMAIN})
    routes = [route([one.address], domains=["example.org"]), route([two.address])]
    domains = ["example.org", OTHER_DOMAIN]
    gateway = start_gateway(one.address, {"relay": {"domains": [*domains], "routes": [*routes]}})
    with gateway.connect() as client:
        client.hello()
        _, first, second = client.envelope(SENDER, [new_rcpt(), f"user@{OTHER_DOMAIN}"])
        assert (first.code, second.code, second.enhanced) == (250, 452, "4.5.3")
    of_one = [new_rcpt(), new_rcpt()]
    of_two = [rcpt.replace("example.org", OTHER_DOMAIN) for rcpt in (new_rcpt(), new_rcpt())]
    sender = start_sender(servers, gateway.address)
    inject_and_wait(sender, [of_one[0], of_two[0], of_one[1], of_two[1]])
    assert one.wait_copies_of_all() == dict.fromkeys(of_one, 1)
    assert two.wait_copies_of_all() == dict.fromkeys(of_two, 1)


@pytest.mark.full
def test_all_of_120_recipients_are_served_where_50_are_the_limit(
    start_gateway: StartGateway, servers: ExitStack, new_rcpt: Callable[[], str]
) -> None:
    server = start_postfix(servers, {"smtpd_recipient_limit": "50"})
    gateway = start_gateway(server.address)
    # left to itself it would send to 50 in a transaction
    sender = start_sender(servers, gateway.address, {"smtp_destination_recipient_limit": "200"})
    rcpts = [new_rcpt() for _ in range(120)]
    inject_and_wait(sender, rcpts)
    assert server.wait_copies_of_all() == Counter(rcpts)
    # the first delivery has taught it: who is the 51st is told at RCPT
    with gateway.connect() as client:
        client.hello()
        _, *replies = client.envelope(SENDER, [new_rcpt() for _ in range(51)])
    assert [reply.code for reply in replies] == [250] * 50 + [452]
    assert replies[-1].enhanced == "4.5.3"


def test_a_quota_refusal_at_delivery_is_given_at_rcpt_when_the_client_comes_again(
    start_gateway: StartGateway, servers: ExitStack, new_rcpt: Callable[[], str]
) -> None:
    good, full = new_rcpt(), new_rcpt()
    quota = QuotaService(full, free_bytes=10_000)
    servers.callback(quota.close)
    server = start_postfix(
        servers, {"smtpd_recipient_restrictions": f"reject_unauth_destination, {quota.restriction()}"}
    )
    gateway = start_gateway(server.address)
    large = CONTENT + b"0123456789abcdef\r\n" * 1000
    # at RCPT nobody knows the size
    replies, answer = refuse_late(gateway, [good, full], large)
    assert [reply.code for reply in replies] == [250, 250]
    assert answer.code == 451, answer
    replies, answer = refuse_late(gateway, [good, full], large)
    assert [reply.code for reply in replies] == [250, 552]
    assert FULL.startswith("552 5.2.2")
    assert replies[1].enhanced == "5.2.2"
    assert answer.code == 250
    assert server.wait_copies_of_all() == {good: 1}
    # another sender is another matter, and small mail still goes in
    with gateway.connect() as client:
        client.hello()
        assert client.submit("other@client.example.net", [full], CONTENT).code == 250
    assert server.wait_copies_of_all() == {good: 1, full: 1}
