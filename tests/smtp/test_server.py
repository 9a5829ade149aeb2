"""The receiving state machine: order, limits, pipelining, and the same events for every split of the stream."""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.session import Envelope, Recipient
from gateway.smtp import reply
from gateway.smtp.command import Extension
from gateway.smtp.content import Fault
from gateway.smtp.reply import Reply
from gateway.smtp.sasl import Credentials
from gateway.smtp.server import MAX_REFUSED, MAX_SMALL_CHUNKS, Extensions, Phase, Server, ServerSettings

SETTINGS = ServerSettings("mx.example.org", max_message_bytes=5000, max_recipients=5, has_tls=True)
OFFERED = Extensions(5000, frozenset(Extension))
DENIED = Reply(550, "5.7.1", "Denied")
LATER = Reply(450, "4.2.0", "Later")
UNKNOWN = Reply(550, "5.1.1", "Unknown")


class Driver:
    """Answers at once, and writes down what happened."""

    def __init__(self, settings: ServerSettings = SETTINGS, **options: Any) -> None:
        self.counted: defaultdict[int, int] = defaultdict(int)
        self.commands: defaultdict[str, int] = defaultdict(int)
        self.server = Server(settings, self, self.counted, self.commands, **options)
        self.groups: list[int] = []  # of RCPTs that came together
        self.output = b""
        self.kept = b""
        self.contents: list[bytes] = []
        self.closed: str | None = None
        self.server.open()
        self.output = self.server.take_output()

    def send(self, data: bytes) -> "Driver":
        self.server.receive(data)
        self.output += self.server.take_output()
        return self

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        self.server.greet(OFFERED if esmtp else None)

    def auth(self, credentials: Credentials) -> None:
        is_right = (credentials.user, credentials.password) == ("ann@example.org", "secret")
        self.server.answer_auth(reply.AUTH_OK if is_right else reply.AUTH_REFUSED)

    def mail(self, envelope: Envelope) -> None:
        denied = envelope.mail_from is not None and envelope.mail_from.local == "denied"
        self.server.answer(DENIED if denied else reply.SENDER_OK)

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        self.groups.append(len(rcpts))
        answers = [UNKNOWN if r.mailbox.local == "unknown" else reply.RECIPIENT_OK for r in rcpts]
        self.server.answer_rcpts(answers, unknown=answers.count(UNKNOWN))

    def content_begins(self, *, is_stuffed: bool) -> None:
        self.kept = b""
        self.server.accept_content()

    def content(self, block: bytes) -> None:
        self.kept += block

    def content_ends(self, fault: Fault | None) -> None:
        if fault is None:
            self.contents.append(self.kept)
        self.server.answer(fault.reply if fault else reply.OK, close=bool(fault and fault.closes))

    def starttls(self) -> None:
        self.server.tls_started()

    def reset(self) -> None:
        self.kept = b""

    def closing(self, reason: str) -> None:
        assert self.closed is None
        self.closed = reason

    @property
    def codes(self) -> list[int]:
        """The codes of the replies in order, without the banner's."""
        return [int(code) for code in re.findall(rb"^(\d{3}) ", self.output, re.MULTILINE)][1:]


def dialogue(*lines: bytes, **options: Any) -> Driver:
    driver = Driver(**options)
    for line in lines:
        driver.send(line + b"\r\n")
    return driver


HELLO = b"EHLO client.example"
MAIL = b"MAIL FROM:<a@client.example>"
RCPT = b"RCPT TO:<b@example.org>"


def test_a_message_from_greeting_to_quit() -> None:
    driver = dialogue(HELLO, MAIL, RCPT, b"DATA", b"Subject: x\r\n\r\nhi\r\n.", b"QUIT")

    assert driver.codes == [250, 250, 250, 354, 250, 221]
    assert driver.counted == {220: 1, 250: 4, 354: 1, 221: 1}
    assert driver.commands == {"EHLO": 1, "MAIL": 1, "RCPT": 1, "DATA": 1, "QUIT": 1}
    assert driver.contents == [b"Subject: x\r\n\r\nhi\r\n"]
    assert driver.closed == "quit"


