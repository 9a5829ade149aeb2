"""Content on its way out: our fields, then the message, dot-stuffed, then the dot.

A dot behind a line that has no CRLF would not end the content, and what follows would be read as content; so content
that does not end with CRLF is a ValueError, raised before the dot exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gateway.relaying import Content
from gateway.smtp.client import END_OF_CONTENT, DotStuffer

_END = b"\r\n" + END_OF_CONTENT
_OPEN_LINE = "content does not end with CRLF"


def whole(content: Content) -> bytes:
    """All of it, with the dot that ends it. Raises ValueError for an open line."""
    wire = b"".join((content.prefix, *_blocks(content), END_OF_CONTENT))
    if not wire.endswith(_END) and wire != END_OF_CONTENT:
        raise ValueError(_OPEN_LINE)
    return wire


def pieces(content: Content) -> Iterator[bytes]:
    """The same in blocks and without the dot. Raises ValueError at the end for an open line."""
    tail = b"\r\n"
    if content.prefix:
        tail = content.prefix[-2:]
        yield content.prefix
    for block in _blocks(content):
        if block:
            tail = (tail + block[-2:])[-2:]
            yield block
    if tail != b"\r\n":
        raise ValueError(_OPEN_LINE)


def _blocks(content: Content) -> Iterable[bytes]:
    return content.blocks() if content.is_stuffed else DotStuffer().stuff_all(content.blocks())
