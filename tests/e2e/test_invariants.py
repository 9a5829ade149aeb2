"""What the gateway keeps by default: one test for each invariant of SECURITY.md, from outside, with the real program.

They show that each holds where all parts are together; the table in SECURITY.md names the tests of the parts.
"""

from __future__ import annotations

import re
import ssl
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.chaos import ChaoticDns, DnsMood
from tests.e2e.client import Client, Reply
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import HOSTNAME, QUICK_RELAY, Config, Gateway, StartGateway, shared_gateway
from tests.e2e.net import wait_until
from tests.e2e.redis import RedisServer

pytestmark = pytest.mark.e2e

SENDER, RCPT = "sender@client.example.net", "ann@example.org"
FIELDS = b"From: <sender@client.example.net>\r\nSubject: x\r\n"
CONTENT = FIELDS + b"\r\nHello\r\n"


@pytest.fixture(scope="module")
def gate(shared_sink: Downstream, tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    overrides: Config = {
        "server": {
            **tls.server_section(),
            "max_message_bytes": 400_000,
            "max_recipients": 5,
            "max_errors": 5,
            "max_commands_without_mail": 30,
            "max_unknown_recipients": 4,
        },
        "relay": {**QUICK_RELAY},
        "policy": {"dmarc": {"settings": {"on_bad_from": "reject"}}},
    }
    yield from shared_gateway(shared_sink.address, overrides, tmp_path_factory.mktemp("gate"))


def bring(gateway: Gateway, content: bytes = CONTENT) -> Reply:
    """One message on its own connection."""
    with gateway.connect() as client:
        client.hello()
        return client.submit(SENDER, [RCPT], content)


def in_content(gateway: Gateway) -> Client:
    """A client whose content is awaited."""
    client = gateway.connect()
    client.hello()
    client.envelope(SENDER, [RCPT])
    assert client.command("DATA").code == 354
    return client


def codes_until_close(client: Client) -> list[int]:
    """The codes of what still comes."""
    codes = []
    try:
        while True:
            codes.append(client.read_reply().code)
    except ConnectionError:
        return codes


LOOK_ALIKES = [
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r\n.\r",
    b"\r.\r\n",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
]


@pytest.mark.parametrize("end", LOOK_ALIKES)
def test_invariant_1_only_crlf_dot_crlf_ends_data(end: bytes, gate: Gateway, sink: Downstream) -> None:
    with in_content(gate) as client:
        client.send(CONTENT + b"a" + end + b"MAIL FROM:<smuggled@example.net>\r\nQUIT\r\n\r\n.\r\n")
        reply = client.read_reply()
        assert (reply.code, reply.enhanced) == (550, "5.5.2")
        assert client.is_at_eof()
    assert sink.dots == 0


def test_invariant_2_lines_are_bounded(gate: Gateway, sink: Downstream) -> None:
    with gate.connect() as client:
        client.hello()
        client.send(b"NOOP " + b"x" * 3000 + b"\r\n")
        assert client.read_reply().code == 500
        client.send(b"NOOP " + b"x" * 3000 + b"\r\n")
        codes_until_close(client)
    assert bring(gate, FIELDS + b"\r\n" + b"x" * 8000 + b"\r\n").code == 250
    assert sink.messages[0].content.endswith(b"\r\n" + b"x" * 8000 + b"\r\n")
    assert bring(gate, FIELDS + b"\r\n" + b"x" * 9000 + b"\r\n").code == 554


@pytest.mark.parametrize(
    "fields",
    [
        b"X: " + b"x" * 997 + b"\r\n" + (b" " + b"x" * 997 + b"\r\n") * 270,
        b"X: y\r\n" * 1001,
        b"X: y\r\n" + b" z\r\n" * 1001,
        b"x" * 78 + b": y\r\n",
    ],
    ids=["octets", "fields", "continuations", "name"],
)
def test_invariant_3_headers_are_bounded(fields: bytes, gate: Gateway, sink: Downstream) -> None:
    reply = bring(gate, FIELDS + fields + b"\r\nHello\r\n")
    assert (reply.code, reply.enhanced) == (554, "5.6.0")
    assert sink.dots == 0


def test_invariant_4_messages_are_bounded(gate: Gateway, sink: Downstream) -> None:
    with gate.connect() as client:
        assert "SIZE 400000" in client.hello().texts
        assert client.command(f"MAIL FROM:<{SENDER}> SIZE=400001").code == 552
    assert bring(gate, CONTENT + b"0123456789abcdef\r\n" * 40_000).code == 552
    assert sink.dots == 0


def test_invariant_5_recipients_errors_and_commands_are_bounded(gate: Gateway, sink: Downstream) -> None:
    sink.refused_rcpts = {f"<no-{number}@example.org>": "550 5.1.1 No such user" for number in range(10)}
    with gate.connect() as client:
        client.hello()
        replies = client.envelope(SENDER, [f"ann-{number}@example.org" for number in range(6)])[1:]
        assert [reply.code for reply in replies] == [250] * 5 + [452]
        assert replies[-1].enhanced == "4.5.3"
    for command, most in (("NONSENSE", 5), ("NOOP", 30)):
        with gate.connect() as client:
            client.hello()
            client.send(f"{command}\r\n".encode() * 100)
            assert codes_until_close(client)[-1] == 421
            assert most <= 30
    with gate.connect() as client:
        client.hello()
        client.send(f"MAIL FROM:<{SENDER}>\r\n".encode())
        assert client.read_reply().code == 250
        client.send(b"".join(f"RCPT TO:{rcpt}\r\n".encode() for rcpt in sink.refused_rcpts))
        assert codes_until_close(client)[-1] == 421


def any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_invariant_6_nothing_before_tls_counts_after_it(gate: Gateway, sink: Downstream) -> None:
    with gate.connect() as client:
        client.hello()
        client.send(b"STARTTLS\r\nMAIL FROM:<injected@example.net>\r\n")
        assert all(code < 300 or code >= 500 for code in codes_until_close(client))
    with gate.connect() as client:
        client.hello()
        assert client.command(f"MAIL FROM:<{SENDER}>").code == 250
        assert client.command("STARTTLS").code == 503
        assert client.command("RSET").code == 250
        assert client.command("STARTTLS").code == 220
        client.start_tls(any_certificate())
        # who has not said EHLO since then has said nothing
        assert client.command(f"MAIL FROM:<{SENDER}>").code == 503
        assert client.command("EHLO client.example.net").code == 250
        assert client.command("STARTTLS").code == 503
    with gate.connect() as client:
        client.hello()
        assert client.command("STARTTLS").code == 220
        old = any_certificate()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)):
            client.start_tls(old)