def test_ehlo_tells_that_recipients_of_several_routes_do_not_go_together() -> None:
    alone = dialogue(b"EHLO c.example")
    grouped = dialogue(b"EHLO c.example", settings=replace(SETTINGS, has_recipient_groups=True))

    assert b"LIMITS RCPTMAX=5\r\n" in alone.output
    assert b"LIMITS RCPTMAX=5 RCPTDOMAINMAX=1\r\n" in grouped.output


def test_a_message_in_the_smallest_chunks_has_an_end() -> None:
    driver = dialogue(HELLO, MAIL, RCPT)
    driver.send(b"BDAT 1\r\nx" * (MAX_SMALL_CHUNKS + 1))

    assert driver.codes.count(250) == 3 + MAX_SMALL_CHUNKS
    assert driver.codes[-1] == 421
    assert driver.closed == "commands"


def test_a_chunk_that_nobody_may_send_is_not_waited_for() -> None:
    driver = dialogue(b"BDAT 99999999999999999999")

    assert (driver.codes, driver.closed) == ([503], "content")


def test_a_long_line_that_ends_in_a_bare_lf_closes() -> None:
    for pieces in ((b"A" * 3000 + b"\n",), (b"A" * 3000, b"\n"), (b"A" * 3000, b"A\n")):
        driver = dialogue()
        for piece in pieces:
            driver.send(piece)
        assert driver.closed == "line_end"


def test_recipients_that_are_refused_for_now_are_not_kept_without_end() -> None:
    class Deferring(Driver):
        def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
            self.groups.append(len(rcpts))
            self.server.answer_rcpts([LATER] * len(rcpts))

    driver = Deferring()
    driver.send(HELLO + b"\r\n").send(MAIL + b"\r\n")
    for _ in range(MAX_REFUSED + 200):
        driver.send(RCPT + b"\r\n")

    assert sum(driver.groups) == MAX_REFUSED
    assert driver.codes.count(452) > 50
    assert driver.closed == "commands"


def test_a_pipelined_group_is_answered_in_one_go() -> None:
    driver = dialogue(HELLO)
    driver.output = b"220 \r\n"

    driver.send(MAIL + b"\r\n" + RCPT + b"\r\nRCPT TO:<unknown@example.org>\r\nDATA\r\n")

    assert driver.codes == [250, 250, 550, 354]
    assert driver.groups == [2]


class Asking(Driver):
    """Has to ask somebody about recipients."""

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        self.groups.append(len(rcpts))

    def answered(self) -> bytes:
        self.server.answer_rcpts([reply.RECIPIENT_OK] * self.groups[-1])
        self.server.run()
        return self.server.take_output()


def test_the_reply_to_mail_waits_for_that_to_rcpt_while_there_is_more_of_their_group() -> None:
    asking = Asking()
    asking.send(HELLO + b"\r\n")
    asking.output = b""

    asking.send(MAIL + b"\r\n" + RCPT + b"\r\nDATA\r\n")

    assert asking.output == b""
    assert asking.answered() == reply.SENDER_OK.wire + reply.RECIPIENT_OK.wire + reply.START_CONTENT.wire


@pytest.mark.parametrize(
    "group",
    [
        # RFC 2920 3.2: what is pending leaves when the input is used up
        MAIL + b"\r\n" + RCPT + b"\r\n",
        # and the reply to NOOP never waits
        b"NOOP\r\n" + MAIL + b"\r\n" + RCPT + b"\r\nDATA\r\n",
    ],
)
def test_other_replies_do_not_wait_for_that_to_rcpt(group: bytes) -> None:
    asking = Asking()
    asking.send(HELLO + b"\r\n")
    asking.output = b""

    asking.send(group)

    assert asking.output.endswith(reply.SENDER_OK.wire)
    assert asking.answered().startswith(reply.RECIPIENT_OK.wire)


