"""DATA and BDAT content in blocks: end detection, strict line ends, limits (RFC 5321 4.1.1.4, 4.5.2; RFC 3030).

Content stays in its wire form (dot-stuffed after DATA, plain after BDAT) and is never cut into lines: each
block costs a few passes in C. What breaks a rule is discarded from there on while the end is still looked
for, so that nothing behind a refused message is ever taken for a command and memory stays flat.

Not done here: headers (mail/message.py), keeping content (mail/body.py).
"""

from __future__ import annotations

import re
from enum import Enum

from gateway.smtp import reply
from gateway.smtp.reply import Reply

# As numbers: `in` then is one memchr, and nothing else.
_CR, _LF, _NUL = b"\r\n\0"
_LONE_DOT_LINE = re.compile(rb"(?<=\n)\.(?=\r\n)")


class Fault(Enum):
    """Why content is refused; the value is the reply given at its end."""

    LINE_END = reply.BARE_LINE_END
    LONG_LINE = reply.LONG_LINE
    TOO_BIG = reply.TOO_BIG

    @property
    def reply(self) -> Reply:
        """The reply after the end of the content."""
        return self.value

    @property
    def closes(self) -> bool:
        """Whether the connection ends behind the reply: after a smuggling attempt nothing more is believed."""
        return self is Fault.LINE_END


