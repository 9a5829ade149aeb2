"""Content on its way out: our fields, then the message, in wire blocks."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.relaying import Content
from gateway.smtp.client import DotStuffer


def wire_blocks(content: Content) -> Iterator[bytes]:
    """All of the content dot-stuffed, without the dot that ends it.

    Raises ValueError at the end of content whose last line has no CRLF: the dot would not end it, and what follows
    would be read as content.
    """
    tail = b"\r\n"
    if content.prefix:
        tail = content.prefix[-2:]
        yield content.prefix
    for block in content.blocks() if content.is_stuffed else DotStuffer().stuff_all(content.blocks()):
        if block:
            tail = (tail + block[-2:])[-2:]
            yield block
    if tail != b"\r\n":
        raise ValueError("content does not end with CRLF")
