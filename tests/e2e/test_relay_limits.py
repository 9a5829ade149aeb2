"""What a downstream cannot take is refused before content is accepted, with the right 5xx, and it never sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.client import Client
from tests.e2e.gateway import Gateway, StartGateway, route
from tests.e2e.net import wait_until
from tests.e2e.postfix import Postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
UTF8_SENDER = "jürgen@bücher.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: limits\r\n\r\nHello\r\n"
MEBIBYTE = 1 << 20
LIMIT_BYTES = 5 * MEBIBYTE
LARGE_BYTES = 20 * MEBIBYTE
LINE = b"0123456789abcdef" * 4 + b"\r\n"
LARGE = CONTENT + LINE * (LARGE_BYTES // len(LINE))


@pytest.fixture(scope="module")
def poor() -> Iterator[Postfix]:
    """A Postfix for example.org and poor.example.org without modern extensions, with a limit of 5 MiB."""
    server = Postfix(
        {
            "smtpd_discard_ehlo_keywords": "smtputf8, 8bitmime, dsn",
            "message_size_limit": str(LIMIT_BYTES),
            "virtual_mailbox_domains": "example.org, poor.example.org",
        }
    )
    yield server
    server.close()


@pytest.fixture
def gateway(start_gateway: StartGateway, poor: Postfix) -> Gateway:
    """A gateway with this downstream only, whose EHLO it has seen."""
    started = start_gateway(poor.address)
    started.wait_announces(f"SIZE {LIMIT_BYTES}")
    return started


@pytest.fixture
def mixed_gateway(start_gateway: StartGateway, poor: Postfix, postfix: Postfix) -> Gateway:
    """A gateway with two routes: poor.example.org to the poor one, the rest to one that takes all."""
    routes = [route([poor.address], domains=["poor.example.org"]), route([postfix.address])]
    domains = ["example.org", "poor.example.org"]
    started = start_gateway(postfix.address, {"relay": {"domains": [*domains], "routes": [*routes]}})
    wait_until(
        lambda: "8BITMIME" not in keywords(started.ehlo_lines()), within_s=10, what="both have answered EHLO"
    )
    return started


def keywords(ehlo: tuple[str, ...]) -> set[str]:
    return {line.split(" ")[0] for line in ehlo[1:]}


def poor_name(rcpt: str) -> str:
    """The same user of poor.example.org."""
    return rcpt.replace("@example.org", "@poor.example.org")


def send_content(client: Client, rcpt: str) -> int:
    """Content of 20 MiB without a word about its size before; the code of the reply to its dot."""
    assert [reply.code for reply in client.envelope(SENDER, [rcpt])] == [250, 250]
    reply = client.data(LARGE)
    assert reply.enhanced == "5.3.4", reply
    return reply.code


def test_announces_only_what_the_downstream_takes(gateway: Gateway) -> None:
    announced = gateway.ehlo_lines()
    assert keywords(announced).isdisjoint({"SMTPUTF8", "8BITMIME", "DSN"})
    assert f"SIZE {LIMIT_BYTES}" in announced


def test_refuses_an_internationalised_address_that_the_downstream_cannot_take(
    gateway: Gateway, poor: Postfix, rcpt: str
) -> None:
    with gateway.connect() as client:
        client.hello()
        # RFC 5321 4.1.1.11: 555 for a parameter that was not announced
        reply = client.command(f"MAIL FROM:<{SENDER}> SMTPUTF8")
        assert (reply.code, reply.enhanced) == (555, "5.5.4")
        # RFC 6531 3.5: without SMTPUTF8 there is no such address
        assert client.command(f"MAIL FROM:<{UTF8_SENDER}>").code in {501, 550, 553}
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert poor.wait_content(rcpt) == CONTENT


def test_refuses_before_content_what_the_downstream_finds_too_large(
    gateway: Gateway, poor: Postfix, rcpt: str
) -> None:
    with gateway.connect() as client:
        client.hello()
        client.command(f"MAIL FROM:<{SENDER}> SIZE={LARGE_BYTES}")
        reply = client.command(f"RCPT TO:<{rcpt}>")
        # RFC 1870 6.1
        assert (reply.code, reply.enhanced) == (552, "5.3.4")
        assert client.command("DATA").code in {503, 554}
    # it has not even been asked
    assert "size limit" not in poor.log()


@pytest.mark.full
def test_refuses_large_content_that_was_not_declared(gateway: Gateway, poor: Postfix, rcpt: str) -> None:
    with gateway.connect() as client:
        client.hello()
        assert send_content(client, rcpt) == 552
        # the connection is still good, and so is what is not too large
        almost = CONTENT + LINE * ((LIMIT_BYTES - 2000) // len(LINE))
        assert client.submit(SENDER, [rcpt], almost).code == 250
    # bare equality would print 10 MiB when it fails
    assert (poor.wait_content(rcpt) == almost) is True
    assert "size limit" not in poor.log()


@pytest.mark.full
def test_passes_8_bit_content_on_as_it_is(gateway: Gateway, poor: Postfix, rcpt: str) -> None:
    content = b"Subject: x\r\n\r\n\xe9 Gr\xc3\xbc\xc3\x9fe\r\n"
    with gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], content).code == 250
    assert poor.wait_content(rcpt) == content


@pytest.mark.full
def test_refuses_at_rcpt_what_only_that_route_cannot_take(
    mixed_gateway: Gateway, poor: Postfix, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    rich = new_rcpt()
    with mixed_gateway.connect() as client:
        announced = client.hello().texts
        # what not every route has is not announced; SIZE is that of the route that takes most
        assert keywords(announced).isdisjoint({"SMTPUTF8", "8BITMIME", "DSN"})
        assert "SIZE 52428800" in announced
        mail = client.command(f"MAIL FROM:<{SENDER}> SIZE={LARGE_BYTES}")
        refused = client.command(f"RCPT TO:<{poor_name(new_rcpt())}>")
        taken = client.command(f"RCPT TO:<{rich}>")
        assert (mail.code, refused.code, refused.enhanced, taken.code) == (250, 552, "5.3.4", 250)
        assert client.data(LARGE).code == 250
        # the same without SIZE: at the end of the content, and the downstream is not asked
        assert client.command("RSET").code == 250
        assert send_content(client, poor_name(new_rcpt())) == 552
    assert (postfix.wait_content(rich) == LARGE) is True
    assert "size limit" not in poor.log()
