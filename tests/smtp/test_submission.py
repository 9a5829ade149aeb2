"""A server for submission: TLS before all else, AUTH before MAIL, and no way around either of them."""

from __future__ import annotations

import base64
import re
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.session import Envelope, Recipient
from gateway.smtp import reply
from gateway.smtp.command import Extension, parse_command
from gateway.smtp.content import Fault
from gateway.smtp.sasl import MAX_AUTH_LINE, Credentials
from gateway.smtp.server import MAX_AUTH_FAILURES, Extensions, Phase, Server, ServerSettings

SETTINGS = ServerSettings("mx.example.org", has_tls=True, is_submission=True)
OFFERED = Extensions(5000, frozenset({Extension.SIZE, Extension.EIGHT_BIT_MIME}))
RIGHT = b"AUTH PLAIN " + base64.b64encode(b"\0ann@example.org\0secret") + b"\r\n"
WRONG = b"AUTH PLAIN " + base64.b64encode(b"\0ann@example.org\0guess") + b"\r\n"
MAIL = b"MAIL FROM:<ann@example.org>\r\nRCPT TO:<you@example.net>\r\n"


class Driver:
    """Answers at once; TLS takes no time."""

    def __init__(self, *, tls: bool = True, settings: ServerSettings = SETTINGS, waits: bool = False) -> None:
        self.server = Server(settings, self, defaultdict(int), defaultdict(int), tls_active=tls)
        self.closed = ""
        self.asked: list[Credentials] = []
        self.mails = 0
        self.waits = waits
        self.server.open()
        self.server.take_output()

    def say(self, data: bytes) -> list[str]:
        """The lines of the replies."""
        self.server.receive(data)
        return self.server.take_output().decode("ascii").split("\r\n")[:-1]

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        self.server.greet(OFFERED if esmtp else None)

    def auth(self, credentials: Credentials) -> None:
        self.asked.append(credentials)
        if not self.waits:
            self.judge()

    def judge(self) -> None:
        said = self.asked[-1]
        is_right = (said.user, said.password) == ("ann@example.org", "secret")
        self.server.answer_auth(reply.AUTH_OK if is_right else reply.AUTH_REFUSED)

    def mail(self, envelope: Envelope) -> None:
        self.mails += 1
        self.server.answer(reply.SENDER_OK)

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        self.server.answer_rcpts([reply.RECIPIENT_OK] * len(rcpts))

    def content_begins(self, *, is_stuffed: bool) -> None:
        self.server.accept_content()

    def content(self, block: bytes) -> None:
        pass

    def content_ends(self, fault: Fault | None) -> None:
        self.server.answer(reply.OK)

    def starttls(self) -> None:
        self.server.tls_started()

    def reset(self) -> None:
        pass

    def closing(self, reason: str) -> None:
        self.closed = reason


def ready(*, tls: bool = True, settings: ServerSettings = SETTINGS, waits: bool = False) -> Driver:
    driver = Driver(tls=tls, settings=settings, waits=waits)
    driver.say(b"EHLO a\r\n")
    return driver


def test_auth_is_announced_inside_tls_only() -> None:
    driver = Driver(tls=False)
    before = driver.say(b"EHLO a\r\n")
    assert "250 STARTTLS" in before
    assert not any("AUTH" in line for line in before)
    assert driver.say(b"STARTTLS\r\n") == ["220 2.0.0 Ready to start TLS"]
    behind = driver.say(b"EHLO a\r\n")
    assert any(line[4:] == "AUTH PLAIN LOGIN" for line in behind)
    assert not any("STARTTLS" in line for line in behind)


@pytest.mark.parametrize("is_greeted", [False, True])
@pytest.mark.parametrize(
    "line", ["MAIL FROM:<a@b.c>", "RCPT TO:<a@b.c>", "DATA", "RSET", "VRFY a", "HELP", "BDAT 0 LAST"]
)
def test_tls_comes_before_all_else(line: str, is_greeted: bool) -> None:
    driver = ready(tls=False) if is_greeted else Driver(tls=False)
    assert driver.say(line.encode() + b"\r\n") == [str(reply.STARTTLS_FIRST)]
    assert driver.say(b"NOOP\r\n") == ["250 2.0.0 Ok"]
    assert driver.say(RIGHT) == [str(reply.AUTH_NEEDS_TLS)]
    assert driver.asked == []
    assert driver.say(b"QUIT\r\n") == ["221 2.0.0 Bye"]


@pytest.mark.parametrize("line", ["MAIL FROM:<a@b.c>", "RCPT TO:<a@b.c>", "DATA"])
def test_authentication_comes_before_mail(line: str) -> None:
    driver = ready()
    assert driver.say(line.encode() + b"\r\n") == [str(reply.AUTH_FIRST)]
    assert driver.mails == 0


def test_a_chunk_before_authentication_is_no_command() -> None:
    driver = ready()
    assert driver.say(b"BDAT 12 LAST\r\nNOOP\r\nRSET\r\nNOOP\r\n") == [str(reply.AUTH_FIRST), "250 2.0.0 Ok"]