def test_invariant_7_who_talks_out_of_turn_or_speaks_another_protocol_is_refused(
    gate: Gateway, sink: Downstream, start_gateway: StartGateway
) -> None:
    with gate.connect() as client:
        client.read_reply()
        commands = ["XCLIENT ADDR=192.0.2.1", "TURN", "ETRN x", "EXPN x"]
        assert {client.command(command).code // 100 for command in commands} == {5}
    with gate.connect() as client:
        client.hello()
        assert client.command("VRFY ann").code == 252
    with gate.connect() as client:
        client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n")
        assert 250 not in codes_until_close_or_quit(client)
    delayed = start_gateway(sink.address, {"server": {"greeting_delay_s": 0.5}})
    with delayed.connect() as client:
        client.send(b"EHLO client.example.net\r\n")
        assert codes_until_close(client) == [554]
    with delayed.connect() as client:
        assert client.hello().code == 250
        client.send(
            f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{RCPT}>\r\nDATA\r\nSubject: unauthorised\r\n\r\n.\r\n".encode()
        )
        assert codes_until_close(client) == [250, 250, 554]


def codes_until_close_or_quit(client: Client) -> list[int]:
    client.send(b"QUIT\r\n")
    return codes_until_close(client)


def test_invariant_8_whoever_is_slow_is_not_waited_for(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(
        sink.address, {"server": {"command_timeout_s": 1, "idle_timeout_s": 1, "data_timeout_s": 1}}
    )
    with ExitStack() as stack:
        idle, command, content = (stack.enter_context(gateway.connect()) for _ in range(3))
        for client in (idle, command, content):
            client.hello()
        command.send(b"NOO")
        content.send(f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{RCPT}>\r\nDATA\r\n".encode())
        for client in (idle, command):
            assert codes_until_close(client) == [421]
        assert codes_until_close(content) == [250, 250, 354, 421]
    assert sink.dots == 0


def test_invariant_9_connections_are_bounded(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address, {"server": {"max_connections": 4, "max_connections_per_client": 2}})
    with ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect(f"127.0.0.{number}")) for number in (2, 2, 2, 3, 3, 4)]
        replies = [client.read_reply() for client in clients]
        assert [reply.code for reply in replies] == [220, 220, 421, 220, 220, 421]
        assert {reply.enhanced for reply in replies if reply.code == 421} == {"4.7.0"}


def test_invariant_10_evaluation_is_bounded(start_gateway: StartGateway, sink: Downstream) -> None:
    """A chain of includes without end; tests/policies/verify has each limit."""
    names = ChaoticDns()
    try:
        names.records = {
            f"i{number}.example.net": f"v=spf1 include:i{number + 1}.example.net -all" for number in range(60)
        }
        gateway = start_gateway(
            sink.address, {"dns": {"nameservers": [f"{names.address[0]}:{names.address[1]}"]}}
        )
        with gateway.connect() as client:
            client.hello()
            content = b"From: <a@i0.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
            assert client.submit("a@i0.example.net", [RCPT], content).code == 250
        assert b"spf=permerror" in sink.messages[0].content
        asked = [name for name in names.asked if re.fullmatch(r"i\d+\.example\.net", name)]
        assert 2 < len(set(asked)) <= 11
        assert len(names.asked) <= 40
    finally:
        names.close()


BAD_AUTHORS = [
    b"",
    b"From: <a@example.net>\r\nFrom: <b@example.net>\r\n",
    b"From: <a@example.net>\r\nFrom : <b@example.net>\r\n",
    b"From: \r\n",
    b"From: =?utf-8?q?=3Ca=40example=2Enet=3E?=\r\n",
    b"From: <@route.example:a@example.net>\r\n",
    b"From: group: a@example.net;\r\n",
    b"From: a\xff@example.net\r\n",
]


@pytest.mark.parametrize("field", BAD_AUTHORS)
def test_invariant_11_the_author_is_one_address_or_the_mail_is_refused(
    field: bytes, gate: Gateway, sink: Downstream
) -> None:
    reply = bring(gate, field + b"Subject: x\r\n\r\nHello\r\n")
    assert reply.code == 550, reply
    assert sink.dots == 0


def test_invariant_12_only_our_own_results_are_ours(gate: Gateway, sink: Downstream) -> None:
    foreign = b"Authentication-Results: elsewhere.example.com; dmarc=pass header.from=bank.example.net\r\n"
    forged = b"".join(
        b"%b: %b; dmarc=pass header.from=bank.example.net\r\n" % (name, identity)
        for name in (b"Authentication-Results", b"AUTHENTICATION-RESULTS ")
        for identity in (b"mx.example.org", b"MX.Example.ORG", b"(x) mx.example.org.", b'"mx.example.org" 1')
    )
    assert bring(gate, forged + foreign + b"Received-SPF: pass\r\n" + CONTENT).code == 250
    (message,) = sink.messages
    head = message.content.partition(b"\r\n\r\n")[0]
    assert head.startswith(f"Authentication-Results: {HOSTNAME};".encode())
    assert head.lower().count(b"mx.example.org; ") + head.lower().count(b"mx.example.org;\r\n") <= 1
    assert b"dmarc=pass header.from=bank.example.net" in foreign
    assert head.count(b"bank.example.net") == 1
    assert foreign in head + b"\r\n"
    assert b"Received-SPF" not in head


@pytest.mark.parametrize(
    "path",
    [
        "<(a@example.net>",
        "<a@b@example.net>",
        "<a@example.net",
        "<a b@example.net>",
        "<a@-x.example.net>",
        "<ü@example.net>",
    ],
)
def test_invariant_13_what_is_no_mailbox_is_refused_at_mail(path: str, gate: Gateway) -> None:
    with gate.connect() as client:
        client.hello()
        client.send(f"MAIL FROM:{path}\r\n".encode())
        assert client.read_reply().code // 100 == 5


@pytest.mark.parametrize("mood", [DnsMood.SILENT, DnsMood.SERVFAIL, DnsMood.GARBAGE, DnsMood.CUT])
def test_invariant_14_temporary_trouble_is_neither_a_refusal_nor_a_pass(
    mood: DnsMood, start_gateway: StartGateway, sink: Downstream
) -> None:
    names = ChaoticDns()
    try:
        dns: Config = {
            "nameservers": [f"{names.address[0]}:{names.address[1]}"],
            "timeout_s": 0.5,
            "total_timeout_s": 2,
        }
        gateway = start_gateway(sink.address, {"dns": {**dns}})
        names.mood = mood
        with gateway.connect() as client:
            client.hello()
            content = b"From: <a@d1.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
            reply = client.submit("a@d1.example.net", [RCPT], content)
        assert reply.code in (250, 451)
        assert not any(word in message.content for message in sink.messages for word in (b"=pass", b"=fail"))
    finally:
        names.close()


@pytest.mark.parametrize("step", [Step.BANNER, Step.EHLO, Step.EOD])
@pytest.mark.parametrize("fault", [Fault.PERMANENT, Fault.CLOSE, Fault.GARBAGE])
def test_invariant_15_250_is_the_downstreams_and_its_trouble_is_451(
    step: Step, fault: Fault, gate: Gateway, sink: Downstream
) -> None:
    sink.behave({step: fault})
    reply = bring(gate)
    assert reply.code == (554 if (step, fault) == (Step.EOD, Fault.PERMANENT) else 451)
    assert sink.messages == []
    sink.behave()
    wait_until(lambda: bring(gate).code == 250, within_s=10, what="mail flows again")


def test_invariant_16_what_is_stored_while_the_client_leaves_is_not_sent_again(
    gate: Gateway, sink: Downstream
) -> None:
    sink.behave({Step.EOD: Fault.SLOW})
    with in_content(gate) as client:
        client.send(CONTENT + b".\r\n")
        wait_until(lambda: sink.dots == 1, within_s=10, what="the dot")
    wait_until(lambda: len(sink.messages) == 1, within_s=10, what="it is stored")
    sink.behave()
    assert bring(gate).code == 250
    assert len(sink.messages) == 1
    assert sink.unconfirmed == []


def test_invariant_17_one_message_or_policy_takes_no_other_down(
    start_gateway: StartGateway, sink: Downstream, tmp_path: Path
) -> None:
    policy = tmp_path / "broken.py"
    policy.write_text(
        textwrap.dedent("""
            import asyncio, sys
            from gateway.api import Policy, proceed

            class Broken(Policy):
                name = "broken"

                async def on_mail(self, tx):
                    match tx.envelope.mail_from.local:
                        case "raise":
                            raise ValueError
                        case "hang":
                            await asyncio.sleep(600)
                        case "nonsense":
                            return 7
                        case "recurse":
                            def again():
                                return again()
                            again()
                        case "cancel":
                            asyncio.current_task().cancel()
                            await asyncio.sleep(0)
                    return proceed()
        """)
    )
    section: Config = {"file": str(policy), "mode": "enforce", "timeout_s": 0.5}
    gateway = start_gateway(sink.address, {"policy": {"broken": {**section}}})
    (pid,) = gateway.worker_pids()
    with gateway.connect() as other, gateway.connect() as client:
        other.hello()
        client.hello()
        for way in ("raise", "hang", "nonsense", "recurse", "cancel", "well"):
            assert client.submit(f"{way}@example.net", [RCPT], CONTENT).code == 250, way
            assert other.submit("well@example.net", [RCPT], CONTENT).code == 250
    assert gateway.worker_pids() == [pid]


def test_invariant_18_every_key_ends_and_no_store_is_needed_to_start(
    start_gateway: StartGateway, sink: Downstream
) -> None:
    redis = RedisServer()
    try:
        greylist: Config = {"mode": "enforce", "settings": {"delay_s": 1}}
        gateway = start_gateway(
            sink.address, {"state": {"url": redis.url}, "policy": {"greylist": {**greylist}}}
        )
        assert bring(gateway).code == 451
        endless = (
            "local n = 0 for _, k in ipairs(redis.call('KEYS', '*')) do if redis.call('TTL', k) <= 0 then "
        )
        endless += "return k end n = n + 1 end return 'of ' .. n .. ' keys none is endless'"
        assert re.search(r"of [1-9]\d* keys none is endless", redis.ask("EVAL", endless, 0))
        redis.kill()
        without = start_gateway(
            sink.address, {"state": {"url": redis.url}, "policy": {"greylist": {**greylist}}}
        )
        assert bring(without).code == 451
        wait_until(lambda: bring(without).code == 250, within_s=10, what="greylisting goes on without it")
    finally:
        redis.close()
