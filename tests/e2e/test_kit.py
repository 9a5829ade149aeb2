"""The kit itself, without the gateway: a partner that does not do what it says would make the other tests empty."""

from __future__ import annotations

import smtplib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.client import Client, stuff
from tests.e2e.dovecot import Dovecot
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import Config, config_for, route, to_toml
from tests.e2e.haproxy import HAProxy
from tests.e2e.maillog import clients_of, cut_connections, sessions
from tests.e2e.net import free_port, is_listening, wait_until
from tests.e2e.postfix import Postfix, behind_our_fields

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
OUR_RECEIVED = (
    b"Received: from client.example.net ([127.0.0.1])\r\n\tby mx.example.org (mxgate) with ESMTP id 1\r\n"
)
CONTENT = (
    b"Received: by client.example.net\r\nTO: <a@example.org>\r\n\r\n.\r\n..\r\n\xe9 \r\n"
    + b"x" * 8000
    + b"\r\n"
)


def test_postfix_stores_the_content_that_it_got(postfix: Postfix, rcpt: str) -> None:
    with smtplib.SMTP(*postfix.address, timeout=15) as client:
        client.sendmail(SENDER, [rcpt], OUR_RECEIVED + CONTENT)
    assert postfix.wait_content(rcpt) == CONTENT


def test_postfix_refuses_what_it_is_told_to_refuse(postfix: Postfix, new_rcpt: Callable[[], str]) -> None:
    with Client(postfix.address) as client:
        client.hello()
        replies = client.envelope(SENDER, ["refused-" + new_rcpt(), new_rcpt(), "user@foreign.example"])
    assert [reply.code for reply in replies] == [250, 550, 250, 554]


# --- Postfix's limits are its own, and its log tells of them ------------------------------------------------


@pytest.mark.full
def test_postfix_slows_a_client_with_many_refusals(postfix: Postfix, new_rcpt: Callable[[], str]) -> None:
    with Client(postfix.address) as client:
        client.hello()
        # smtpd_soft_error_limit: 10 errors are free, then each costs smtpd_error_sleep_time
        client.envelope(SENDER, ["refused-" + new_rcpt() for _ in range(10)])
        began = time.monotonic()
        client.command(f"RCPT TO:<refused-{new_rcpt()}>")
        assert time.monotonic() - began >= 1
        client.command("QUIT")
    wait_until(
        lambda: [ended for ended in sessions(postfix.log()) if ended.errors == 11],
        within_s=5,
        what="a connection with 11 errors in the log",
    )


@pytest.mark.full
def test_postfix_punishes_junk_commands(postfix: Postfix) -> None:
    with Client(postfix.address) as client:
        client.hello()
        # smtpd_junk_command_limit: 100 are free, then each is an error, and smtpd_hard_error_limit is 20; the first
        # 10 of them come before the sleep of smtpd_error_sleep_time
        codes = [client.command("RSET").code for _ in range(109)]
        assert set(codes) == {250}
        client.send(b"RSET\r\n" * 11)
        began = time.monotonic()
        assert client.read_reply().code == 250
        assert client.read_reply().code == 250
        assert time.monotonic() - began >= 1
    wait_until(
        lambda: [ended for ended in sessions(postfix.log()) if ended.junk > 100],
        within_s=30,
        what="a connection with more than 100 junk commands in the log",
    )
    assert cut_connections(postfix.log())


# --- Postfix comes and goes -----------------------------------------------------------------------------------


def test_postfix_can_be_killed_and_started_again(rcpt: str) -> None:
    server = Postfix()
    try:
        with smtplib.SMTP(*server.address, timeout=15) as client:
            client.sendmail(SENDER, [rcpt], CONTENT)
        server.kill()
        assert not is_listening(server.address)
        server.start()
        assert server.wait_copies_of_all() == {rcpt: 1}
    finally:
        server.close()


def test_postfix_can_be_made_to_hang(rcpt: str) -> None:
    server = Postfix()
    try:
        server.freeze()
        with Client(server.address, timeout_s=0.3) as client, pytest.raises(TimeoutError):
            client.read_reply()
        server.thaw()
        with smtplib.SMTP(*server.address, timeout=15) as client:
            client.sendmail(SENDER, [rcpt], CONTENT)
        server.wait_stored(rcpt)
    finally:
        server.close()


# --- who the client was -----------------------------------------------------------------------------------------


def test_postfix_logs_the_client_that_xclient_names(new_rcpt: Callable[[], str]) -> None:
    networks = "127.0.0.0/8"
    server = Postfix(
        {"smtpd_authorized_xclient_hosts": networks, "smtpd_authorized_xforward_hosts": networks}
    )
    by_address, forwarded = new_rcpt(), new_rcpt()
    try:
        with Client(server.address, source="127.0.0.9") as client:
            client.hello()
            assert client.command("XFORWARD ADDR=127.0.0.8 IDENT=tx1").code == 250
            assert client.submit(SENDER, [forwarded], CONTENT).code == 250
            assert (
                client.command("XCLIENT ADDR=127.0.0.2 NAME=[UNAVAILABLE] HELO=two.example.net").code == 220
            )
            # this name replaces what XCLIENT said
            assert client.command("EHLO two.example.net").code == 250
            assert client.submit(SENDER, [by_address], CONTENT).code == 250
        clients = wait_until(
            lambda: len(found := clients_of(server.log())) == 2 and found,
            within_s=10,
            what="two lines of log",
        )
        assert clients
        named, was_forwarded = clients[by_address], clients[forwarded]
        assert named.address == "127.0.0.2"
        assert (was_forwarded.address, was_forwarded.original_address) == ("127.0.0.9", "127.0.0.8")
        assert was_forwarded.original_queue_id == "tx1"
        assert b"from two.example.net (unknown [127.0.0.2])" in server.wait_stored(by_address)
    finally:
        server.close()


