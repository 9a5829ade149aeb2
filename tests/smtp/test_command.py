"""command: what each command line says, or which reply refuses it."""

from __future__ import annotations

import unicodedata
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.session import BodyType, Envelope, Recipient
from gateway.smtp import reply as replies
from gateway.smtp.address import AddressLiteral, Domain, Mailbox
from gateway.smtp.command import (
    BdatCommand,
    Command,
    CommandError,
    Extension,
    MailCommand,
    RcptCommand,
    SimpleCommand,
    Verb,
    parse_command,
)
from gateway.smtp.reply import Reply

ALL = frozenset(Extension)
SENDER = Mailbox("a", Domain("example.org"))


def mail(line: str, offered: frozenset[Extension] = ALL) -> Envelope:
    command = parse_command(line.encode(), offered=offered)
    assert isinstance(command, MailCommand)
    return command.envelope


def rcpt(line: str, *, smtputf8: bool = False) -> Recipient:
    command = parse_command(line.encode(), offered=ALL, smtputf8=smtputf8)
    assert isinstance(command, RcptCommand)
    return command.rcpt


def refusal(
    line: str | bytes, offered: frozenset[Extension] = ALL, *, smtputf8: bool = False
) -> CommandError:
    octets = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(CommandError) as caught:
        parse_command(octets, offered=offered, smtputf8=smtputf8)
    return caught.value


# --- verbs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (b"EHLO mx.example.org", SimpleCommand(Verb.EHLO, "mx.example.org")),
        (b"ehlo mx.example.org", SimpleCommand(Verb.EHLO, "mx.example.org")),
        (b"HELO [192.0.2.1]", SimpleCommand(Verb.HELO, "[192.0.2.1]")),
        (b"DATA", SimpleCommand(Verb.DATA)),
        (b"rset", SimpleCommand(Verb.RSET)),
        (b"Quit", SimpleCommand(Verb.QUIT)),
        (b"STARTTLS", SimpleCommand(Verb.STARTTLS)),
        (b"DATA  ", SimpleCommand(Verb.DATA)),  # RFC 5321 4.1.1: trailing white space is tolerated
        (b"NOOP", SimpleCommand(Verb.NOOP)),
        (b"NOOP anything  at all", SimpleCommand(Verb.NOOP, "anything  at all")),
        (b"HELP MAIL", SimpleCommand(Verb.HELP, "MAIL")),
        (b"VRFY user", SimpleCommand(Verb.VRFY, "user")),
        ("VRFY δοκιμή SMTPUTF8".encode(), SimpleCommand(Verb.VRFY, "δοκιμή SMTPUTF8")),
        (b"BDAT 0 LAST", BdatCommand(0, last=True)),
        (b"bdat 1000", BdatCommand(1000, last=False)),
        (b"BDAT 99999999999999999999 last", BdatCommand(99_999_999_999_999_999_999, last=True)),
    ],
)
def test_command_is_understood(line: bytes, command: Command) -> None:
    assert parse_command(line) == command


def test_each_kind_of_command_knows_its_verb() -> None:
    commands = [
        parse_command(line) for line in (b"QUIT", b"MAIL FROM:<>", b"RCPT TO:<a@example.org>", b"BDAT 1")
    ]
    assert [command.verb for command in commands] == [Verb.QUIT, Verb.MAIL, Verb.RCPT, Verb.BDAT]


@pytest.mark.parametrize(
    "line", ["", " ", "FOO", "FOO bar", " QUIT", "MAILFROM:<a@example.org>", "EHLOx", "DATA."]
)
def test_unknown_command_is_told_apart(line: str) -> None:
    assert refusal(line).reply is replies.UNKNOWN_COMMAND


@pytest.mark.parametrize(
    "verb", ["EXPN", "turn", "ETRN", "SEND", "SOML", "SAML", "AUTH", "XCLIENT", "XFORWARD", "DEBUG"]
)
def test_known_command_that_is_not_there_is_502(verb: str) -> None:
    assert refusal(verb).reply is replies.NOT_IMPLEMENTED
    assert refusal(f"{verb} something").reply is replies.NOT_IMPLEMENTED