def test_what_waits_is_said_before_a_session_is_closed() -> None:
    asking = Asking()
    asking.send(HELLO + b"\r\n")
    asking.send(MAIL + b"\r\n" + RCPT + b"\r\nDATA\r\n")

    asking.server.close("drain", reply.SHUTTING_DOWN)

    assert asking.server.take_output() == reply.SENDER_OK.wire + reply.SHUTTING_DOWN.wire


def test_rcpts_are_gathered_eight_at_a_time_at_most() -> None:
    settings = ServerSettings("mx.example.org", max_recipients=100)
    driver = dialogue(HELLO, MAIL, settings=settings)

    driver.send((RCPT + b"\r\n") * 20)

    assert driver.groups == [8, 8, 4]


def test_recipients_beyond_the_limit_get_452_and_those_refused_do_not_count() -> None:
    driver = dialogue(HELLO, MAIL, *[RCPT] * 3, b"RCPT TO:<unknown@example.org>", *[RCPT] * 4)

    assert driver.codes[2:] == [250, 250, 250, 550, 250, 250, 452, 452]


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([MAIL], [503]),
        ([HELLO, RCPT], [250, 503]),
        ([HELLO, b"DATA"], [250, 503]),
        ([HELLO, MAIL, b"DATA"], [250, 250, 554]),
        ([HELLO, MAIL, MAIL], [250, 250, 503]),
        ([HELLO, MAIL, RCPT, b"RSET", b"DATA"], [250, 250, 250, 250, 503]),
        ([HELLO, MAIL, RCPT, HELLO, RCPT], [250, 250, 250, 250, 503]),
        ([HELLO, b"MAIL FROM:<denied@client.example>", RCPT], [250, 550, 503]),
        ([HELLO, b"NOOP", b"HELP", b"VRFY b", b"EXPN l", b"FOO"], [250, 250, 214, 252, 502, 500]),
        ([HELLO, b"MAIL FROM:<a@client.example> SIZE=5001"], [250, 552]),
        ([HELLO, b"MAIL FROM:<a@client.example> SIZE=5000"], [250, 250]),
        ([b"HELO c.example", b"MAIL FROM:<a@client.example> SIZE=1"], [250, 555]),
        ([HELLO, MAIL, b"STARTTLS"], [250, 250, 503]),
    ],
)
def test_order_of_commands(lines: list[bytes], codes: list[int]) -> None:
    assert dialogue(*lines).codes == codes


def test_starttls_forgets_what_was_said() -> None:
    driver = dialogue(HELLO, b"STARTTLS", MAIL, HELLO, b"STARTTLS")

    assert driver.codes == [250, 220, 503, 250, 503]
    assert b"STARTTLS\r\n" in driver.output.partition(b"220 2.0.0")[0]
    assert b"STARTTLS\r\n" not in driver.output.partition(b"220 2.0.0")[2]


def test_plaintext_behind_starttls_closes() -> None:
    driver = dialogue(HELLO)

    driver.send(b"STARTTLS\r\nMAIL FROM:<a@b.example>\r\n")

    assert driver.closed == "plaintext_behind_starttls"
    assert driver.codes == [250]


@pytest.mark.parametrize("first", [HELLO, b"HELO c.example", MAIL + b"\r\n" + RCPT + b"\r\nDATA"])
def test_input_that_does_not_wait_for_its_turn_closes(first: bytes) -> None:
    driver = dialogue(*([] if first.startswith((b"EHLO", b"HELO")) else [HELLO]))

    driver.send(first + b"\r\nNOOP\r\n")

    assert driver.codes[-1] == 554
    assert driver.closed == "pipelining"


def test_input_before_the_banner_closes() -> None:
    patient = Patient()
    patient.server.receive(b"EHLO x\r\n")

    patient.server.open()

    assert patient.server.take_output().startswith(b"554 5.5.1")
    assert patient.closed == "early_talker"


@pytest.mark.parametrize("line", [b"NOOP\n", b"NOOP a\rb\r\n", b"NOOP\r\r\n", b"\n"])
def test_bare_line_ends_in_commands_close(line: bytes) -> None:
    driver = dialogue(HELLO)

    driver.send(line + b"MAIL FROM:<a@b.example>\r\n")

    assert driver.codes == [250, 500]
    assert driver.closed == "line_end"


