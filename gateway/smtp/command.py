"""One command line of a client becomes one Command, or a CommandError with the reply that says why not.

RFC 5321 4.1.1 (commands), 4.1.2 (their arguments); the parameters of RFC 1870 (SIZE), 6152 (BODY), 6531 (SMTPUTF8),
3461 and 6533 (DSN), 4954 (AUTH of MAIL); RFC 3030 (BDAT, without BINARYMIME), 3207 (STARTTLS). The command AUTH is
not read here but in server.py, since lines are remembered here and that one holds a password.

Only syntax is judged here: order, limits and what EHLO announced are server.py's, the one caller. A path becomes a
Mailbox at once; MAIL gives an Envelope without recipients, RCPT a Recipient, so that nothing is parsed again.

The line comes without its CRLF and already limited in length; work is linear in it: the patterns can match a
text in one way only, so a match that fails gives up each character once.

Deviations from RFC 5321, both because clients in the field do it: spaces behind `FROM:` and `TO:` (4.1.1.2 and 3.3
forbid them), and spaces before the argument of EHLO and HELO. Nothing else that the grammar excludes is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import ClassVar, NoReturn, assert_never

from gateway.errors import GatewayError
from gateway.session import BodyType, Envelope, Recipient
from gateway.smtp import reply as replies
from gateway.smtp.address import AddressError, AddressFault, parse_forward_path, parse_reverse_path
from gateway.smtp.reply import Reply


class Verb(StrEnum):
    """The commands that there are."""

    HELO = "HELO"
    EHLO = "EHLO"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BDAT = "BDAT"
    RSET = "RSET"
    NOOP = "NOOP"
    VRFY = "VRFY"
    HELP = "HELP"
    QUIT = "QUIT"
    STARTTLS = "STARTTLS"


class Extension(StrEnum):
    """The EHLO keywords that allow parameters of MAIL and RCPT."""

    SIZE = "SIZE"
    EIGHT_BIT_MIME = "8BITMIME"
    SMTPUTF8 = "SMTPUTF8"
    DSN = "DSN"
    AUTH = "AUTH"


class CommandError(GatewayError):
    """A line is no command that can be obeyed: `reply` is for the client, behind it `close` ends the connection."""

    def __init__(self, reply: Reply, *, close: bool = False) -> None:
        super().__init__(str(reply))
        self.reply = reply
        self.close = close


@dataclass(frozen=True, slots=True)
class SimpleCommand:
    """Any command but MAIL, RCPT and BDAT. `argument` is "" where there is none.

    It is printable ASCII without spaces for HELO and EHLO, free of control characters for NOOP, VRFY and HELP.
    """

    verb: Verb
    argument: str = ""


@dataclass(frozen=True, slots=True)
class MailCommand:
    """MAIL FROM: the envelope as it begins, without recipients."""

    verb: ClassVar[Verb] = Verb.MAIL
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class RcptCommand:
    """RCPT TO."""

    verb: ClassVar[Verb] = Verb.RCPT
    rcpt: Recipient


@dataclass(frozen=True, slots=True)
class BdatCommand:
    """RFC 3030 2: `size_bytes` octets of content follow the line; `last` ends the message."""

    verb: ClassVar[Verb] = Verb.BDAT
    size_bytes: int
    last: bool


Command = SimpleCommand | MailCommand | RcptCommand | BdatCommand


@lru_cache(maxsize=4096)  # clients say the same few things all day; a line has at most 2 KiB
def parse_command(
    line: bytes,
    offered: frozenset[Extension] = frozenset(),
    smtputf8: bool = False,  # noqa: FBT001, FBT002  # hashed for each line: keywords cost more than the look-up
) -> Command:
    """The command of a line without its CRLF. Raises CommandError.

    `offered` is what this session's EHLO announced; a parameter of anything else is not recognised. `smtputf8`
    tells whether the open transaction was begun with SMTPUTF8: it decides what RCPT may hold.
    """
    # RFC 5321 4.1.1: trailing white space is tolerated; 2.4: verbs are case-insensitive
    verb_octets, space, rest = line.rstrip(b" ").partition(b" ")
    verb = _VERBS.get(verb_octets.upper())
    if verb is None:
        _refuse(verb_octets.upper(), line)
    argument = _decode(rest, verb)
    match verb:
        case Verb.MAIL:
            return _parse_mail(argument, offered)
        case Verb.RCPT:
            return _parse_rcpt(argument, offered, smtputf8=smtputf8)
        case Verb.BDAT:
            return _parse_bdat(argument)
        case Verb.EHLO | Verb.HELO:
            greeting = argument.lstrip(" ")
            if not _GREETING.fullmatch(greeting):
                raise CommandError(replies.BAD_GREETING)
            return SimpleCommand(verb, greeting)
        case Verb.NOOP | Verb.VRFY | Verb.HELP:
            return SimpleCommand(verb, argument)
        case Verb.DATA | Verb.RSET | Verb.QUIT | Verb.STARTTLS:
            if space:
                raise CommandError(replies.NO_ARGUMENT_ALLOWED)
            return SimpleCommand(verb)
        case _:  # pragma: no cover  mypy proves that there is no other
            assert_never(verb)


_VERBS = {verb.encode(): verb for verb in Verb}

# RFC 5321 4.2.4: 502 for what is known and not implemented, 500 for what is not known
_NOT_IMPLEMENTED = frozenset(
    b"EXPN TURN ETRN ATRN SEND SOML SAML AUTH BURL LHLO XCLIENT XFORWARD DEBUG VERB WIZ".split()
)

# A browser that was led here speaks for somebody else (cross-protocol attack): nothing that follows on the
# connection may be taken for commands. RFC 9110 9.3, RFC 5789, and PRI of RFC 9113 3.4
_HTTP_METHODS = frozenset(b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PRI".split())
_HTTP_VERSION = b"HTTP/"

# RFC 6531 3.3, 3.7.4.2: the commands that may hold UTF-8
_UTF8_VERBS = frozenset({Verb.MAIL, Verb.RCPT, Verb.VRFY})
# C1 controls and the line ends of Unicode are refused like the controls of ASCII
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# RFC 5321 4.1.1.1 wants a domain or an address literal. Like its peers the gateway takes any word, since many
# honest clients give names with an underscore: it is evidence for policies, no identity. 4.5.3.1.2: 255 octets
_GREETING = re.compile(r"[\x21-\x7e]{1,255}")

# RFC 3030 4.2: chunk-size = 1*20DIGIT
_BDAT = re.compile(r"([0-9]{1,20})( LAST)?", re.IGNORECASE | re.ASCII)

# RFC 5321 4.1.2: a path ends at the first ">" outside a quoted string; address.py judges what is in it
_PATH = r' *(<[^">]*(?:"(?:[^"\\]|\\.)*"[^">]*)*>)(?: (.+))?'
_FROM = re.compile("FROM:" + _PATH, re.IGNORECASE | re.ASCII)
_TO = re.compile("TO:" + _PATH, re.IGNORECASE | re.ASCII)

# RFC 3461 4: xtext. 4.2, 4.4: only printable characters may be encoded, else the downstream's DSN gets lines of ours
_XTEXT = r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x7e]|\+(?:[2-6][0-9A-F]|7[0-9A-E]))"
# RFC 6533 3: utf-8-addr-xtext and, where it is not ASCII, utf-8-addr-unitext; controls are refused here too
_UTEXT = (
    r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x5b\x5d-\x7e\xa0-\U0010ffff]|\+(?:[2-6][0-9A-F]|7[0-9A-E])"
    r"|\\x\{(?!0*(?:[0189]?[0-9A-F]|7F|202[89])\})[0-9A-F]{2,6}\})"
)
# RFC 3461 4.2: addr-type is an atom; RFC 5321 4.1.2: the value of a parameter holds no "="
_ADDR_TYPE = r"[A-Za-z0-9!#$%&'*+/?^_`{|}~-]"


def _pattern(value: str) -> re.Pattern[str]:
    return re.compile(value, re.ASCII)


# keyword -> the extension that has to be offered, the value ("" where there is none)
_Parameters = dict[str, tuple[Extension, re.Pattern[str]]]
_MAIL_PARAMETERS: _Parameters = {
    "SIZE": (Extension.SIZE, _pattern(r"[0-9]{1,20}")),  # RFC 1870 3
    "BODY": (Extension.EIGHT_BIT_MIME, _pattern(r"(?i:7BIT|8BITMIME)")),  # RFC 6152 2
    "SMTPUTF8": (Extension.SMTPUTF8, _pattern(r"")),  # RFC 6531 3.4
    "RET": (Extension.DSN, _pattern(r"(?i:FULL|HDRS)")),  # RFC 3461 4.3
    "ENVID": (Extension.DSN, _pattern(rf"(?!.{{101}}){_XTEXT}+")),  # RFC 3461 4.4
    # RFC 4954 5: who submitted it first, in xtext; taken and not passed on
    "AUTH": (Extension.AUTH, _pattern(rf"(?!.{{501}}){_XTEXT}+")),
}
_RCPT_PARAMETERS: _Parameters = {
    # RFC 3461 4.1
    "NOTIFY": (
        Extension.DSN,
        _pattern(r"(?i:NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2})"),
    ),
    # RFC 3461 4.2, RFC 6533 3
    "ORCPT": (
        Extension.DSN,
        _pattern(rf"(?!.{{501}})(?:(?i:UTF-8);{_UTEXT}+|(?!(?i:UTF-8);){_ADDR_TYPE}+;{_XTEXT}+)"),
    ),
}

_REVERSE_PATH_REPLIES = {
    AddressFault.SYNTAX: replies.BAD_REVERSE_PATH,
    AddressFault.ROUTE: replies.SOURCE_ROUTE,
    AddressFault.UTF8: replies.NEEDS_SMTPUTF8_SENDER,
}
_FORWARD_PATH_REPLIES = {
    AddressFault.SYNTAX: replies.BAD_FORWARD_PATH,
    AddressFault.ROUTE: replies.SOURCE_ROUTE,
    AddressFault.UTF8: replies.NEEDS_SMTPUTF8_RCPT,
}


def _refuse(verb_octets: bytes, line: bytes) -> NoReturn:
    if verb_octets in _HTTP_METHODS or _HTTP_VERSION in line:
        raise CommandError(replies.NOT_SMTP, close=True)
    if not (line.isascii() and line.decode("ascii").isprintable()):
        raise CommandError(replies.BAD_BYTES)
    raise CommandError(
        replies.NOT_IMPLEMENTED if verb_octets in _NOT_IMPLEMENTED else replies.UNKNOWN_COMMAND
    )


def _decode(octets: bytes, verb: Verb) -> str:
    if octets.isascii():
        text = octets.decode("ascii")
        if text.isprintable():
            return text
    elif verb in _UTF8_VERBS:
        try:
            text = octets.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise CommandError(replies.BAD_BYTES) from exc
        if not _CONTROL.search(text):
            return text
    raise CommandError(replies.BAD_BYTES)


def _parse_mail(argument: str, offered: frozenset[Extension]) -> MailCommand:
    match = _FROM.fullmatch(argument)
    if match is None:
        raise CommandError(replies.BAD_MAIL)
    # the parameters first: whether the path may hold UTF-8 stands behind it
    given = _parse_parameters(match[2], _MAIL_PARAMETERS, offered)
    smtputf8 = "SMTPUTF8" in given
    try:
        mail_from = parse_reverse_path(match[1], smtputf8=smtputf8)
    except AddressError as exc:
        raise CommandError(_REVERSE_PATH_REPLIES[exc.kind]) from exc
    return MailCommand(
        Envelope(
            mail_from,
            body_type=BodyType(given.get("BODY", "7BIT").upper()),
            smtputf8=smtputf8,
            size_hint=int(given.get("SIZE", "0")),
            dsn_ret=given.get("RET", ""),
            dsn_envid=given.get("ENVID", ""),
        )
    )


def _parse_rcpt(argument: str, offered: frozenset[Extension], *, smtputf8: bool) -> RcptCommand:
    match = _TO.fullmatch(argument)
    if match is None:
        raise CommandError(replies.BAD_RCPT)
    given = _parse_parameters(match[2], _RCPT_PARAMETERS, offered)
    orcpt = given.get("ORCPT", "")
    # RFC 6533 3: utf-8-addr-unitext is only for transactions with SMTPUTF8
    if not smtputf8 and not orcpt.isascii():
        raise CommandError(replies.BAD_PARAMETER)
    try:
        mailbox = parse_forward_path(match[1], smtputf8=smtputf8)
    except AddressError as exc:
        raise CommandError(_FORWARD_PATH_REPLIES[exc.kind]) from exc
    return RcptCommand(Recipient(mailbox, given.get("NOTIFY", ""), orcpt))


def _parse_parameters(text: str | None, known: _Parameters, offered: frozenset[Extension]) -> dict[str, str]:
    """RFC 5321 4.1.2, Mail-parameters: keyword in upper case -> value as it was given, "" where there is none."""
    given: dict[str, str] = {}
    for parameter in text.split(" ") if text else ():
        keyword, equals, value = parameter.partition("=")
        # str.upper() makes ASCII of some other letters, such as U+017F LONG S
        keyword = keyword.upper() if keyword.isascii() else ""
        # RFC 5321 4.1.1.11: 555 for what is not recognised, which is what was not offered
        if keyword not in known or known[keyword][0] not in offered:
            raise CommandError(replies.UNKNOWN_PARAMETER)
        # RFC 5321 4.1.2: esmtp-value has one character at least
        if keyword in given or (equals and not value) or not known[keyword][1].fullmatch(value):
            raise CommandError(replies.BAD_PARAMETER)
        given[keyword] = value
    return given


def _parse_bdat(argument: str) -> BdatCommand:
    match = _BDAT.fullmatch(argument)
    if match is None:
        # without the size nobody knows where the chunk ends, and its content must not be read as commands
        raise CommandError(replies.SYNTAX, close=True)
    return BdatCommand(int(match[1]), last=match[2] is not None)
