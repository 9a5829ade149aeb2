"""Exim behind the gateway, set up by the lines of docs/install.md."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.exim import Exim
from tests.e2e.gateway import Gateway, StartGateway, route
from tests.test_docs import blocks

# timeout: the first test waits for a Debian
pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(600)]

SENDER = "sender@client.example.net"
CONTENT = (
    b"From: <sender@client.example.net>\r\nSubject: exim\r\n\r\n"
    b"first\r\n.\r\n..\r\n.dot\r\nFrom here\r\n trailing blanks  \t\r\n\r\n"
)


def documented() -> str:
    text = (Path(__file__).parents[2] / "docs" / "install.md").read_text("utf-8")
    section = text.partition("### Exim\n")[2].partition("\n### ")[0]
    (lines,) = blocks(section, "")
    return lines


@pytest.fixture(scope="module")
def exim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exim]:
    root = tmp_path_factory.mktemp("exim") / "root"
    server = Exim(root, documented())
    yield server
    server.close()
    # hundreds of megabytes, which pytest would keep
    shutil.rmtree(root)


@pytest.fixture
def gateway(exim: Exim, start_gateway: StartGateway) -> Gateway:
    routes = [route([exim.address], identity="proxy-v2")]
    return start_gateway(exim.address, {"relay": {"routes": [*routes]}})


def test_takes_mail_as_it_was_sent_and_learns_its_client(gateway: Gateway, exim: Exim) -> None:
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.2"):
        with gateway.connect(source) as client:
            client.hello()
            assert client.submit(SENDER, ["user@example.org"], CONTENT).code == 250
    for stored in exim.wait_stored(3):
        assert stored.endswith(b"\n" + CONTENT.replace(b"\r\n", b"\n"))
        assert stored.count(b"\nAuthentication-Results: mx.example.org;") == 1
    arrived = re.findall(r" <= \S+ H=\S* ?(?:\(\S+\) )?\[([0-9.]+)\]", exim.log())
    assert sorted(arrived) == ["127.0.0.2", "127.0.0.2", "127.0.0.3"]


def test_its_refusal_of_a_recipient_is_the_clients_answer(gateway: Gateway) -> None:
    with gateway.connect("127.0.0.4") as client:
        client.hello()
        _, unknown, known = client.envelope(SENDER, ["nobody@example.org", "user@example.org"])
        assert (unknown.code, known.code) == (550, 250)


def test_without_the_header_exim_takes_nothing(start_gateway: StartGateway, exim: Exim) -> None:
    gateway = start_gateway(exim.address)
    with gateway.connect() as client:
        client.hello()
        _, reply = client.envelope(SENDER, ["user@example.org"])
        # trouble of the relay: never a 5xx
        assert reply.code == 451