@pytest.mark.parametrize("verb", ["DATA", "RSET", "QUIT", "STARTTLS"])
def test_command_without_arguments_takes_none(verb: str) -> None:
    assert refusal(f"{verb} now").reply is replies.NO_ARGUMENT_ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1",
        b"get /",
        b"POST /x HTTP/1.0",
        b"PUT x",
        b"HEAD /",
        b"DELETE /",
        b"CONNECT mx.example.org:25 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"BREW /pot HTTP/1.1",
        b"HTTP/1.1 200 OK",
        b"GET /\xff\x00 HTTP/1.1",
    ],
)
def test_http_ends_the_connection(line: bytes) -> None:
    error = refusal(line)
    assert error.reply is replies.NOT_SMTP
    assert error.close


def test_refusals_leave_the_connection_open_and_are_ours() -> None:
    error = refusal("FOO")
    assert not error.close
    assert isinstance(error, GatewayError)
    assert str(error) == "500 5.5.2 Command not recognised"


# --- octets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("octet", [b"\0", b"\t", b"\r", b"\n", b"\x0b", b"\x1b", b"\x7f"])
@pytest.mark.parametrize(
    "line",
    [
        b"NOOP a%sb",
        b"EHLO mx%s.example.org",
        b"MAIL FROM:<a%s@example.org>",
        b"MAIL%s FROM:<a@example.org>",
        b"RCPT TO:<a@example.org>%s",
        b"DATA %s",
        b"DATA%s",
        b"FOO%s",
        "VRFY ü%s".encode(),
        "MAIL FROM:<ü%s@example.org> SMTPUTF8".encode(),
    ],
)
def test_control_characters_are_refused(line: bytes, octet: bytes) -> None:
    assert refusal(line.replace(b"%s", octet)).reply is replies.BAD_BYTES


@pytest.mark.parametrize("character", ["\x80", "\x85", "\x9f", "\u2028", "\u2029"])
@pytest.mark.parametrize(
    "line", ["VRFY a%s", "MAIL FROM:<a%s@example.org> SMTPUTF8", "RCPT TO:<a%s@example.org>"]
)
def test_controls_and_line_ends_of_unicode_are_refused(line: str, character: str) -> None:
    assert refusal(line % character, smtputf8=True).reply is replies.BAD_BYTES


@pytest.mark.parametrize(
    "line", ["EHLO ü.example.org", "HELO ü", "NOOP ü", "HELP ü", "DATA ü", "BDAT ü", "FÖO", "üQUIT"]
)
def test_utf8_is_refused_outside_mail_rcpt_and_vrfy(line: str) -> None:
    assert refusal(line).reply is replies.BAD_BYTES


@pytest.mark.parametrize(
    "octets", [b"\xff", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"]
)
def test_octets_that_are_no_utf8_are_refused(octets: bytes) -> None:
    for line in (b"MAIL FROM:<%s@example.org> SMTPUTF8", b"RCPT TO:<%s@example.org>", b"VRFY %s"):
        assert refusal(line % octets, smtputf8=True).reply is replies.BAD_BYTES


# --- EHLO, HELO --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    ["localhost", "WIN-ABC_1", "192.0.2.1", "[IPv6:2001:db8::1]", "mx.example.org.", "-", "a" * 255],
)
def test_greeting_is_taken_whatever_name_the_client_gives(greeting: str) -> None:
    assert parse_command(f"EHLO {greeting}".encode()) == SimpleCommand(Verb.EHLO, greeting)


def test_spaces_before_the_greeting_are_tolerated() -> None:
    assert parse_command(b"EHLO  mx.example.org ") == SimpleCommand(Verb.EHLO, "mx.example.org")


