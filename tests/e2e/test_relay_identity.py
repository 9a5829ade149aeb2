"""The downstream learns who each mail's client was: XFORWARD, XCLIENT and the PROXY header, read by real servers.

The clients are addresses of loopback, and their mails are interleaved, so that pooled connections carry the mail of
several of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import Client, Reply
from tests.e2e.gateway import Config, Gateway, StartGateway, route
from tests.e2e.haproxy import HAProxy
from tests.e2e.machine import require_ipv6
from tests.e2e.maillog import Client as Logged
from tests.e2e.maillog import clients_of
from tests.e2e.net import Address, free_port, wait_until
from tests.e2e.postfix import Postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: identity\r\n\r\nHello\r\n"
OURS = "127.0.0.1"
# A client that the downstream itself does not let in; what it is told must not be told to others, and vice versa.
UNWANTED = "127.0.0.66"
SOURCES = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
ROUNDS = 4


@pytest.fixture
def start_postfix() -> Iterator[Callable[[Mapping[str, str]], Postfix]]:
    """Start a Postfix with these settings that refuses the client UNWANTED at RCPT."""
    with ExitStack() as started:

        def start(settings: Mapping[str, str]) -> Postfix:
            unwanted = {
                "smtpd_client_restrictions": f"check_client_access inline:{{{{{UNWANTED} = REJECT Unwanted}}}}"
            }
            server = Postfix(unwanted | dict(settings))
            started.callback(server.close)
            return server

        yield start


StartPostfix = Callable[[Mapping[str, str]], Postfix]


def start(start_gateway: StartGateway, downstream: Address, identity: str) -> Gateway:
    return start_gateway(downstream, {"relay": {"routes": [route([downstream], identity=identity)]}})


def helo_of(source: str) -> str:
    """The name that this client says in EHLO."""
    return f"client-{source.rpartition('.')[2]}.example.net"


def send_interleaved(gateway: Gateway, new_rcpt: Callable[[], str]) -> dict[str, str]:
    """Several clients send at the same time, each command of one between those of others; recipient -> client."""
    sent: dict[str, str] = {}
    with ExitStack() as stack:
        clients = {source: stack.enter_context(gateway.connect(source)) for source in SOURCES}
        for source, client in clients.items():
            client.hello(helo_of(source))
        for _ in range(ROUNDS):
            rcpts = {source: new_rcpt() for source in SOURCES}
            replies = [client.command(f"MAIL FROM:<{SENDER}>") for client in clients.values()]
            replies += [
                client.command(f"RCPT TO:<{rcpts[source]}>") for source, client in reversed(clients.items())
            ]
            assert {reply.code for reply in replies} == {250}, replies
            assert [client.data(CONTENT).code for client in clients.values()] == [250] * len(clients)
            sent |= {rcpt: source for source, rcpt in rcpts.items()}
    return sent


def logged_clients(server: Postfix, rcpts: Mapping[str, str]) -> Mapping[str, Logged]:
    """What Postfix logged about the clients of the mails to these recipients."""
    wait_until(
        lambda: clients_of(server.log()).keys() >= rcpts.keys(),
        within_s=15,
        what="all mails in Postfix's log",
    )
    return clients_of(server.log())


def submit(gateway: Gateway, source: str, rcpt: str) -> Reply:
    """One message of one client: the first refusal, or the reply to the content."""
    with gateway.connect(source) as client:
        client.hello(helo_of(source))
        return client.submit(SENDER, [rcpt], CONTENT)


def connections_of(server: Postfix) -> int:
    """How many connections it has had; the kit's own, which sees whether it listens, is one."""
    return len(re.findall(r"smtpd\[\d+\]: connect from ", server.log())) - 1


def check_named(server: Postfix, sent: Mapping[str, str]) -> None:
    """For Postfix the client of each mail is the one who sent it, by log and Received field."""
    clients = logged_clients(server, sent)
    assert {rcpt: clients[rcpt].address for rcpt in sent} == sent


def check_judged_by_client(gateway: Gateway, rcpt: str) -> None:
    """Postfix's answer to one client about a recipient is not remembered for another."""
    assert submit(gateway, SOURCES[0], rcpt).code == 250
    refused = submit(gateway, UNWANTED, rcpt)
    assert (refused.code, refused.enhanced) == (554, "5.7.1")
    assert submit(gateway, SOURCES[1], rcpt).code == 250
    assert submit(gateway, UNWANTED, rcpt).code == 554