def test_who_has_authenticated_sends_mail() -> None:
    driver = ready()
    assert driver.say(RIGHT) == ["235 2.7.0 Authentication successful"]
    assert driver.say(MAIL) == ["250 2.1.0 Sender ok", "250 2.1.5 Recipient ok"]
    assert driver.say(b"DATA\r\n")[0].startswith("354")
    assert driver.say(b"x\r\n.\r\n") == ["250 2.0.0 Ok"]
    # RFC 4954 4: once in a session, whatever happened meanwhile
    assert driver.say(RIGHT) == [str(reply.AUTH_ALREADY)]
    driver.say(b"EHLO a\r\n")
    assert driver.say(RIGHT) == [str(reply.AUTH_ALREADY)]
    driver.say(MAIL)
    assert driver.say(b"AUTH LOGIN\r\n") == [str(reply.AUTH_ALREADY)]
    assert len(driver.asked) == 1


def test_case_and_blanks_of_the_command() -> None:
    assert ready().say(RIGHT.replace(b"AUTH PLAIN", b"auth plain").replace(b"\r\n", b"  \r\n")) == [
        "235 2.7.0 Authentication successful"
    ]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b"AUTH", reply.SYNTAX),
        (b"AUTH ", reply.SYNTAX),
        (b"AUTH  PLAIN", reply.SYNTAX),
        (b"AUTH CRAM-MD5", reply.AUTH_MECHANISM),
        (b"AUTH \xff", reply.AUTH_MECHANISM),
        (b"AUTH PLAIN a b", reply.AUTH_NOT_BASE64),
        (b"AUTH PLAIN \xff", reply.AUTH_NOT_BASE64),
        (b"AUTH PLAIN =", reply.AUTH_MALFORMED),
        (b"AUTHX PLAIN", reply.UNKNOWN_COMMAND),
    ],
)
def test_malformed_commands(line: bytes, answer: reply.Reply) -> None:
    driver = ready()
    assert driver.say(line + b"\r\n") == [str(answer)]
    assert driver.say(RIGHT) == ["235 2.7.0 Authentication successful"]


@pytest.mark.parametrize("hello", [b"", b"HELO a\r\n"])
def test_auth_needs_ehlo(hello: bytes) -> None:
    driver = Driver()
    driver.say(hello)
    assert driver.say(RIGHT) == [str(reply.EHLO_FIRST)]


def test_a_response_is_never_a_command() -> None:
    driver = ready()
    assert driver.say(b"AUTH PLAIN\r\n") == ["334 "]
    assert driver.say(b"EHLO a\r\n") == [str(reply.AUTH_NOT_BASE64)]
    assert driver.say(b"AUTH LOGIN\r\n") == ["334 VXNlcm5hbWU6"]
    # four letters are base64
    assert driver.say(b"QUIT\r\n") == ["334 UGFzc3dvcmQ6"]
    assert driver.say(b"*\r\n") == [str(reply.AUTH_CANCELLED)]
    assert driver.say(b"NOOP\r\n") == ["250 2.0.0 Ok"]
    assert not driver.closed


@pytest.mark.parametrize("first", [RIGHT, b"AUTH LOGIN\r\n", b"AUTH PLAIN\r\n"])
def test_what_is_pipelined_behind_auth_ends_the_session(first: bytes) -> None:
    driver = ready()
    assert driver.say(first + b"NOOP\r\n") == [str(reply.EARLY_TALKER)]
    assert driver.closed == "pipelining"
    assert driver.asked == []


def test_what_comes_while_the_password_is_judged_waits() -> None:
    driver = ready(waits=True)
    assert driver.say(RIGHT) == []
    assert driver.server.phase is Phase.BUSY
    assert driver.say(MAIL) == []
    driver.judge()
    driver.server.run()
    assert driver.server.take_output().startswith(b"235 2.7.0")
    assert driver.mails == 1


def test_three_failures_end_the_session() -> None:
    driver = ready()
    refused = str(reply.AUTH_REFUSED)
    for _ in range(MAX_AUTH_FAILURES - 1):
        assert driver.say(WRONG) == [refused]
    assert driver.say(b"NOOP\r\n") == ["250 2.0.0 Ok"]
    assert driver.say(WRONG) == [refused, str(reply.TOO_MANY_AUTH_FAILURES)]
    assert driver.closed == "auth_failures"


def test_trouble_of_ours_is_no_failure_of_the_client() -> None:
    driver = ready(waits=True)
    for _ in range(2 * MAX_AUTH_FAILURES):
        driver.say(WRONG)
        driver.server.answer_auth(reply.AUTH_UNAVAILABLE)
        driver.server.run()
        assert driver.server.take_output().startswith(b"454 4.7.0")
    assert not driver.closed