@pytest.mark.parametrize("line", ["EHLO", "HELO", "EHLO ", "HELO a b", "EHLO " + "a" * 256])
def test_greeting_is_one_word_of_at_most_255_octets(line: str) -> None:
    assert refusal(line).reply is replies.BAD_GREETING


# --- BDAT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "BDAT",
        "BDAT LAST",
        "BDAT -1",
        "BDAT +1",
        "BDAT 1.0",
        "BDAT 0x10",
        "BDAT 1 FIRST",
        "BDAT 1  LAST",
        "BDAT 1 LAST LAST",
        "BDAT 1LAST",
        "BDAT  1",
        "BDAT 100000000000000000000",
    ],
)
def test_chunk_of_unknown_size_ends_the_connection(line: str) -> None:
    error = refusal(line)
    assert error.reply is replies.SYNTAX
    assert error.close


# --- MAIL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "envelope"),
    [
        ("MAIL FROM:<>", Envelope(None)),
        ("MAIL FROM:<a@example.org>", Envelope(SENDER)),
        ("mail from:<a@EXAMPLE.ORG>", Envelope(SENDER)),
        ("MAIL FROM:<a@example.org>  ", Envelope(SENDER)),
        ("MAIL FROM: <a@example.org>", Envelope(SENDER)),
        ("MAIL FROM:   <a@example.org>", Envelope(SENDER)),
        ("MAIL FROM:<> SIZE=0", Envelope(None)),
        ("MAIL FROM:<> size=99999999999999999999", Envelope(None, size_hint=99_999_999_999_999_999_999)),
        ("MAIL FROM:<> BODY=7bit", Envelope(None, body_type=BodyType.SEVEN_BIT)),
        ("MAIL FROM:<> Body=8bitmime", Envelope(None, body_type=BodyType.EIGHT_BIT)),
        ("MAIL FROM:<> SMTPUTF8", Envelope(None, smtputf8=True)),
        ("MAIL FROM:<> RET=FULL", Envelope(None, dsn_ret="FULL")),
        ("MAIL FROM:<> RET=hdrs", Envelope(None, dsn_ret="hdrs")),
        ("MAIL FROM:<> ENVID=QQ+2B314159+20+7E", Envelope(None, dsn_envid="QQ+2B314159+20+7E")),
        ("MAIL FROM:<> ENVID=" + "x" * 100, Envelope(None, dsn_envid="x" * 100)),
        (
            "MAIL FROM:<a@example.org> SIZE=12345 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=x",
            Envelope(
                SENDER,
                body_type=BodyType.EIGHT_BIT,
                smtputf8=True,
                size_hint=12345,
                dsn_ret="HDRS",
                dsn_envid="x",
            ),
        ),
        # the path ends at the first ">" that is not quoted
        (
            'MAIL FROM:<"a> SIZE=1 <b"@example.org> SIZE=2',
            Envelope(Mailbox('"a> SIZE=1 <b"', Domain("example.org")), size_hint=2),
        ),
        (
            'MAIL FROM:<"a\\">"@example.org>',
            Envelope(Mailbox('"a\\">"', Domain("example.org"))),
        ),
    ],
)
def test_mail_begins_an_envelope(line: str, envelope: Envelope) -> None:
    assert mail(line) == envelope