def test_long_lines_are_refused_once_and_close_at_the_second() -> None:
    driver = dialogue(HELLO, b"NOOP " + b"x" * 508, b"NOOP", b"MAIL FROM:<" + b"x" * 2000 + b">")
    assert driver.codes == [250, 500, 250, 501]

    driver.send(b"x" * 5_000)
    assert driver.codes[-1] == 500
    assert driver.closed == "line_too_long"


def test_an_endless_line_keeps_no_memory() -> None:
    driver = Driver()
    for _ in range(100):
        driver.send(b"x" * 1000)

    assert driver.server.buffered_bytes <= 1
    assert driver.codes == [500]
    driver.send(b"\r\nNOOP\r\n")
    assert driver.codes == [500, 250]


def test_twenty_errors_end_the_session() -> None:
    driver = dialogue(*[b"FOO"] * 25)

    assert driver.codes == [500] * 20 + [421]
    assert driver.closed == "errors"


def test_twenty_unknown_recipients_end_the_session() -> None:
    settings = ServerSettings("mx.example.org", max_errors=100)
    driver = dialogue(HELLO, MAIL, *[b"RCPT TO:<unknown@example.org>"] * 25, settings=settings)

    assert driver.codes == [250, 250] + [550] * 20 + [421]


def test_a_session_that_only_talks_is_ended_and_mail_resets_the_count() -> None:
    driver = dialogue(HELLO, *[b"NOOP"] * 98, MAIL, RCPT, b"DATA", b"x\r\n.", *[b"NOOP"] * 101)

    assert driver.codes[-2:] == [250, 421]
    assert driver.codes.count(421) == 1
    assert driver.codes.count(250) == 1 + 98 + 3 + 100


def test_bdat_in_chunks() -> None:
    driver = dialogue(HELLO, MAIL, RCPT)
    driver.send(b"BDAT 5\r\nhelloBDAT 0\r\nBDAT 3 LAST\r\n...QUIT\r\n")

    assert driver.codes[3:] == [250, 250, 250, 221]
    assert driver.contents == [b"hello...\r\n"]


def test_bdat_octets_of_a_refused_chunk_are_not_commands() -> None:
    driver = dialogue(HELLO)
    driver.send(b"BDAT 16\r\nRSET\r\nRSET\r\nBDA").send(b"TNOOP\r\n")

    assert driver.codes == [250, 503, 250]


def test_bdat_and_data_do_not_mix() -> None:
    driver = dialogue(HELLO, MAIL, RCPT)
    driver.send(b"BDAT 1\r\nxDATA\r\nRCPT TO:<c@example.org>\r\nRSET\r\n")

    assert driver.codes[3:] == [250, 503, 503, 250]


def test_bdat_beyond_the_limit_is_read_and_refused() -> None:
    driver = dialogue(HELLO, MAIL, RCPT)
    driver.send(b"BDAT 5001\r\n" + b"x" * 5001 + b"BDAT 1 LAST\r\nxNOOP\r\n")

    assert driver.codes[3:] == [552, 503, 250]


def test_content_with_a_bare_line_end_is_refused_after_its_end_and_closes() -> None:
    driver = dialogue(HELLO, MAIL, RCPT, b"DATA")
    driver.send(b"a\nb\r\n.\nMAIL FROM:<x@y.example>\r\n")
    assert driver.codes[-1] == 354

    driver.send(b".\r\nNOOP\r\n")
    assert driver.codes[-1] == 550
    assert driver.closed == "refused"


def test_too_much_content_is_refused_without_waiting_for_ever() -> None:
    driver = dialogue(HELLO, MAIL, RCPT, b"DATA")
    for _ in range(120):
        driver.send(b"x" * 98 + b"\r\n")

    assert driver.codes[-1] == 552
    assert driver.closed == "content"


