"""Behind a real HAProxy: whose the mail is, health checks, and headers that are wrong, forged, late or missing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e.balancer import SOURCE, Balancer
from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway, shared_gateway
from tests.e2e.net import LOOPBACK, wait_until

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
CLIENT = "127.0.0.5"
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\r\n"
V2 = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"
    + bytes([192, 0, 2, 7, 198, 51, 100, 1])
    + (56324).to_bytes(2)
    + (25).to_bytes(2)
)


@pytest.fixture(scope="module")
def behind(shared_sink: Downstream, tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that wants a header of the balancer, and of nobody else."""
    server = tls.server_section()
    assert isinstance(server, dict)
    overrides: Config = {"server": {**server, "proxy_protocol_from": [f"{SOURCE}/32"]}}
    yield from shared_gateway(shared_sink.address, overrides, tmp_path_factory.mktemp("gateway"))


@pytest.fixture(autouse=True)
def _no_faults(sink: Downstream) -> None:
    """The downstream is everybody's: what another test wanted of it is over."""


@pytest.fixture(scope="module")
def balancer(behind: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    check = "check inter 100ms"
    running = Balancer(
        {
            "v1": (behind.address, "send-proxy"),
            "v2": (behind.address, "send-proxy-v2"),
            "tlvs": (behind.address, "send-proxy-v2 proxy-v2-options crc32c,authority"),
            "tls": (behind.tls_address, "send-proxy-v2"),
            "tls-v1": (behind.tls_address, "send-proxy"),
            "silent": (behind.address, ""),
            "checked-v1": (behind.address, f"send-proxy {check} check-send-proxy"),
            "checked-v2": (behind.address, f"send-proxy-v2 {check} check-send-proxy"),
            "spoken-v1": (behind.address, f"send-proxy {check} check-send-proxy"),
            "spoken-v2": (behind.address, f"send-proxy-v2 {check} check-send-proxy"),
        },
        tmp_path_factory.mktemp("haproxy"),
        smtp_checks=("spoken-v1", "spoken-v2"),
    )
    yield running
    running.close()


def client_of(gateway: Gateway, rcpt: str) -> str:
    """The client's address in the log line of the message for this recipient."""

    def line() -> str:
        return next((line for line in gateway.log().splitlines() if rcpt in line and "message." in line), "")

    return str(json.loads(wait_until(line, within_s=5, what="the line of the message"))["client"])


def headers(gateway: Gateway, outcome: str) -> float:
    return gateway.metric("mxgate_proxy_headers_total", outcome=outcome)


def ends_in_silence(client: Client) -> bool:
    """Whether the gateway closes without a word."""
    try:
        return client.is_at_eof()
    finally:
        client.close()


def silent_before(client: Client, seconds: float) -> bool:
    """Whether the gateway says nothing for so long: nothing else can show that it waits."""
    client.sock.settimeout(seconds)
    try:
        client.sock.recv(1)
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(15)
    return False


# --- HAProxy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", ["v1", "v2", "tlvs"])
def test_the_client_is_whom_haproxy_names(
    behind: Gateway, balancer: Balancer, sink: Downstream, rcpt: str, proxy: str
) -> None:
    with Client(balancer.addresses[proxy], source=CLIENT) as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == CLIENT
    assert f"[{CLIENT}]".encode() in sink.messages[-1].content.partition(b"From:")[0]


@pytest.mark.parametrize("proxy", ["tls", "tls-v1"])
def test_the_client_is_named_before_implicit_tls(
    behind: Gateway, balancer: Balancer, tls: Tls, rcpt: str, proxy: str
) -> None:
    with Client(balancer.addresses[proxy], tls=tls.trusting, source=CLIENT) as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == CLIENT


def test_starttls_behind_haproxy(behind: Gateway, balancer: Balancer, tls: Tls, rcpt: str) -> None:
    with Client(balancer.addresses["v2"], source=CLIENT) as client:
        client.hello()
        assert client.command("STARTTLS").code == 220
        client.start_tls(tls.trusting)
        assert client.command("EHLO client.example.net").code == 250
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == CLIENT


def test_health_checks_are_served(behind: Gateway, balancer: Balancer) -> None:
    before = headers(behind, "local")
    # four servers are checked ten times a second
    wait_until(lambda: headers(behind, "local") >= before + 40, within_s=15, what="more checks")
    assert "is DOWN" not in balancer.log()
    assert "Layer7" not in balancer.log()
    assert f'"client":"{SOURCE}"' not in behind.log()


def test_a_balancer_that_sends_no_header_gets_no_banner(behind: Gateway, balancer: Balancer) -> None:
    before = headers(behind, "invalid")
    with Client(balancer.addresses["silent"], source=CLIENT) as client:
        assert silent_before(client, 0.5)
        client.send(b"EHLO client.example.net\r\n")
        assert client.is_at_eof()
    wait_until(lambda: headers(behind, "invalid") >= before + 1, within_s=5, what="the header is counted")
    assert f'"peer":"{SOURCE}","error":"invalid"' in behind.log()


def test_a_header_of_the_client_behind_that_of_the_balancer_is_no_address(
    behind: Gateway, balancer: Balancer
) -> None:
    with Client(balancer.addresses["v2"], source=CLIENT) as client:
        assert client.read_reply().code == 220
        client.send(V1)
        assert client.read_reply().code == 500
        client.send(V2)
        # two empty lines, a NUL, and QUIT with a bare LF
        assert [client.read_reply().code for _ in range(4)] == [500] * 4
        assert client.is_at_eof()


# --- raw headers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_forged_header_of_anybody_else_is_no_address(behind: Gateway, rcpt: str, header: bytes) -> None:
    with behind.connect() as client:
        client.send(header)
        replies = [client.read_reply() for _ in range(2)]
        assert replies[0].code in (220, 554)
        assert replies[-1].code >= 500
    with behind.connect() as client:
        client.hello()
        client.send(V1)
        assert client.read_reply().code == 500
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == LOOPBACK


def test_others_connect_directly_to_the_same_port(behind: Gateway, rcpt: str) -> None:
    with Client(behind.address, source="127.0.0.6") as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == "127.0.0.6"


@pytest.mark.parametrize(
    "sent",
    [
        b"EHLO client.example.net\r\n",
        V1.replace(b"192.0.2.7", b"192.0.2.777"),
        V1.replace(b"TCP4", b"TCP6"),
        b"PROXY " + b"A" * 1000,
        V2[:12] + b"\x31" + V2[13:],
        V2[:14] + b"\xff\xff",
    ],
)
def test_a_wrong_header_gets_no_banner(behind: Gateway, sent: bytes) -> None:
    client = Client(behind.address, source=SOURCE)
    client.send(sent)
    assert ends_in_silence(client)


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_truncated_header_is_told(behind: Gateway, header: bytes) -> None:
    before = headers(behind, "truncated")
    client = Client(behind.address, source=SOURCE)
    client.send(header[:-1])
    assert silent_before(client, 0.3)
    client.close()
    wait_until(lambda: headers(behind, "truncated") == before + 1, within_s=5, what="it is counted")


def test_a_late_header_in_pieces_is_good(behind: Gateway, rcpt: str) -> None:
    with Client(behind.address, source=SOURCE) as client:
        for piece in (V2[:5], V2[5:15], V2[15:20]):
            client.send(piece)
            assert silent_before(client, 0.5)
        client.send(V2[20:])
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    assert client_of(behind, rcpt) == "192.0.2.7"


@pytest.mark.full
def test_a_header_that_does_not_come_is_not_waited_for(behind: Gateway) -> None:
    client = Client(behind.address, source=SOURCE)
    begun = time.monotonic()
    client.send(V1[:20])
    assert ends_in_silence(client)
    assert 9.9 < time.monotonic() - begun < 13


# --- limits, trust and balancers that hide their clients --------------------------------------------------


def test_limits_and_trust_go_by_the_client(
    start_gateway: StartGateway, sink: Downstream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gateway = start_gateway(
        sink.address,
        {
            "server": {"proxy_protocol_from": [f"{SOURCE}/32"], "max_connections_per_client": 1},
            # the balancer itself is trusted, and that is nobody's trust behind it
            "relay": {"trusted_networks": [f"{SOURCE}/32", "127.0.0.7/32"]},
        },
    )
    running = Balancer({"v2": (gateway.address, "send-proxy-v2")}, tmp_path_factory.mktemp("haproxy"))
    try:
        address = running.addresses["v2"]
        with Client(address, source=CLIENT) as first, Client(address, source="127.0.0.7") as trusted:
            first.hello()
            trusted.hello()
            elsewhere = "someone@elsewhere.example"
            assert [reply.code for reply in first.envelope(SENDER, [elsewhere])] == [250, 550]
            assert [reply.code for reply in trusted.envelope(SENDER, [elsewhere])] == [250, 250]
            with Client(address, source=CLIENT) as second:
                assert str(second.read_reply()) == "421 4.7.0 Too many connections from your address"
    finally:
        running.close()


def test_readyz_names_a_balancer_that_hides_its_clients(
    start_gateway: StartGateway, sink: Downstream
) -> None:
    gateway = start_gateway(sink.address)
    for _ in range(101):
        with gateway.connect() as client:
            client.hello()
    status, body = gateway.admin("/readyz")
    # loopback is a test's address, or a container's neighbour's
    assert (status, json.loads(body)["workers"][0]["detail"]["clients"]) == (200, {"hidden_by": ""})
    assert gateway.metric("mxgate_source_hidden") == 0