@pytest.mark.parametrize(
    "line",
    [
        "MAIL",
        "MAIL ",
        "MAIL <a@example.org>",
        "MAIL FROM",
        "MAIL FROM:",
        "MAIL FROM:a@example.org",
        "MAIL FROM:a@example.org SIZE=1",
        "MAIL FROM <a@example.org>",
        "MAIL FROM :<a@example.org>",
        "MAIL  FROM:<a@example.org>",
        "MAIL TO:<a@example.org>",
        "MAIL FROM:<a@example.org",
        "MAIL FROM:<a@example.org>SIZE=1",
        'MAIL FROM:<"a@example.org>',
        'MAIL FROM:<"a@example.org> SIZE=1',
        "MAIL FROM:Name <a@example.org>",
        "MAIL FROM:<a@example.org>>",
    ],
)
def test_mail_of_another_form_is_refused(line: str) -> None:
    assert refusal(line).reply is replies.BAD_MAIL


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("<postmaster>", replies.BAD_REVERSE_PATH),
        ("<a b@example.org>", replies.BAD_REVERSE_PATH),
        ("<a@exa_mple.org>", replies.BAD_REVERSE_PATH),
        ("<a@b@example.org>", replies.BAD_REVERSE_PATH),
        ("<<a@example.org>", replies.BAD_REVERSE_PATH),
        ("< >", replies.BAD_REVERSE_PATH),
        ("<@a.example:b@example.org>", replies.SOURCE_ROUTE),
        ("<ü@example.org>", replies.NEEDS_SMTPUTF8_SENDER),
        ("<a@bücher.example>", replies.NEEDS_SMTPUTF8_SENDER),
    ],
)
def test_reverse_path_that_is_no_address_has_its_reply(path: str, reply: Reply) -> None:
    assert refusal(f"MAIL FROM:{path} SIZE=1").reply is reply


@pytest.mark.parametrize(
    "parameter",
    [
        "SIZE",
        "SIZE=",
        "SIZE=-1",
        "SIZE=+1",
        "SIZE=1e3",
        "SIZE=1=2",
        "SIZE=100000000000000000000",
        "SIZE=٣",
        "BODY",
        "BODY=",
        "BODY=BINARYMIME",
        "BODY=9BIT",
        "SMTPUTF8=",
        "SMTPUTF8=yes",
        "RET",
        "RET=NONE",
        "ENVID",
        "ENVID=",
        "ENVID=a+b",
        "ENVID=a+2",
        "ENVID=a+2b",  # RFC 3461 4: upper case
        "ENVID=a=b",
        "ENVID=ü",
        "ENVID=" + "x" * 101,
        # encoded controls would become lines of the downstream's delivery report
        "ENVID=a+0D+0AX-Evil:",
        "ENVID=a+00",
        "ENVID=a+7F",
        "ENVID=a+85",
        "SIZE=1 SIZE=1",
        "SMTPUTF8 smtputf8",
        "SIZE=1 BODY=7BIT size=2",
    ],
)
def test_bad_value_or_duplicate_of_a_mail_parameter_is_refused(parameter: str) -> None:
    assert refusal(f"MAIL FROM:<a@example.org> {parameter}").reply is replies.BAD_PARAMETER


@pytest.mark.parametrize(
    "parameter",
    [
        "FOO",
        "FOO=bar",
        "NOTIFY=NEVER",
        "=",
        "=1",
        " SIZE=1",
        "SIZE=1  BODY=7BIT",
        "\u017fIZE=1",
        "<b@c>",
        "X-Y=\\",
    ],
)
def test_parameter_that_is_not_known_is_555(parameter: str) -> None:
    assert refusal(f"MAIL FROM:<a@example.org> {parameter}").reply is replies.UNKNOWN_PARAMETER


@pytest.mark.parametrize(
    ("parameter", "extension"),
    [
        ("SIZE=1", Extension.SIZE),
        ("BODY=7BIT", Extension.EIGHT_BIT_MIME),
        ("SMTPUTF8", Extension.SMTPUTF8),
        ("RET=FULL", Extension.DSN),
        ("ENVID=x", Extension.DSN),
    ],
)
def test_parameter_is_known_only_where_its_extension_was_offered(
    parameter: str, extension: Extension
) -> None:
    line = f"MAIL FROM:<> {parameter}"
    assert mail(line, frozenset({extension})).mail_from is None
    assert refusal(line, ALL - {extension}).reply is replies.UNKNOWN_PARAMETER
    assert refusal(line, frozenset()).reply is replies.UNKNOWN_PARAMETER


