"""A message in a file as a client would send it: blocks of content with CRLF, and what is wrong with it on the wire.

A file whose first line ends in LF alone is a mail file: each LF is a line end. Any other is taken for the content as
it came, so that a bare LF in it is what a client would have sent. The line that mbox files begin with is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from gateway.mail.body import BLOCK_BYTES
from gateway.smtp.content import BdatDecoder, Fault

_MBOX = b"From "
# RFC 5321 4.5.3.1.6 wants 1000; a first line that is longer has other troubles
_MAX_MBOX_LINE = 4096


class MailFile:
    """The content of a file: take `blocks` to their end, then `fault` says why a session would refuse it."""

    def __init__(self, file: BinaryIO, *, max_bytes: int, max_line_bytes: int) -> None:
        self._file = file
        self._decoder = BdatDecoder(max_bytes=max_bytes, max_line_bytes=max_line_bytes)

    @property
    def fault(self) -> Fault | None:
        """The rule that the content breaks, None when it breaks none."""
        return self._decoder.fault

    def blocks(self) -> Iterator[bytes]:
        """The content, until its end or its first fault; each block of at most 64 KiB."""
        for block in self._crlf():
            for at in range(0, len(block), BLOCK_BYTES):
                piece = block[at : at + BLOCK_BYTES]
                self._decoder.begin_chunk(len(piece))
                yield self._decoder.feed(piece)[0]
            if self.fault is not None:
                return
        yield self._decoder.finish()

    def _crlf(self) -> Iterator[bytes]:
        block = self._read()
        if block.startswith(_MBOX):
            while b"\n" not in block and len(block) < _MAX_MBOX_LINE and (more := self._read()):
                block += more
            block = block.partition(b"\n")[2] or self._read()
        end = block.find(b"\n")
        is_wire = end > 0 and block[end - 1] == ord("\r")
        held = b""
        while block:
            if is_wire:
                yield block
            else:
                block = held + block
                # the LF of a CRLF may begin the next block
                held = b"\r" if block.endswith(b"\r") else b""
                block = block[: len(block) - len(held)]
                yield block.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            block = self._read()
        if held:
            yield held

    def _read(self) -> bytes:
        return self._file.read(BLOCK_BYTES)