def test_phases_follow_the_dialogue() -> None:
    driver = Driver()
    phases = [driver.server.phase]
    for data in (b"EH", b"LO a\r\n", MAIL + b"\r\n" + RCPT + b"\r\n", b"DATA\r\n", b".\r\nQUIT\r\n"):
        driver.send(data)
        phases.append(driver.server.phase)

    assert phases == [Phase.IDLE, Phase.COMMAND, Phase.IDLE, Phase.IDLE, Phase.CONTENT, Phase.CLOSED]


class Patient(Driver):
    """Lets the machine wait: for the banner, and for the answer to EHLO."""

    def __init__(self) -> None:
        self.server = Server(SETTINGS, self, defaultdict(int), defaultdict(int))
        self.closed = None
        self.asked: list[str] = []

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        self.asked.append(domain)


def test_an_answer_is_awaited_before_anything_else_happens() -> None:
    patient = Patient()
    smtp = patient.server
    smtp.open()
    smtp.receive(b"EHLO a\r\n")
    assert smtp.phase is Phase.BUSY
    smtp.receive(b"EHLO b\r\n")
    assert patient.asked == ["a"]

    smtp.greet(OFFERED)

    # RFC 2920 3.1: it did not wait for the reply to EHLO
    assert patient.closed == "pipelining"


# --- properties ---------------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        HELLO, b"HELO c", MAIL, RCPT, b"RCPT TO:<unknown@example.org>", b"DATA", b"BDAT 3", b"BDAT 2 LAST", b"RSET",
        b"NOOP", b"STARTTLS", b"QUIT", b".", b"", b"abc", b"..", b"RCPT TO:<bad", b"MAIL FROM:<> SIZE=99999", b"\0",
        b"FOO\rBAR", b"x" * 600, b"GET / HTTP/1.1",
    ]
)  # fmt: skip
STREAMS = st.lists(
    st.tuples(LINES, st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""])), max_size=30
).map(lambda pairs: b"".join(line + end for line, end in pairs))


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(STREAMS, st.lists(st.integers(0, 1000), max_size=10))
def test_any_bytes_in_any_split_give_replies_and_never_an_exception(stream: bytes, cuts: list[int]) -> None:
    driver = Driver()
    for part in cut(stream, cuts):
        driver.send(part)

    for line in driver.output.split(b"\r\n")[:-1]:
        assert re.fullmatch(rb"[2-5]\d\d[ -][\x20-\x7e]*", line)
    assert driver.output.endswith(b"\r\n")


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_arbitrary_octets_give_replies_and_never_an_exception(stream: bytes, cuts: list[int]) -> None:
    driver = dialogue(HELLO, MAIL, RCPT)
    for part in cut(stream, cuts):
        driver.send(part)

    assert driver.output.endswith(b"\r\n")


@given(
    st.lists(
        st.sampled_from([MAIL, RCPT, b"RCPT TO:<unknown@example.org>", b"NOOP", b"RSET", b"FOO"]), max_size=15
    ),
    st.lists(st.integers(0, 1000), max_size=10),
)
def test_a_legal_group_gives_the_same_replies_in_any_split(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + b"\r\n" for line in lines)
    whole = dialogue(HELLO).send(stream)
    parts = dialogue(HELLO)
    for part in cut(stream, cuts):
        parts.send(part)

    assert parts.output == whole.output


@given(
    st.lists(st.sampled_from([b"a", b".", b"..b", b"", b"\xe4"]), max_size=10),
    st.lists(st.integers(0, 1000), max_size=10),
)
def test_content_and_what_follows_are_the_same_in_any_split(lines: list[bytes], cuts: list[int]) -> None:
    stream = (
        b"".join(b"." * line.startswith(b".") + line + b"\r\n" for line in lines) + b".\r\nNOOP\r\nQUIT\r\n"
    )
    driver = dialogue(HELLO, MAIL, RCPT, b"DATA")
    for part in cut(stream, cuts):
        driver.send(part)

    assert driver.contents == [stream[: -len(b".\r\nNOOP\r\nQUIT\r\n")]]
    assert driver.codes[4:] == [250, 250, 221]