def test_smtputf8_behind_the_path_allows_utf8_in_it() -> None:
    assert mail("MAIL FROM:<δ@bücher.example> SMTPUTF8").mail_from == Mailbox("δ", Domain("bücher.example"))


# --- RCPT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "recipient"),
    [
        ("RCPT TO:<a@example.org>", Recipient(SENDER)),
        ("rcpt to: <a@example.org> ", Recipient(SENDER)),
        ("RCPT TO:<Postmaster>", Recipient(Mailbox("Postmaster", None))),
        ("RCPT TO:<a@[192.0.2.1]>", Recipient(Mailbox("a", AddressLiteral.parse("[192.0.2.1]")))),
        ("RCPT TO:<a@example.org> NOTIFY=never", Recipient(SENDER, "never")),
        ("RCPT TO:<a@example.org> NOTIFY=SUCCESS,DELAY,FAILURE", Recipient(SENDER, "SUCCESS,DELAY,FAILURE")),
        (
            "RCPT TO:<a@example.org> ORCPT=rfc822;b+2Bc@example.org",
            Recipient(SENDER, "", "rfc822;b+2Bc@example.org"),
        ),
        ("RCPT TO:<a@example.org> ORCPT=x400;" + "x" * 495, Recipient(SENDER, "", "x400;" + "x" * 495)),
        (
            "RCPT TO:<a@example.org> NOTIFY=DELAY ORCPT=utf-8;\\x{3B4}\\x{2B}b@example.org",
            Recipient(SENDER, "DELAY", "utf-8;\\x{3B4}\\x{2B}b@example.org"),
        ),
    ],
)
def test_rcpt_gives_a_recipient(line: str, recipient: Recipient) -> None:
    assert rcpt(line) == recipient


def test_rcpt_may_hold_utf8_in_a_transaction_with_smtputf8() -> None:
    recipient = rcpt("RCPT TO:<δ@example.org> ORCPT=UTF-8;δ@example.org", smtputf8=True)
    assert recipient == Recipient(Mailbox("δ", Domain("example.org")), "", "UTF-8;δ@example.org")


def test_original_recipient_in_utf8_needs_smtputf8() -> None:
    assert refusal("RCPT TO:<a@example.org> ORCPT=utf-8;δ@example.org").reply is replies.BAD_PARAMETER


@pytest.mark.parametrize(
    "line", ["RCPT", "RCPT TO:", "RCPT TO:a@example.org", "RCPT FROM:<a@example.org>", "RCPT <a@b>"]
)
def test_rcpt_of_another_form_is_refused(line: str) -> None:
    assert refusal(line).reply is replies.BAD_RCPT


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("<>", replies.BAD_FORWARD_PATH),
        ("<a>", replies.BAD_FORWARD_PATH),
        ("<a@example.org,b@example.org>", replies.BAD_FORWARD_PATH),
        ("<a@192.0.2.1>", replies.BAD_FORWARD_PATH),
        ("<@a.example,@b.example:c@example.org>", replies.SOURCE_ROUTE),
        ("<ü@example.org>", replies.NEEDS_SMTPUTF8_RCPT),
    ],
)
def test_forward_path_that_is_no_address_has_its_reply(path: str, reply: Reply) -> None:
    assert refusal(f"RCPT TO:{path}").reply is reply