def test_lines_of_an_exchange_may_be_long_and_no_longer() -> None:
    most = MAX_AUTH_LINE - len("\r\n")
    driver = ready()
    driver.say(b"AUTH PLAIN\r\n")
    assert driver.say(b"A" * (most - 2) + b"\r\n") == [str(reply.AUTH_MALFORMED)]
    assert driver.say(b"AUTH PLAIN " + b"A" * (most - 11) + b"\r\n") == [str(reply.AUTH_NOT_BASE64)]
    driver.say(b"AUTH PLAIN\r\n")
    # in pieces, as it would come
    assert driver.say(b"A" * (most + 1)) == []
    assert driver.say(b"A") == [str(reply.AUTH_LINE_TOO_LONG)]
    assert driver.say(b"A" * 50_000) == []
    assert driver.server.buffered_bytes <= 1
    assert driver.say(b"AAAA\r\nNOOP\r\n") == ["250 2.0.0 Ok"]
    assert driver.say(RIGHT) == ["235 2.7.0 Authentication successful"]


def test_other_lines_are_no_longer_than_ever() -> None:
    assert ready().say(b"NOOP " + b"A" * 600 + b"\r\n") == [str(reply.LINE_TOO_LONG)]
    # nor is that of a command that begins alike
    assert ready().say(b"AUTHX " + b"A" * 600 + b"\r\n") == [str(reply.LINE_TOO_LONG)]


def test_no_line_with_a_password_is_remembered() -> None:
    parse_command.cache_clear()
    driver = ready()
    driver.say(WRONG)
    driver.say(RIGHT)
    assert parse_command.cache_info().currsize == 1  # EHLO
    assert "secret" not in repr(driver.asked)


def test_the_parameter_auth_of_mail_is_taken_and_means_nothing() -> None:
    driver = ready()
    driver.say(RIGHT)
    assert driver.say(b"MAIL FROM:<ann@example.org> AUTH=<>\r\n") == ["250 2.1.0 Sender ok"]
    driver.say(b"RSET\r\n")
    assert driver.say(b"MAIL FROM:<ann@example.org> AUTH=e+3Dmc2@example.com\r\n") == ["250 2.1.0 Sender ok"]
    driver.say(b"RSET\r\n")
    assert driver.say(b"MAIL FROM:<ann@example.org> AUTH=a+b\r\n") == [str(reply.BAD_PARAMETER)]
    assert driver.say(b"MAIL FROM:<ann@example.org> AUTH=" + b"a" * 501 + b"\r\n") == [
        str(reply.BAD_PARAMETER)
    ]


@pytest.mark.parametrize("tls", [False, True])
def test_a_server_for_others_mail_knows_no_auth(tls: bool) -> None:
    driver = ready(tls=tls, settings=ServerSettings("mx.example.org", has_tls=True))
    assert not any("AUTH" in line for line in driver.say(b"EHLO a\r\n"))
    for line in (RIGHT, b"AUTH LOGIN\r\n", b"auth plain\r\n"):
        assert driver.say(line) == [str(reply.NOT_IMPLEMENTED)]
    assert driver.say(b"MAIL FROM:<a@b.c> AUTH=<>\r\n") == [str(reply.UNKNOWN_PARAMETER)]


# --- properties ---------------------------------------------------------------------------------------

_LINES = st.lists(
    st.sampled_from(
        [
            b"EHLO a\r\n",
            b"HELO a\r\n",
            b"STARTTLS\r\n",
            b"NOOP\r\n",
            b"RSET\r\n",
            b"DATA\r\n",
            b"BDAT 3 LAST\r\n",
            b"AUTH PLAIN\r\n",
            b"AUTH LOGIN\r\n",
            b"AUTH LOGIN YW5u\r\n",
            b"*\r\n",
            b"=\r\n",
            b"AAAA\r\n",
            base64.b64encode(b"ann@example.org") + b"\r\n",
            base64.b64encode(b"guess") + b"\r\n",
            WRONG,
            b"MAIL FROM:<a@b.c>\r\n",
            b"RCPT TO:<a@b.c>\r\n",
            b".\r\n",
            b"x" * 700 + b"\r\n",
            b"\xff\r\n",
        ]
    ),
    max_size=30,
)


@given(_LINES, st.booleans(), st.booleans())
def test_without_the_password_there_is_no_mail(
    lines: list[bytes], is_in_tls: bool, is_one_write: bool
) -> None:
    driver = Driver(tls=is_in_tls)
    replies: list[str] = []
    for data in [b"".join(lines)] if is_one_write else lines:
        replies += driver.say(data)
    assert driver.mails == 0
    assert not any(line.startswith(("235", "354")) for line in replies)
    assert all(re.match(r"[2345]\d\d[ -]", line) for line in replies)


@given(_LINES)
def test_what_was_said_before_does_not_keep_out_who_has_the_password(lines: list[bytes]) -> None:
    driver = ready()
    for line in lines:
        driver.say(line)
    # the end of a chunk or an exchange that is open
    driver.say(b"*\r\n*\r\n*\r\n")
    driver.say(b"EHLO a\r\n")
    if driver.closed:
        return
    assert driver.say(RIGHT) == ["235 2.7.0 Authentication successful"]
    assert driver.say(MAIL)[0] == "250 2.1.0 Sender ok"
