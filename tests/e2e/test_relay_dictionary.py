"""A dictionary attack through the gateway does not make Postfix, with its stock limits, punish honest mail.

Postfix counts refusals and commands without mail by connection: behind 10 errors each reply costs a second
(smtpd_soft_error_limit, smtpd_error_sleep_time), behind 20 the connection ends, and from the 101st junk command on
each is an error (smtpd_junk_command_limit). The relay's connections carry everybody's mail, so they have to retire
before. Postfix logs the counts of each connection: that none comes so far is what has to hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.gateway import Gateway, StartGateway, route
from tests.e2e.maillog import cut_connections, sessions
from tests.e2e.net import wait_until
from tests.e2e.postfix import Postfix

pytestmark = pytest.mark.e2e

REFUSED = "/^refused/ 550 5.1.1 No such user here"
SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: honest\r\n\r\nHello\r\n"

# Postfix's own (postconf -d), as the kit leaves them
SOFT_ERROR_LIMIT = 10
JUNK_COMMAND_LIMIT = 100
ERROR_SLEEP_S = 1.0

UNKNOWN = 1000


@pytest.fixture
def stock() -> Iterator[Postfix]:
    """A Postfix for one test alone: its log is that of one gateway."""
    yield from run({})


@pytest.fixture
def flowing() -> Iterator[Postfix]:
    """The same without its brake on envelopes that no message follows, which is for all clients together.

    Behind some 100 recipients that were verified it pauses before each further one until a whole message comes. No
    relay that verifies recipients can avoid that.
    """
    yield from run({"in_flow_delay": "0"})


def run(settings: dict[str, str]) -> Iterator[Postfix]:
    """The body of these fixtures."""
    server = Postfix(settings, refused=REFUSED)
    yield server
    server.close()


def attack(gateway: Gateway, source: str, rcpts: list[str], batch: int) -> int:
    """Try the recipients, `batch` of them in one write, on as many connections as it takes; how many were unknown."""
    unknown = 0
    while rcpts:
        with gateway.connect(source) as client:
            client.hello()
            assert client.command(f"MAIL FROM:<{SENDER}>").code == 250
            is_open = True
            while is_open and rcpts:
                tried = [rcpts.pop() for _ in range(min(batch, len(rcpts)))]
                client.send("".join(f"RCPT TO:<{rcpt}>\r\n" for rcpt in tried).encode())
                for _ in tried:
                    code = client.read_reply().code
                    assert code in {550, 421}, code
                    unknown += code == 550
                    if code == 421:
                        # max_unknown_recipients and max_errors: what else was sent is not answered
                        is_open = False
                        break
    return unknown


def send_mail(gateway: Gateway, rcpt: str) -> float:
    """One honest message on its own connection; how long it took in seconds."""
    began = time.monotonic()
    with gateway.connect() as client:
        client.hello()
        reply = client.submit(SENDER, [rcpt], CONTENT)
        assert reply.code == 250, reply
    return time.monotonic() - began


def check_connections(server: Postfix, gateway: Gateway, refusals: int) -> None:
    """No connection of the gateway's has come to where Postfix begins to punish. Ends the gateway."""
    gateway.stop()
    # the connections that the gateway has just closed are logged a little later
    wait_until(
        lambda: sum(ended.errors for ended in sessions(server.log())) >= refusals,
        within_s=10,
        what=f"{refusals} refusals in Postfix's log",
    )
    ended = sessions(server.log())
    assert max(session.errors for session in ended) <= SOFT_ERROR_LIMIT
    assert max(session.junk for session in ended) <= JUNK_COMMAND_LIMIT
    assert [line for line in cut_connections(server.log()) if "too many errors" in line] == []


def test_a_dictionary_attack_costs_honest_mail_nothing(
    stock: Postfix, start_gateway: StartGateway, new_rcpt: Callable[[], str]
) -> None:
    gateway = start_gateway(stock.address)
    # so many at a time: one client alone, the others pipelined
    batches = (1, 2, 5, 10)
    shares = [["refused-" + new_rcpt() for _ in range(UNKNOWN // len(batches))] for _ in batches]
    good: list[str] = []
    took_s: list[float] = []
    with ThreadPoolExecutor(len(batches)) as pool:
        running = [
            pool.submit(attack, gateway, f"127.0.1.{batch}", share, batch)
            for share, batch in zip(shares, batches, strict=True)
        ]
        while not all(attacker.done() for attacker in running) or len(good) < 10:
            good.append(new_rcpt())
            took_s.append(send_mail(gateway, good[-1]))
        unknown = sum(attacker.result() for attacker in running)
    # what a client has pipelined behind its last refusal is not answered
    assert unknown >= UNKNOWN * 0.8
    assert stock.wait_copies_of_all() == dict.fromkeys(good, 1)
    # one sleep of Postfix is longer than a whole message; the counts below say the same without a clock
    assert statistics.median(took_s) < ERROR_SLEEP_S
    check_connections(stock, gateway, unknown)


def test_a_connection_is_not_asked_for_more_refusals_than_it_has_left(
    stock: Postfix, start_gateway: StartGateway, new_rcpt: Callable[[], str]
) -> None:
    gateway = start_gateway(stock.address)
    # alone, so that all goes over one connection: 7 refusals, and then as many RCPTs as the relay writes at once
    for batch in (7, 8):
        rcpts = ["refused-" + new_rcpt() for _ in range(batch)]
        assert attack(gateway, "127.0.1.1", rcpts, batch) == batch
    check_connections(stock, gateway, 15)


@pytest.mark.full
def test_refusals_at_delivery_do_not_use_up_postfix_patience(
    stock: Postfix, start_gateway: StartGateway, new_rcpt: Callable[[], str]
) -> None:
    without = route([stock.address], verify_recipients=False)
    gateway = start_gateway(stock.address, {"relay": {"routes": [without]}})
    for _ in range(30):
        with gateway.connect() as client:
            client.hello()
            reply = client.submit(SENDER, ["refused-" + new_rcpt()], CONTENT)
            assert (reply.code, reply.enhanced) == (550, "5.1.1")
    honest = new_rcpt()
    assert send_mail(gateway, honest) < ERROR_SLEEP_S
    assert stock.wait_copies_of_all() == {honest: 1}
    check_connections(stock, gateway, 30)


@pytest.mark.full
def test_verifications_without_mail_do_not_use_up_postfix_patience(
    flowing: Postfix, start_gateway: StartGateway, new_rcpt: Callable[[], str]
) -> None:
    gateway = start_gateway(flowing.address)
    # each verification ends with RSET, and RSET is a junk command
    for _ in range(10):
        with gateway.connect() as client:
            client.hello()
            replies = client.envelope(SENDER, [new_rcpt() for _ in range(30)])
            assert {reply.code for reply in replies} == {250}
            assert client.command("QUIT").code == 221
    last = new_rcpt()
    send_mail(gateway, last)
    assert flowing.wait_copies_of_all() == {last: 1}
    check_connections(flowing, gateway, 0)