@pytest.mark.parametrize(
    "parameter",
    [
        "NOTIFY",
        "NOTIFY=",
        "NOTIFY=NEVER,DELAY",
        "NOTIFY=SUCCESS,",
        "NOTIFY=,SUCCESS",
        "NOTIFY=SUCCESS;DELAY",
        "NOTIFY=SUCCESS,FAILURE,DELAY,SUCCESS",
        "NOTIFY=ALWAYS",
        "NOTIFY=DELAY NOTIFY=DELAY",
        "ORCPT=",
        "ORCPT=rfc822",
        "ORCPT=rfc822;",
        "ORCPT=;a@example.org",
        "ORCPT=rfc(822;a@example.org",
        "ORCPT=rfc822;a+0Db",
        "ORCPT=rfc822;δ@example.org",
        "ORCPT=utf-8;\\x{0D}",
        "ORCPT=utf-8;\\x{00000A}",
        "ORCPT=utf-8;\\x{85}",
        "ORCPT=utf-8;\\x{2028}",
        "ORCPT=utf-8;\\x{}",
        "ORCPT=utf-8;\\x{7F",
        "ORCPT=utf-8;a\\b",
        "ORCPT=utf-8;a+0Ab",
        "ORCPT=rfc822;" + "x" * 494,
    ],
)
def test_bad_value_or_duplicate_of_a_rcpt_parameter_is_refused(parameter: str) -> None:
    assert refusal(f"RCPT TO:<a@example.org> {parameter}", smtputf8=True).reply is replies.BAD_PARAMETER


@pytest.mark.parametrize("parameter", ["FOO", "SIZE=1", "BODY=7BIT", "SMTPUTF8", "RET=FULL"])
def test_parameter_of_mail_is_not_known_to_rcpt(parameter: str) -> None:
    assert refusal(f"RCPT TO:<a@example.org> {parameter}").reply is replies.UNKNOWN_PARAMETER


def test_dsn_parameters_of_rcpt_are_known_only_where_dsn_was_offered() -> None:
    for parameter in ("NOTIFY=NEVER", "ORCPT=rfc822;a@example.org"):
        assert (
            refusal(f"RCPT TO:<a@example.org> {parameter}", ALL - {Extension.DSN}).reply
            is replies.UNKNOWN_PARAMETER
        )


# --- properties --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"MAIL FROM:" + b" " * 1_000_000,
        b"MAIL FROM:<" + b'"a' * 500_000,
        b"MAIL FROM:<" + b'"a"' * 300_000,
        b'MAIL FROM:<"' + b"\\" * 1_000_001,
        b"MAIL FROM:<" + b"a" * 1_000_000 + b"\xc3\xbc>x",
        b"MAIL FROM:<a@example.org>" + b" " * 1_000_000 + b"x",
        b"MAIL FROM:<a@example.org> ENVID=" + b"+41" * 300_000 + b"+",
        b"RCPT TO:<a@example.org> ORCPT=utf-8;" + b"\\x{000000" * 100_000,
        b"RCPT TO:<a@example.org> ORCPT=" + b"a" * 1_000_000,
        b"EHLO " + b"a " * 500_000,
        b"BDAT " + b"1" * 1_000_000,
        b" " * 1_000_000 + b"x",
    ],
    ids=lambda line: repr(line[:40]),
)
def test_time_is_linear_in_the_line(line: bytes) -> None:
    # 500 times longer than server.py lets a line become: quadratic work would not end before pytest's timeout
    with pytest.raises(CommandError):
        parse_command(line, offered=ALL)


def is_harmless(text: str) -> bool:
    """No control character, no line end, no surrogate."""
    return len(text.splitlines()) <= 1 and not any(
        unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text
    )


VERBS = st.sampled_from(
    [verb.encode() for verb in Verb] + [b"MAIL FROM:<", b"RCPT TO:<", b"MAIL FROM:<a@example.org> "]
)
PIECES = st.sampled_from(
    [
        b" ",
        b"<",
        b">",
        b'"',
        b"\\",
        b"@",
        b":",
        b"=",
        b",",
        b";",
        b"+",
        b"a",
        b"0",
        b"\r",
        b"\n",
        b"\0",
        b"\t",
        b"\x7f",
    ]
    + [
        piece.encode()
        for piece in ("ü", "\x85", "\u2028", "FROM:", "TO:", "<a@example.org>", "SIZE=1", "SMTPUTF8")
    ]
    + [b"ORCPT=utf-8;", b"ENVID=", b"NOTIFY=", b"LAST", b"\\x{A", b"\xff", b"\xed\xa0\x80"]
)
LINES = st.binary() | st.builds(
    lambda verb, rest: verb + b"".join(rest), VERBS, st.lists(PIECES, max_size=12)
)


