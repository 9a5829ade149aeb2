"""The kit itself, without the gateway: a partner that does not do what it says would make the other tests empty."""

from __future__ import annotations

import smtplib
from collections.abc import Callable

import pytest

from tests.e2e.client import Client, stuff
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import Config, config_for, to_toml
from tests.e2e.net import free_port, is_listening
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


def test_overrides_are_merged_into_sections() -> None:
    overrides: Config = {"server": {"workers": 2}, "log": {"format": "console"}}
    toml = to_toml(config_for(("127.0.0.1", free_port()), overrides=overrides))
    assert 'hostname = "mx.example.org"\n' in toml
    assert "workers = 2\n" in toml
    assert '[log]\nformat = "console"\n' in toml
