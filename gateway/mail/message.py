"""Message: the header fields as raw slices with an index, and how header edits apply (RFC 5322 2.2, 3.6).

Nothing is decoded to be written again: a field that is kept leaves with the octets that it came with. A name is
what stands before the first colon without white space around it and without case, so that no blank or fold before
the colon hides a field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.errors import GatewayError
from gateway.mail.body import Body
from gateway.mail.digest import BodyDigests
from gateway.smtp.content import Unstuffer, stuff, unstuff
from gateway.verdict import AddField, HeaderEdit

# RFC 5322 2.1.1 allows lines of 998; names longer than this are no field of any use, only an attack on parsers
MAX_NAME_BYTES = 77
MAX_CONTINUATIONS = 1000
# RFC 5322 2.2.3: a line end before white space is folding, any other one ends the field
_FIELD_END = re.compile(rb"\r\n(?![ \t])")
# RFC 5322 2.2
_NOT_IN_NAMES = bytes(each for each in range(256) if not 0x20 < each < 0x7F)
_new = tuple.__new__
_MAYBE_LONG_NAME = re.compile(rb"\n(?![ \t])[^:]{%d}" % (MAX_NAME_BYTES + 1))


class HeaderError(GatewayError):
    """The header is beyond a limit or cannot be told from what we put above it; the text says which."""


class Field(NamedTuple):
    """One header field: its name in lower case, and the octets as they came (unstuffed, folds and last CRLF included).

    A line that is no field has the name b"".
    """

    name: bytes
    raw: bytes

    @property
    def value(self) -> bytes:
        """What stands behind the colon, folds and all, without the last CRLF."""
        return self.raw.partition(b":")[2][:-2]


class Header:
    """The header of a message as it came, without its blank line; fields are told apart when somebody asks for them.

    `octets` are unstuffed; `wire_bytes` is their length on the wire.
    """

    __slots__ = ("_by_name", "_fields", "_lower", "octets", "wire_bytes")

    def __init__(self, octets: bytes, wire_bytes: int) -> None:
        self.octets = octets
        self.wire_bytes = wire_bytes
        self._lower = octets.lower()
        self._fields: tuple[Field, ...] | None = None
        self._by_name: dict[bytes, list[Field]] | None = None

    @property
    def fields(self) -> tuple[Field, ...]:
        """All of them, top to bottom."""
        if self._fields is None:
            self._fields = tuple(map(_field, _fields_of(self.octets)))
        return self._fields

    @property
    def by_name(self) -> Mapping[bytes, Sequence[Field]]:
        """The fields of each name, top to bottom."""
        by_name = self._by_name
        if by_name is None:
            by_name = self._by_name = {}
            for field in self.fields:
                by_name.setdefault(field.name, []).append(field)
        return by_name

    def all(self, name: bytes) -> tuple[Field, ...]:
        """Every field of this lower-case name, top to bottom."""
        # most of what is asked for is not there
        if self._lower.find(name) < 0:
            return ()
        return tuple(self.by_name.get(name, ()))

    def resembling(self, name: bytes) -> tuple[Field, ...]:
        """Every field of this lower-case name, also where octets stand around it that no name may hold."""
        if self._lower.find(name) < 0:
            return ()
        return tuple([f for f in self.fields if f.name.strip(_NOT_IN_NAMES) == name])

    def has_more(self, name: bytes, count: int) -> bool:
        """Whether there are more than `count` fields of this lower-case name."""
        return self._lower.count(name) > count and len(self.all(name)) > count


def parse_header(octets: bytes, *, max_fields: int, wire_bytes: int) -> Header:
    """The Header of these unstuffed octets, which hold no blank line; each line ends in CRLF.

    Raises HeaderError for more than `max_fields` fields, 1000 continuation lines of one field, a name over 77
    octets, and a first line that would continue a field put above it.
    """
    if octets[:1] in (b" ", b"\t"):
        raise HeaderError("the first line is a continuation")
    lines = octets.count(b"\r\n")
    header = Header(octets, wire_bytes)
    # nearly every header is far below each limit, and nobody may ever ask for its fields
    if (
        lines > min(max_fields, MAX_CONTINUATIONS)
        or (lines and octets.find(b":", 0, MAX_NAME_BYTES + 1) < 0)
        or _MAYBE_LONG_NAME.search(octets)
    ):
        _check(_fields_of(octets), max_fields)
    return header


def _check(pieces: list[bytes], max_fields: int) -> None:
    if len(pieces) > max_fields:
        raise HeaderError("too many fields")
    if any(piece.count(b"\r\n") > MAX_CONTINUATIONS for piece in pieces):
        raise HeaderError("a field has too many continuation lines")
    if any(len(_field(piece).name) > MAX_NAME_BYTES for piece in pieces):
        raise HeaderError("a field name is too long")


def _fields_of(octets: bytes) -> list[bytes]:
    """The fields, each without its last CRLF."""
    pieces = _FIELD_END.split(octets)
    pieces.pop()  # behind the last CRLF
    return pieces


def _field(piece: bytes) -> Field:
    name, colon, _ = piece.partition(b":")
    # what Field() does, at half the cost
    return _new(Field, (name.strip().lower() if colon else b"", piece + b"\r\n"))


class HeaderReader:
    """Finds the end of the header while content streams by, and parses it once.

    Feed blocks until `header` is there; content that ends without a blank line is all header (`finish`).
    """

    __slots__ = ("_buffer", "_is_stuffed", "_max_bytes", "_max_fields", "header")

    def __init__(self, *, is_stuffed: bool, max_bytes: int, max_fields: int) -> None:
        self.header: Header | None = None
        self._is_stuffed = is_stuffed
        self._max_bytes = max_bytes
        self._max_fields = max_fields
        # a client may send octet by octet: what gathers here must not be copied for each of them
        self._buffer = bytearray()

    def feed(self, block: bytes) -> bool:
        """Take one more block; True when the header is complete. Raises HeaderError."""
        if not self._buffer:
            # nearly always the whole header is in the first block
            end = -2 if block.startswith(b"\r\n") else block.find(b"\r\n\r\n")
            if end != -1:
                self._parse(block[: end + 2])
                return True
        search_from = max(0, len(self._buffer) - 3)
        self._buffer += block
        if self._buffer.startswith(b"\r\n"):
            self._parse(b"")
            return True
        end = self._buffer.find(b"\r\n\r\n", search_from)
        if end >= 0:
            self._parse(bytes(self._buffer[: end + 2]))
            return True
        # the largest header may stand here with no more than the CR of its blank line
        if len(self._buffer) > self._max_bytes + 1:
            raise HeaderError("the header is too large")
        return False

    def finish(self) -> Header:
        """The header of content that has ended. Raises HeaderError."""
        if self.header is None:
            self._parse(bytes(self._buffer))
        assert self.header is not None
        return self.header

    def _parse(self, octets: bytes) -> None:
        wire_bytes = len(octets)
        if wire_bytes > self._max_bytes:
            raise HeaderError("the header is too large")
        self._buffer.clear()
        if self._is_stuffed:
            octets = unstuff(octets)
        self.header = parse_header(octets, max_fields=self._max_fields, wire_bytes=wire_bytes)


@dataclass(frozen=True, slots=True)
class Message:
    """The message as it arrived. Policies read it; edits are verdicts' business."""

    header: Header
    body: Body
    digests: BodyDigests = field(default_factory=BodyDigests)

    @property
    def size_bytes(self) -> int:
        """Octets of the whole content on the wire."""
        return self.body.size_bytes

    def blocks(self) -> Iterator[bytes]:
        """The whole message as the sender meant it (dot-stuffing undone), in blocks of at most 64 KiB, none empty.

        May be called again. What is large comes from a file, a block at a time. Raises SpoolError.
        """
        if not self.body.is_stuffed:
            yield from self.body.blocks()
            return
        unstuffer = Unstuffer()
        for block in self.body.blocks():
            if plain := unstuffer.feed(block):
                yield plain


