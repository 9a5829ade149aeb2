r"""SMTP dialogues as text files: what is sent, what has to come back (tests/dialogues/*.txt).

    # a comment; empty lines mean nothing
    requires: aiosmtpd            in front of all steps: see `Requirement`
    > MAIL FROM:<a@example.net>   a line is sent, with CRLF
    >> NOOP\r\n{3*x}\x00          exactly these octets: \r \n \t \\ \xNN, {N*text} repeats (text may hold escapes)
    < 250 2.1.0 *                 one reply, line by line, each matched as a file name is (fnmatch)
    < 250-...                     any number of lines of a multi-line reply
    < EOF                         the server closes, and says nothing more before
    = starttls                    the handshake
    = connect                     a new connection instead of this one

A whole dialogue is run on one connection, opened before its first step; nothing but its steps is said, so the
banner is one of them. Behind the last step nothing is checked: say `< EOF`, or ask something.
"""

from __future__ import annotations

import fnmatch
import re
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.e2e.client import Client, Reply
from tests.e2e.net import Address


class Requirement(StrEnum):
    """What a dialogue needs beyond the gateway that all share."""

    AIOSMTPD = "aiosmtpd"  # holds for aiosmtpd too, and is run against it
    GREETING_DELAY = "greeting-delay"  # the gateway pauses before its banner


class DialogueError(Exception):
    """A file is no dialogue; names file and line."""


@dataclass(frozen=True, slots=True)
class Send:
    octets: bytes


@dataclass(frozen=True, slots=True)
class Expect:
    """One reply: a pattern a line, ANY_LINES for those that do not matter."""

    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpectEof:
    pass


@dataclass(frozen=True, slots=True)
class StartTls:
    pass


@dataclass(frozen=True, slots=True)
class Connect:
    pass


Action = Send | Expect | ExpectEof | StartTls | Connect


@dataclass(frozen=True, slots=True)
class Step:
    line: int
    action: Action


@dataclass(frozen=True, slots=True)
class Dialogue:
    name: str
    requires: frozenset[Requirement]
    steps: tuple[Step, ...]


_ANY_LINES = re.compile(r"\d{3}-\.\.\.")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|([rnt\\]))", re.IGNORECASE)
_REPEAT = re.compile(r"\{(\d+)\*([^{}]*)\}")
_ESCAPED = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}
_ENHANCED = re.compile(r"(?<=^\d{3}[ -])[245]\.\d{1,3}\.\d{1,3} ")


def load(file: Path) -> Dialogue:
    """The dialogue in a file. Raises DialogueError."""
    return parse(file.stem, file.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Dialogue:
    """The dialogue of a text. Raises DialogueError."""
    requires: set[Requirement] = set()
    steps: list[Step] = []
    patterns: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}.txt:{number}"
        match line.partition(" "):
            case ("" | "#", _, _):
                continue
            case ("requires:", _, words) if not steps:
                requires.update(_requirements(words, where))
            case ("<", _, pattern) if pattern != "EOF":
                patterns.append(pattern)
                # RFC 5321 4.2.1: the last line of a reply has no hyphen behind the code
                if pattern[3:4] != "-":
                    steps.append(Step(number, Expect(tuple(patterns))))
                    patterns.clear()
            case _ if patterns:
                raise DialogueError(f"{where}: the reply before has no last line")
            case (sign, _, rest):
                steps.append(Step(number, _action(sign, rest, where)))
    if patterns or not steps:
        raise DialogueError(f"{name}.txt: ends without a last line of its reply, or has no steps")
    return Dialogue(name, frozenset(requires), tuple(steps))


def _action(sign: str, rest: str, where: str) -> Action:
    match sign, rest:
        case ">", command:
            return Send(command.encode() + b"\r\n")
        case ">>", raw:
            return Send(_unescape(raw, where))
        case "<", "EOF":
            return ExpectEof()
        case "=", "starttls":
            return StartTls()
        case "=", "connect":
            return Connect()
    raise DialogueError(f"{where}: not a step: {sign} {rest}")


def run(
    dialogue: Dialogue, address: Address, tls: ssl.SSLContext, *, with_enhanced_codes: bool = True
) -> None:
    """Hold the dialogue with the server at the address. AssertionError names the line, and shows what was said.

    Without enhanced codes a pattern `550 5.7.1 *` asks for 550 only: not every server gives them.
    """
    transcript: list[str] = []
    client = Client(address)
    try:
        for step in dialogue.steps:
            try:
                match step.action:
                    case Connect():
                        client.close()
                        client = Client(address)
                        transcript.append("(connected)")
                    case action:
                        transcript.append(_take(action, client, tls, with_enhanced_codes))
            except (AssertionError, OSError) as exc:
                said = "\n  ".join(transcript)
                raise AssertionError(f"{dialogue.name}.txt:{step.line}: {exc}\n  {said}") from exc
    finally:
        client.close()


def _take(
    action: Send | Expect | ExpectEof | StartTls,
    client: Client,
    tls: ssl.SSLContext,
    with_enhanced_codes: bool,
) -> str:
    """Take one step; what it adds to the transcript."""
    match action:
        case Send(octets):
            client.send(octets)
            return f"> {octets[:200]!r}"
        case Expect(patterns):
            reply = client.read_reply()
            if not with_enhanced_codes:
                patterns = tuple(_ENHANCED.sub("", pattern) for pattern in patterns)
            assert is_match(patterns, reply), f"expected {' / '.join(patterns)}, got {reply}"
            return f"< {reply}"
        case ExpectEof():
            assert client.is_at_eof(), f"expected EOF, got {_rest(client)}"
            return "< EOF"
        case StartTls():
            client.start_tls(tls)
            return "(TLS)"


def is_match(patterns: Iterable[str], reply: Reply) -> bool:
    """Whether the lines of the reply match the patterns, in order."""
    return _lines_match(tuple(patterns), reply.lines)


def _lines_match(patterns: tuple[str, ...], lines: tuple[str, ...]) -> bool:
    if not patterns:
        return not lines
    if _ANY_LINES.fullmatch(patterns[0]):
        return any(_lines_match(patterns[1:], lines[skipped:]) for skipped in range(len(lines) + 1))
    return (
        bool(lines) and fnmatch.fnmatchcase(lines[0], patterns[0]) and _lines_match(patterns[1:], lines[1:])
    )


def _rest(client: Client) -> str:
    try:
        return str(client.read_reply())
    except (AssertionError, OSError) as exc:
        return str(exc)


def _requirements(words: str, where: str) -> Iterator[Requirement]:
    for word in words.split():
        try:
            yield Requirement(word)
        except ValueError as exc:
            raise DialogueError(f"{where}: requires what is not known: {word!r}") from exc


def _unescape(raw: str, where: str) -> bytes:
    octets = b""
    at = 0
    for repeat in _REPEAT.finditer(raw):
        octets += _unescape_plain(raw[at : repeat.start()], where)
        octets += _unescape_plain(repeat[2], where) * int(repeat[1])
        at = repeat.end()
    return octets + _unescape_plain(raw[at:], where)


def _unescape_plain(raw: str, where: str) -> bytes:
    octets = b""
    at = 0
    for escape in _ESCAPE.finditer(raw):
        octets += raw[at : escape.start()].encode()
        octets += bytes.fromhex(escape[1]) if escape[1] else _ESCAPED[escape[2].lower()]
        at = escape.end()
    octets += raw[at:].encode()
    if "\\" in _ESCAPE.sub("", raw):
        raise DialogueError(f"{where}: an unknown escape")
    return octets
