"""Mail that was stored, as it came to us: the messages of a directory or an mbox, and who sent each of them.

A message that went through this gateway has our own Received field, which names the client, its HELO and, where there
is one, the recipient; what stands above that field was added behind us, and is left out. Return-Path has the sender,
Delivered-To and X-Original-To the recipient. What a message does not say is taken from the options.
"""

from __future__ import annotations

import mailbox
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path

from gateway.explain.given import case_of
from gateway.explain.mail_file import MailFile
from gateway.explain.run import Case, ExplainError

# Nobody stores so much in one message; larger files are left alone.
_MAX_BYTES = 256 * 1024 * 1024
_FIELD_END = re.compile(rb"\r?\n(?![ \t])")
_RECEIVED = re.compile(
    r"from (?P<helo>\S+) \(\[(?:IPv6:)?(?P<ip>[0-9a-fA-F:.]+)\]\)\s+by (?P<by>\S+) with \S+ id \S+"
    r"(?:\s+\([^()]*\))?(?:\s+for <(?P<rcpt>[^<>]*)>)?\s*;\s*(?P<date>.*)"
)


@dataclass(frozen=True, slots=True)
class Assumed:
    """What is assumed of a message that does not say it itself; "" and () where nothing is."""

    ip: str = ""
    helo: str = ""
    mail_from: str | None = None
    rcpts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """One message, or one record of a decision, with its name for people."""

    name: str
    octets: bytes
    is_record: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """A message as a client gave it to us; `time` is when, None where nobody knows."""

    ip: str
    helo: str
    mail_from: str
    rcpts: tuple[str, ...]
    octets: bytes
    time: float | None

    def case(self, *, max_bytes: int, max_line_bytes: int) -> Case:
        """To be explained; each time it is wanted, since content is read once. Raises ExplainError."""
        case = case_of(ip=self.ip, helo=self.helo, mail_from=self.mail_from, rcpts=self.rcpts)
        content = MailFile(BytesIO(self.octets), max_bytes=max_bytes, max_line_bytes=max_line_bytes)
        return Case(case.client, case.helo, case.envelope, case.rcpts, content)


def stored_in(path: Path) -> Iterator[Stored]:
    """Every message and record (`*.json`) below a directory, of an mbox, or in a file. Raises ExplainError."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
        for file in files:
            yield Stored(str(file.relative_to(path)), _read(file), is_record=file.suffix == ".json")
        return
    octets = _read(path)
    if not octets.startswith(b"From "):
        yield Stored(path.name, octets, is_record=path.suffix == ".json")
        return
    box = mailbox.mbox(path, create=False)
    try:
        for number, key in enumerate(box.iterkeys(), 1):
            yield Stored(f"{path.name}:{number}", box.get_bytes(key))
    finally:
        box.close()


def sent(stored: Stored, hostname: str, assumed: Assumed) -> Sent:
    """How a message came to us. Raises ExplainError where nobody knows who sent it to whom."""
    octets = stored.octets
    mail_from, rcpts = assumed.mail_from, assumed.rcpts
    at = 0
    for name, value, end in _fields(octets):
        if name == "return-path" and mail_from is None:
            mail_from = value.strip().removeprefix("<").removesuffix(">")
        elif name in ("delivered-to", "x-original-to") and not rcpts:
            rcpts = (value.strip(),)
        elif name == "received" and (ours := _RECEIVED.fullmatch(value.strip())) and ours["by"] == hostname:
            rcpts = assumed.rcpts or ((ours["rcpt"],) if ours["rcpt"] else rcpts)
            found = (ours["ip"], ours["helo"], _time(ours["date"]))
            at = end
            break
    else:
        found = (assumed.ip, assumed.helo, None)
    ip, helo, time = found
    if not ip or mail_from is None or not rcpts:
        known = (("--ip", bool(ip)), ("--mail-from", mail_from is not None), ("--rcpt", bool(rcpts)))
        missing = ", ".join(option for option, is_known in known if not is_known)
        raise ExplainError(f"it does not say who sent it to whom: {missing}")
    return Sent(ip, helo, mail_from, rcpts, octets[at:], time)


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ExplainError(f"{file} is larger than {_MAX_BYTES} octets")
        return file.read_bytes()
    except OSError as exc:
        raise ExplainError(f"{file}: {exc.strerror or exc}") from exc


def _fields(octets: bytes) -> Iterable[tuple[str, str, int]]:
    """Name and unfolded value of each field, and where the next one begins; up to the blank line."""
    at = 0
    while at < len(octets) and (end := _FIELD_END.search(octets, at)):
        raw = octets[at : end.start()]
        if not raw:
            return
        at = end.end()
        name, _, value = raw.partition(b":")
        text = re.sub(r"\r?\n", "", value.decode("utf-8", "replace"))
        yield name.decode("latin-1").strip().lower(), text, at


def _time(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