class _Checker:
    """The rules that hold for all content. Blocks never end in a CR (the decoders hold it back)."""

    __slots__ = ("_column", "dropped_bytes", "fault", "max_bytes", "max_line_bytes", "size_bytes")

    def __init__(self, max_bytes: int, max_line_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_line_bytes = max_line_bytes
        self.size_bytes = 0
        self.dropped_bytes = 0
        self.fault: Fault | None = None
        self._column = 0  # octets since the last LF

    def passes(self, block: bytes) -> bool:
        """Whether the block may be kept; the first fault stays."""
        if self.fault is not None:
            self.dropped_bytes += len(block)
            return False
        self.size_bytes += len(block)
        if self.size_bytes > self.max_bytes:
            self.fault = Fault.TOO_BIG
            return False
        # RFC 5321 2.3.8, 4.1.1.4: CR and LF only as CRLF. NUL: RFC 5322 4 (obsolete), and ours.
        # Four passes in C, three of them by memchr: 1.5 us for each KiB.
        rest = block.replace(b"\r\n", b"..")
        if _CR in rest or _LF in rest or _NUL in rest:
            self.fault = Fault.LINE_END
            return False
        if self._has_long_line(block):
            self.fault = Fault.LONG_LINE
            return False
        return True

    def _has_long_line(self, block: bytes) -> bool:
        limit = self.max_line_bytes + 2
        if self._column + len(block) <= limit:
            last = block.rfind(b"\n")
            self._column = self._column + len(block) if last < 0 else len(block) - last - 1
            return False
        # From one line end look for the last one that is still within the limit: length / limit steps, not one a line.
        start = -self._column
        while len(block) - start > limit:
            end = block.rfind(b"\n", max(start, 0), start + limit)
            if end < 0:
                return True
            start = end + 1
        last = block.rfind(b"\n", max(start, 0))
        self._column = len(block) - (last + 1 if last >= 0 else start)
        return False


class DataDecoder:
    """Content after DATA, up to CRLF "." CRLF. `block` of each feed stays dot-stuffed.

    With `allow_bare_lf` (the operator listed this client) bare LF become CRLF; a lone "." between bare LF stays
    content and is stuffed, so that nothing but CRLF.CRLF ever ends a message, here or behind us.
    """

    __slots__ = ("_allow_bare_lf", "_checker", "_held", "_lf_start", "_line_start")

    def __init__(self, *, max_bytes: int, max_line_bytes: int, allow_bare_lf: bool = False) -> None:
        self._checker = _Checker(max_bytes, max_line_bytes)
        self._allow_bare_lf = allow_bare_lf
        self._held = b""
        self._line_start = True  # the content so far ends in CRLF, or there is none
        self._lf_start = False  # it ends in a bare LF

    @property
    def fault(self) -> Fault | None:
        """The first rule that the content broke, None while it is good."""
        return self._checker.fault

    @property
    def size_bytes(self) -> int:
        """Octets seen so far in wire form."""
        return self._checker.size_bytes

    @property
    def is_complete(self) -> bool:
        """Never before feed() says so: the end stands in the content."""
        return False

    @property
    def is_hopeless(self) -> bool:
        """Whether as much was dropped behind a fault as a whole message may have: its end need not be waited for."""
        return self._checker.dropped_bytes > self._checker.max_bytes

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What to keep of `data`, and what stands behind the end of the content: None while the end has not come.

        The kept block is empty when the content is faulty; blocks never end inside a CRLF or a look-alike of the end.
        """
        if self._held:
            data, self._held = self._held + data, b""
        # RFC 5321 4.1.1.4: only <CRLF>.<CRLF> ends the content; the first CRLF may be that of the DATA command
        if self._line_start and data[:3] == b".\r\n":
            return b"", data[3:]
        at = data.find(b"\r\n.\r\n")
        if at >= 0:
            return self._keep(data[: at + 2]), data[at + 5 :]
        cut = self._undecided(data)
        if cut:
            self._held, data = data[-cut:], data[:-cut]
        if not data:
            return b"", None
        block = self._keep(data)
        self._line_start = data.endswith(b"\r\n")
        self._lf_start = not self._line_start and data.endswith(b"\n")
        return block, None

    def _undecided(self, data: bytes) -> int:
        """How many octets at the end could be part of a line end or of the end of the content."""
        at_start = self._line_start or self._lf_start
        if data.endswith(b"\r"):
            return 2 if data.endswith(b"\n.\r") or (at_start and data == b".\r") else 1
        return 1 if data.endswith(b"\n.") or (at_start and data == b".") else 0

    def _keep(self, data: bytes) -> bytes:
        if self._allow_bare_lf:
            data = self._normalised(data)
        return data if self._checker.passes(data) else b""

    def _normalised(self, data: bytes) -> bytes:
        data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        data = _LONE_DOT_LINE.sub(b"..", data)
        # no lone dot at the very start can be the end of the content: feed() has looked for that
        if (self._lf_start or self._line_start) and data.startswith(b".\r\n"):
            data = b"." + data
        return data


class BdatDecoder:
    """Content of BDAT chunks (RFC 3030 2): the client counts octets, the same rules hold for lines."""

    __slots__ = ("_checker", "_held", "_line_start", "_remaining")

    def __init__(self, *, max_bytes: int, max_line_bytes: int) -> None:
        self._checker = _Checker(max_bytes, max_line_bytes)
        self._remaining = 0
        self._held = b""
        self._line_start = True

    @property
    def fault(self) -> Fault | None:
        """The first rule that the content broke, None while it is good."""
        return self._checker.fault

    @property
    def size_bytes(self) -> int:
        """Octets seen so far."""
        return self._checker.size_bytes

    @property
    def is_hopeless(self) -> bool:
        """Whether as much was dropped behind a fault as a whole message may have: its end need not be waited for."""
        return self._checker.dropped_bytes > self._checker.max_bytes

    @property
    def is_complete(self) -> bool:
        """Whether the chunk has no octets left to come (a chunk of 0 octets is complete at once)."""
        return not self._remaining

    def begin_chunk(self, size_bytes: int) -> None:
        """A BDAT command announced this many octets."""
        self._remaining = size_bytes
        if self._checker.fault is None and self._checker.size_bytes + size_bytes > self._checker.max_bytes:
            self._checker.fault = Fault.TOO_BIG  # refused before it is read; it is still read and dropped

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What to keep of `data`, and what stands behind the chunk: None while the chunk is incomplete."""
        rest = None
        if len(data) >= self._remaining:
            data, rest = data[: self._remaining], data[self._remaining :]
        self._remaining -= len(data)
        if not data:
            return b"", rest
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(b"\r"):
            self._held, data = b"\r", data[:-1]
        if not data:
            return b"", rest
        self._line_start = data.endswith(b"\n")
        return (data if self._checker.passes(data) else b""), rest

    def finish(self) -> bytes:
        """The last block, after the last chunk: content without a final CRLF gets one."""
        end = b"\r\n" if self._held or not self._line_start else b""
        if self._held and self._checker.fault is None:
            self._checker.fault = Fault.LINE_END
        return end if self._checker.fault is None else b""


def unstuff(stuffed: bytes) -> bytes:
    """Content as the sender meant it (RFC 5321 4.5.2): one leading dot of each line is taken away.

    `stuffed` begins at the start of a line and ends in CRLF.
    """
    if stuffed[:1] == b".":
        stuffed = stuffed[1:]
    return stuffed.replace(b"\r\n.", b"\r\n")


class Unstuffer:
    """Takes the dots away from content that comes in blocks, cut anywhere. The first block begins at a line's start."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before = b"\r\n"  # what came before the next block, as it was on the wire

    def feed(self, block: bytes) -> bytes:
        """The block as the sender meant it; nothing is copied where there is nothing to undo."""
        before, last = self._before, block[-2:]
        self._before = last if len(last) == 2 else (before + last)[-2:]
        # RFC 5321 4.5.2: the dot behind a line end goes, also where the line end came before
        if before == b"\r\n" and block.startswith(b"."):
            block = block[1:]
        elif before.endswith(b"\r") and block.startswith(b"\n."):
            block = b"\n" + block[2:]
        # one octet is looked for much faster than three: attachments in base64 have no dot at all
        return block.replace(b"\r\n.", b"\r\n") if b"." in block else block


def stuff(plain: bytes) -> bytes:
    """The opposite of `unstuff`: a line that begins with a dot gets one more. `plain` begins at the start of a line."""
    if plain[:1] == b".":
        plain = b"." + plain
    return plain.replace(b"\r\n.", b"\r\n..")
