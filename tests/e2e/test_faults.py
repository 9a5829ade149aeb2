"""Fault injection: the downstream goes wrong at each step of its dialogue, in each way.

What has to hold always (DESIGN.md sections 1 and 6): the client has 250 only when the downstream has confirmed this
message, once; trouble between us and the downstream is 4xx; the downstream's own 5xx to MAIL, RCPT, DATA or the
dot is passed on; nothing is sent twice behind the dot; and when the fault is gone, mail flows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.e2e.client import Client, Reply
from tests.e2e.downstream import Downstream, Fault, Received, Step
from tests.e2e.gateway import QUICK_RELAY, Gateway, StartGateway
from tests.e2e.net import wait_until

pytestmark = pytest.mark.e2e
full = pytest.mark.full

SENDER = "sender@client.example.net"
# Longer than what the sink takes before a fault in the body, and several of its slow reads.
CONTENT = b"From: <sender@client.example.net>\r\nSubject: fault\r\n\r\n" + b"0123456789abcdef\r\n" * 1000

OWN_REPLIES = frozenset({Step.MAIL, Step.RCPT, Step.DATA, Step.EOD})
# In the middle of the content the downstream has nothing to say; it can only go away, or be slow.
BODY_FAULTS = frozenset({Fault.CLOSE, Fault.RST, Fault.HANG, Fault.CLOSING, Fault.SLOW})

CASES = [
    (step, fault)
    for step, fault in itertools.product(Step, Fault)
    if (step is not Step.BODY or fault in BODY_FAULTS)
    and (step is Step.EOD or fault is not Fault.REPLY_THEN_CLOSE)
]


def submit(gateway: Gateway, rcpts: list[str], content: bytes = CONTENT) -> Reply:
    """One message on its own connection: the first refusal, or the reply to the content."""
    with gateway.connect() as client:
        client.hello()
        return client.submit(SENDER, rcpts, content)


def arrived(sink: Downstream, rcpt: str) -> list[Received]:
    """The confirmed messages that this recipient got."""
    return [message for message in list(sink.messages) if f"<{rcpt}>" in message.rcpts]


def check_promises(sink: Downstream, reply: Reply, rcpt: str) -> None:
    """250 means: confirmed by the downstream, once, every octet. Otherwise: never more than one attempt."""
    stored = arrived(sink, rcpt)
    if reply.code == 250:
        (message,) = stored
        assert message.content.endswith(b"\r\n" + CONTENT)
    assert len(stored) + len(sink.unconfirmed) <= 1


def expected_codes(step: Step, fault: Fault) -> set[int]:
    """What the client may get."""
    trouble = {451}
    match fault:
        case Fault.SLOW | Fault.REPLY_THEN_CLOSE:
            return {250}
        case Fault.LONG:
            # taken or not, as long as the promise holds
            return {250} | trouble
        case Fault.PERMANENT if step in OWN_REPLIES:
            return {554}
        case Fault.CLOSING:
            return {421} | trouble if step in OWN_REPLIES else trouble
    return trouble


@full
@pytest.mark.parametrize("is_known", [False, True], ids=["verify", "deliver"])
@pytest.mark.parametrize(("step", "fault"), CASES)
def test_keeps_its_promises_when_the_downstream_goes_wrong(
    step: Step, fault: Fault, is_known: bool, sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    if is_known:
        # a recipient that is remembered is not verified again: the fault meets the delivery
        assert submit(sink_gateway, [rcpt]).code == 250
    sink.behave({step: fault})
    reply = submit(sink_gateway, [rcpt])
    assert reply.code in expected_codes(step, fault), reply
    check_promises(sink, reply, rcpt)
    sink.behave()
    # a downstream that was ill may be spared for a moment
    wait_until(lambda: submit(sink_gateway, [rcpt]).code == 250, within_s=5, what="mail flows again")
    assert len(arrived(sink, rcpt)) == 1


@pytest.mark.parametrize(
    ("step", "fault", "code"),
    [
        (Step.BANNER, Fault.PERMANENT, 451),
        (Step.RCPT, Fault.PERMANENT, 554),
        (Step.BODY, Fault.RST, 451),
        (Step.EOD, Fault.CLOSE, 451),
        (Step.EOD, Fault.HANG, 451),
        (Step.EOD, Fault.TRANSIENT, 451),
        (Step.EOD, Fault.PERMANENT, 554),
    ],
)
def test_answers_as_the_fault_asks(
    step: Step, fault: Fault, code: int, sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    sink.behave({step: fault})
    reply = submit(sink_gateway, [rcpt])
    assert reply.code == code, reply
    assert arrived(sink, rcpt) == []


@full
def test_passes_on_the_text_of_a_refusal_as_one_printable_line(
    sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    sink.refused_rcpts = {f"<{rcpt}>": "550-5.1.1 No\x07 such\xe9\r\n550 5.1.1 user" + "!" * 2000}
    reply = submit(sink_gateway, [rcpt])
    assert (reply.code, reply.enhanced) == (550, "5.1.1")
    # RFC 5321 4.5.3.1.5: a reply line has at most 512 octets with its CRLF
    assert all(len(line) <= 510 and line.isprintable() for line in reply.lines)


@full
@pytest.mark.parametrize("is_known", [False, True], ids=["verify", "deliver"])
def test_defers_while_the_downstream_refuses_connections(
    is_known: bool, sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    if is_known:
        assert submit(sink_gateway, [rcpt]).code == 250
    sink.down()
    try:
        assert submit(sink_gateway, [rcpt]).code == 451
    finally:
        sink.up()
    sink.behave()
    wait_until(lambda: submit(sink_gateway, [rcpt]).code == 250, within_s=5, what="mail flows again")


@full
def test_becomes_ready_without_a_downstream(start_gateway: StartGateway, sink: Downstream, rcpt: str) -> None:
    # DESIGN.md section 7: an ill downstream is no reason to be unready
    sink.down()
    try:
        gateway = start_gateway(sink.address, {"relay": {**QUICK_RELAY}})
        assert submit(gateway, [rcpt]).code == 451
        assert gateway.admin_status("/readyz") == 200
    finally:
        sink.up()
    wait_until(lambda: submit(gateway, [rcpt]).code == 250, within_s=10, what="mail flows")


@full
def test_delivers_to_a_downstream_without_extensions(start_gateway: StartGateway, rcpt: str) -> None:
    sink = Downstream(extensions=())
    try:
        gateway = start_gateway(sink.address)
        assert submit(gateway, [rcpt]).code == 250
        assert arrived(sink, rcpt)[0].mail_from == f"<{SENDER}>"
        announced = {text.split(" ")[0] for text in gateway.ehlo_lines()}
        assert announced.isdisjoint({"SMTPUTF8", "DSN", "8BITMIME"})
    finally:
        sink.close()


@full
def test_passes_on_the_parameters_that_the_downstream_knows(
    sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    sink_gateway.wait_announces("DSN")
    with sink_gateway.connect() as client:
        client.hello()
        mail = client.command(f"MAIL FROM:<{SENDER}> BODY=8BITMIME RET=HDRS ENVID=QQ314159")
        to = client.command(f"RCPT TO:<{rcpt}> NOTIFY=FAILURE,DELAY ORCPT=rfc822;User@example.org")
        assert (mail.code, to.code, client.data(CONTENT).code) == (250, 250, 250)
    path, *parameters = sink.wait_for_message().mail_from.split(" ")
    assert path == f"<{SENDER}>"
    assert {"BODY=8BITMIME", "RET=HDRS", "ENVID=QQ314159"} <= set(parameters)
    assert f"<{rcpt}> NOTIFY=FAILURE,DELAY ORCPT=rfc822;User@example.org" in sink.messages[0].rcpts


# --- refusals that come between RCPT and delivery -------------------------------------------------------


def test_defers_the_message_when_some_recipients_are_refused_meanwhile(
    sink_gateway: Gateway, sink: Downstream, new_rcpt: Callable[[], str]
) -> None:
    good, bad = new_rcpt(), new_rcpt()
    assert submit(sink_gateway, [good, bad]).code == 250
    sink.behave()
    sink.refused_rcpts = {f"<{bad}>": "550 5.1.1 Gone"}
    assert submit(sink_gateway, [good, bad]).code == 451
    assert sink.messages == []
    assert sink.unconfirmed == []
    # what was remembered is forgotten: at the retry the downstream is asked again, and its answer is given at RCPT
    with sink_gateway.connect() as client:
        client.hello()
        replies = client.envelope(SENDER, [good, bad])
        assert [reply.code for reply in replies] == [250, 250, 550]
        assert replies[2].enhanced == "5.1.1"
        assert client.data(CONTENT).code == 250
    assert [message.rcpts for message in sink.messages] == [(f"<{good}>",)]


@full
def test_passes_on_the_refusal_when_all_recipients_are_refused_meanwhile(
    sink_gateway: Gateway, sink: Downstream, new_rcpt: Callable[[], str]
) -> None:
    rcpts = [new_rcpt(), new_rcpt()]
    assert submit(sink_gateway, rcpts).code == 250
    sink.behave()
    sink.refused_rcpts = {f"<{rcpt}>": "550 5.1.1 Gone" for rcpt in rcpts}
    reply = submit(sink_gateway, rcpts)
    assert (reply.code, reply.enhanced) == (550, "5.1.1")
    assert sink.messages == []


# --- the client goes wrong --------------------------------------------------------------------------------


def begin_content(client: Client, rcpt: str) -> None:
    """A transaction up to 354."""
    client.hello()
    assert [reply.code for reply in client.envelope(SENDER, [rcpt])] == [250, 250]
    assert client.command("DATA").code == 354


def test_delivers_once_when_the_client_leaves_behind_the_dot(
    sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    sink.behave({Step.EOD: Fault.SLOW})
    with sink_gateway.connect() as client:
        begin_content(client, rcpt)
        client.send(CONTENT + b".\r\n")
        # the downstream has the dot and takes its time for the answer; then the client goes
        wait_until(lambda: sink.dots, within_s=5, what="the dot at the downstream")
    sink.wait_for_message()
    assert submit(sink_gateway, [rcpt]).code == 250
    assert len(arrived(sink, rcpt)) == 2
    assert sink.unconfirmed == []


def test_sends_nothing_when_the_client_leaves_before_the_dot(
    sink_gateway: Gateway, sink: Downstream, new_rcpt: Callable[[], str]
) -> None:
    lost, later = new_rcpt(), new_rcpt()
    with sink_gateway.connect() as client:
        begin_content(client, lost)
        client.send(CONTENT)
    assert submit(sink_gateway, [later]).code == 250
    assert [message.rcpts for message in sink.messages] == [(f"<{later}>",)]
    assert sink.unconfirmed == []