def test_postfix_logs_the_client_that_xforward_names(
    start_gateway: StartGateway, start_postfix: StartPostfix, new_rcpt: Callable[[], str]
) -> None:
    server = start_postfix({"smtpd_authorized_xforward_hosts": "127.0.0.0/8"})
    gateway = start(start_gateway, server.address, "xforward")
    sent = send_interleaved(gateway, new_rcpt)
    clients = logged_clients(server, sent)
    assert {rcpt: clients[rcpt].original_address for rcpt in sent} == sent
    # it is for the log only: for every decision the client is the gateway
    assert {clients[rcpt].address for rcpt in sent} == {OURS}
    # one connection serves all clients, and a second one while it is busy
    assert connections_of(server) < len(sent) / ROUNDS
    transactions = set(re.findall(r'"event":"message.accepted".*?"tx":"([^"]+)"', gateway.log()))
    assert {clients[rcpt].original_queue_id for rcpt in sent} == transactions


def test_postfix_takes_the_client_that_xclient_names_for_the_client(
    start_gateway: StartGateway, start_postfix: StartPostfix, new_rcpt: Callable[[], str]
) -> None:
    server = start_postfix({"smtpd_authorized_xclient_hosts": "127.0.0.0/8"})
    gateway = start(start_gateway, server.address, "xclient")
    sent = send_interleaved(gateway, new_rcpt)
    check_named(server, sent)
    for rcpt, source in sent.items():
        # what Postfix writes into Received, and hands to its HELO restrictions
        named = f"Received: from {helo_of(source)} (unknown [{source}])".encode()
        assert named in server.wait_stored(rcpt)
    # each client's other mails went where its first one did
    assert connections_of(server) < 2 * len(SOURCES)
    check_judged_by_client(gateway, new_rcpt())


@pytest.mark.parametrize("identity", ["xclient", "proxy-v2"])
def test_defers_mail_where_the_downstream_does_not_take_the_identity(
    identity: str, start_gateway: StartGateway, start_postfix: StartPostfix, rcpt: str
) -> None:
    server = start_postfix({})
    gateway = start(start_gateway, server.address, identity)
    reply = submit(gateway, SOURCES[0], rcpt)
    # a Postfix that knows no PROXY header takes it for a wrong command; both ways it must not see our mail
    assert reply.code == 451, reply
    assert clients_of(server.log()) == {}


@pytest.mark.full
def test_mail_goes_on_where_xforward_is_not_offered(
    start_gateway: StartGateway, start_postfix: StartPostfix, new_rcpt: Callable[[], str]
) -> None:
    server = start_postfix({})
    gateway = start(start_gateway, server.address, "xforward")
    sent = send_interleaved(gateway, new_rcpt)
    assert {client.original_address for client in logged_clients(server, sent).values()} == {""}
    assert gateway.log().count("relay.identity_not_offered") == 1


def test_postfix_reads_the_client_from_the_proxy_header(
    start_gateway: StartGateway, start_postfix: StartPostfix, new_rcpt: Callable[[], str]
) -> None:
    server = start_postfix({"smtpd_upstream_proxy_protocol": "haproxy"})
    gateway = start(start_gateway, server.address, "proxy-v2")
    sent = send_interleaved(gateway, new_rcpt)
    check_named(server, sent)
    assert connections_of(server) < 2 * len(SOURCES)
    check_judged_by_client(gateway, new_rcpt())


@pytest.mark.full
def test_haproxy_reads_the_client_from_the_proxy_header(
    start_gateway: StartGateway, start_postfix: StartPostfix, new_rcpt: Callable[[], str], tmp_path: Path
) -> None:
    server = start_postfix({"smtpd_upstream_proxy_protocol": "haproxy"})
    haproxy = HAProxy(server.address, tmp_path)
    try:
        gateway = start(start_gateway, haproxy.address, "proxy-v2")
        sent = send_interleaved(gateway, new_rcpt)
        # besides these only our own probes, which are no client's
        assert haproxy.clients() - {OURS} == set(SOURCES)
        check_named(server, sent)
        check_judged_by_client(gateway, new_rcpt())
    finally:
        haproxy.close()


@pytest.mark.full
@pytest.mark.parametrize(
    ("identity", "settings"),
    [
        ("xclient", {"smtpd_authorized_xclient_hosts": "127.0.0.0/8"}),
        ("xforward", {"smtpd_authorized_xforward_hosts": "127.0.0.0/8"}),
        ("proxy-v2", {"smtpd_upstream_proxy_protocol": "haproxy"}),
    ],
)
def test_postfix_learns_of_an_ipv6_client(
    identity: str,
    settings: dict[str, str],
    start_gateway: StartGateway,
    start_postfix: StartPostfix,
    rcpt: str,
) -> None:
    require_ipv6()
    # by IPv4 it is told of the client; it must know both kinds of addresses to take this one
    server = start_postfix(settings | {"inet_protocols": "all"})
    six = ("::1", free_port())
    overrides: Config = {
        "server": {"listen": [f"[{six[0]}]:{six[1]}"]},
        "relay": {"routes": [route([server.address], identity=identity)]},
    }
    start_gateway(server.address, overrides)
    with Client(six) as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    logged = logged_clients(server, {rcpt: six[0]})[rcpt]
    assert (logged.original_address or logged.address) == six[0]