@given(LINES, st.frozensets(st.sampled_from(Extension)), st.booleans())
def test_any_octets_are_a_harmless_command_or_a_command_error(
    line: bytes, offered: frozenset[Extension], smtputf8: bool
) -> None:
    try:
        command = parse_command(line, offered=offered, smtputf8=smtputf8)
    except CommandError as exc:
        refused = exc.reply
    else:
        assert is_harmless(str(command.verb))
        match command:
            case SimpleCommand():
                assert is_harmless(command.argument)
            case MailCommand():
                assert all(is_harmless(str(value)) for value in astuple(command.envelope))
                assert is_harmless(str(command.envelope.mail_from))
            case RcptCommand():
                assert all(is_harmless(str(value)) for value in astuple(command.rcpt))
                assert is_harmless(str(command.rcpt.mailbox))
            case BdatCommand():
                assert 0 <= command.size_bytes < 10**20
        return
    assert refused.is_permanent


XTEXT = st.from_regex(r"([!-*,-<>-~]|\+[2-6][0-9A-F]){1,33}", fullmatch=True)
NOTIFY = st.just("NEVER") | st.lists(
    st.sampled_from(["SUCCESS", "FAILURE", "DELAY"]), min_size=1, max_size=3
).map(",".join)
MAILBOXES = st.builds(
    Mailbox,
    st.from_regex(r'[a-z!%ü]{1,9}(\.[a-z]{1,9}){0,2}|"([ !#-\[\]-~ü]|\\[ -~]){0,14}"', fullmatch=True),
    st.sampled_from([Domain("example.org"), Domain("bücher.example"), AddressLiteral.parse("[192.0.2.1]")]),
)
ENVELOPES = st.builds(
    Envelope,
    st.none() | MAILBOXES,
    rcpts=st.just(()),
    body_type=st.sampled_from(BodyType),
    smtputf8=st.just(True),
    size_hint=st.integers(0, 10**20 - 1),
    dsn_ret=st.sampled_from(["", "FULL", "HDRS"]),
    dsn_envid=st.just("") | XTEXT,
)
RECIPIENTS = st.builds(
    Recipient, MAILBOXES, st.just("") | NOTIFY, st.just("") | XTEXT.map("rfc822;{}".format)
)


@given(
    LINES | st.sampled_from([f"{verb} ".encode() for verb in Verb]),
    st.sampled_from([b"\r", b"\n"]),
    st.integers(0, 60),
    st.booleans(),
)
def test_a_line_with_a_line_end_in_it_is_no_command(line: bytes, end: bytes, at: int, smtputf8: bool) -> None:
    # the server relies on it: it looks for them only where there is no command
    with pytest.raises(CommandError):
        parse_command(line[:at] + end + line[at:], offered=ALL, smtputf8=smtputf8)


@given(ENVELOPES)
def test_formatted_mail_parses_to_its_envelope(envelope: Envelope) -> None:
    path = "" if envelope.mail_from is None else str(envelope.mail_from)
    line = f"MAIL FROM:<{path}> SMTPUTF8 SIZE={envelope.size_hint} BODY={envelope.body_type}"
    line += f" RET={envelope.dsn_ret}" * bool(envelope.dsn_ret) + f" ENVID={envelope.dsn_envid}" * bool(
        envelope.dsn_envid
    )
    assert mail(line) == envelope


@given(RECIPIENTS)
def test_formatted_rcpt_parses_to_its_recipient(recipient: Recipient) -> None:
    line = f"RCPT TO:<{recipient.mailbox}>"
    line += f" NOTIFY={recipient.notify}" * bool(recipient.notify) + f" ORCPT={recipient.orcpt}" * bool(
        recipient.orcpt
    )
    assert rcpt(line, smtputf8=True) == recipient