def test_haproxy_and_postfix_read_the_proxy_header(rcpt: str, tmp_path: Path) -> None:
    server = Postfix({"smtpd_upstream_proxy_protocol": "haproxy"})
    haproxy = HAProxy(server.address, tmp_path)
    try:
        with Client(haproxy.address) as client:
            client.send(b"PROXY TCP4 127.0.0.7 127.0.0.1 4711 25\r\n")
            client.hello()
            assert client.submit(SENDER, [rcpt], CONTENT).code == 250
        assert haproxy.clients() == {"127.0.0.7"}
        wait_until(lambda: clients_of(server.log()), within_s=10, what="Postfix's log")
        assert clients_of(server.log())[rcpt].address == "127.0.0.7"
    finally:
        haproxy.close()
        server.close()


# --- the other servers --------------------------------------------------------------------------------------------


def test_dovecot_stores_for_the_users_that_it_knows() -> None:
    server = Dovecot(["ann@example.org", "ben@example.org"])
    try:
        with smtplib.LMTP(*server.address) as client:
            client.ehlo()
            rcpts = ["ann@example.org", "nobody@example.org"]
            refused = client.sendmail(SENDER, rcpts, OUR_RECEIVED + CONTENT)
        assert {rcpt: reply[0] for rcpt, reply in refused.items()} == {"nobody@example.org": 550}
        assert server.contents_for("ann@example.org") == [CONTENT]
        assert server.stored_for("ben@example.org") == []
    finally:
        server.close()


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_received_field_of_ours_is_asked_for(count: int) -> None:
    stored = (b"Delivered-To: a@example.org\r\n" + OUR_RECEIVED * count + CONTENT).replace(b"\r\n", b"\n")
    with pytest.raises(AssertionError, match=f"^{count} Received fields"):
        behind_our_fields(stored)


def test_the_sink_records_exact_octets(sink: Downstream) -> None:
    with Client(sink.address) as client:
        client.hello()
        assert client.submit(SENDER, ["a@example.org", "b@example.org"], CONTENT).code == 250
    (message,) = sink.messages
    assert message.content == CONTENT
    assert message.wire == stuff(CONTENT)
    assert message.rcpts == ("<a@example.org>", "<b@example.org>")


def test_the_sink_records_an_empty_message(sink: Downstream) -> None:
    with Client(sink.address) as client:
        client.hello()
        assert client.submit(SENDER, ["a@example.org"], b"").code == 250
    assert [message.content for message in sink.messages] == [b""]


@pytest.mark.full
@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in {Fault.SLOW, Fault.LONG}])
def test_the_sink_stores_nothing_when_it_goes_wrong(step: Step, fault: Fault, sink: Downstream) -> None:
    is_kind = fault is Fault.REPLY_THEN_CLOSE and step is Step.EOD
    sink.behave({step: fault})
    try:
        with Client(sink.address, timeout_s=0.3) as client:
            client.hello()
            code = client.submit(SENDER, ["a@example.org"], CONTENT).code
    except (AssertionError, OSError):
        # no connection, no reply, or no good one
        code = 0
    assert (code == 250) is is_kind
    assert len(sink.messages) == int(is_kind)


@pytest.mark.parametrize("fault", [Fault.SLOW, Fault.LONG])
def test_the_sink_stores_the_message_when_it_is_only_unkind(fault: Fault, sink: Downstream) -> None:
    sink.behave({Step.MAIL: fault, Step.EOD: fault})
    with Client(sink.address) as client:
        client.hello()
        assert client.submit(SENDER, ["a@example.org"], CONTENT).code == 250
    assert len(sink.messages) == 1


def test_the_sink_refuses_connections_while_it_is_down(sink: Downstream) -> None:
    sink.down()
    assert not is_listening(sink.address)
    sink.up()
    assert is_listening(sink.address)


def test_routes_are_written_flat_or_in_groups() -> None:
    first, second = ("127.0.0.1", 1), ("127.0.0.1", 2)
    flat, grouped = route([first, second]), route([first], [second], identity="xclient")
    toml = to_toml({"relay": {"routes": [flat, grouped]}})
    assert '"downstream" = ["127.0.0.1:1", "127.0.0.1:2"]' in toml
    assert '"downstream" = [["127.0.0.1:1"], ["127.0.0.1:2"]], "identity" = "xclient"' in toml


def test_overrides_are_merged_into_sections() -> None:
    overrides: Config = {"server": {"workers": 2}, "log": {"format": "console"}}
    toml = to_toml(config_for(("127.0.0.1", free_port()), overrides=overrides))
    assert 'hostname = "mx.example.org"\n' in toml
    assert "workers = 2\n" in toml
    assert '[log]\nformat = "console"\n' in toml