class EditedContent(NamedTuple):
    """A message as it leaves: our fields above what came. This is what the relay sends (gateway.relaying.Content)."""

    prefix: bytes
    body: Body
    start: int = 0

    @property
    def is_stuffed(self) -> bool:
        """Whether what follows the prefix is dot-stuffed."""
        return self.body.is_stuffed

    @property
    def size_bytes(self) -> int:
        """Octets of prefix and rest as they stand here."""
        return len(self.prefix) + self.body.size_bytes - self.start

    def blocks(self) -> Iterator[bytes]:
        """What follows the prefix, as it came."""
        return self.body.blocks(self.start)

    def below(self, added: Sequence[AddField]) -> EditedContent:
        """The same with more fields above all others, the first of them first."""
        above = stuff(b"".join([_format_field(edit) for edit in added]))
        return self._replace(prefix=above + self.prefix)


def edited_header(message: Message, content: EditedContent) -> Header:
    """The header as it leaves, our own fields included."""
    octets = unstuff(content.prefix)
    if not content.start:
        octets += message.header.octets
    return Header(octets, len(content.prefix) + message.header.wire_bytes - content.start)


def apply_edits(
    message: Message,
    added: Sequence[AddField] = (),
    removed: AbstractSet[bytes] = frozenset(),
    *,
    forged: AbstractSet[Field] = frozenset(),
    above: bytes = b"",
    trace: bytes = b"",
) -> EditedContent:
    """The message with fields put above it (the first of `added` becomes the first) and some of its own taken out.

    Those of the lower-case names `removed`, and each that is equal to one of `forged`. `above` and `trace` are fields
    of ours in wire form: the first of all, and the one right above the message. Where nothing is taken out, not an
    octet of what came is touched.
    """
    prefix = above + b"".join([_format_field(edit) for edit in added]) + trace if added else above + trace
    start = 0
    header = message.header
    if forged or any(map(header.all, removed)):
        kept = [each.raw for each in header.fields if each.name not in removed and each not in forged]
        prefix += b"".join(kept)
        start = header.wire_bytes
    # the prefix is sent as it is, so it has to be stuffed; plain content is stuffed by the relay behind it
    return EditedContent(stuff(prefix), message.body, start)


def split_edits(edits: Sequence[HeaderEdit], *, smtputf8: bool) -> tuple[list[AddField], set[bytes]]:
    """Verdicts' edits as the fields to add and the lower-case names to remove.

    RFC 6532: text beyond ASCII is for a message that is `smtputf8`; in others "?" stands for it.
    """
    added = [e if smtputf8 or e.value.isascii() else _in_ascii(e) for e in edits if isinstance(e, AddField)]
    removed = {e.name.lower().encode("ascii") for e in edits if not isinstance(e, AddField)}
    return added, removed


def _in_ascii(edit: AddField) -> AddField:
    return AddField(edit.name, edit.value.encode("ascii", "replace").decode("ascii"))


def _format_field(edit: AddField) -> bytes:
    return f"{edit.name}: {edit.value}\r\n".encode()
