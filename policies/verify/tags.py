"""Tag lists: the syntax that DKIM signatures, DKIM keys and ARC fields share (RFC 6376 3.2).

A list is parsed once, in linear time, into a mapping; what a tag means is for the caller to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

Tags = Mapping[str, bytes]
"""By name, in the order of the list, whose case matters; values without the white space around them."""

# RFC 6376 3.2: ALPHA *(ALPHA / DIGIT / "_")
_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9_]*")
# RFC 6376 3.2: VALCHAR and FWS. What is left when these octets are taken out is in no tag list.
_TEXT = bytes(range(0x20, 0x7F)) + b"\t"
_FOLDS_AND_BEYOND_ASCII = b"\r\n" + bytes(range(0x80, 0x100))
_FWS = b" \t\r\n"
# Names that need no check, since they are all that most lists have
_KNOWN = {name.encode("ascii"): name for name in (*"vabcdhilqstxzknp", "bh", "cv")}


class TagError(ValueError):
    """The octets are no tag list; the text says why and holds nothing of them."""


def parse_tags(value: bytes, *, utf8: bool = False) -> dict[str, bytes]:
    """The tags of a field's value or of a key record. Raises TagError.

    White space inside of values stays, for what it means differs from tag to tag. Octets beyond ASCII are refused,
    but UTF-8 is not with `utf8`, for messages that may have it in their header (RFC 8616 5).
    """
    _check_octets(value, utf8=utf8)
    specs = value.split(b";")
    if len(specs) > 1 and not specs[-1].strip(_FWS):
        specs.pop()  # the last ";" ends the list
    tags: dict[str, bytes] = {}
    for spec in specs:
        name, equals, text = spec.partition(b"=")
        name = name.strip(_FWS)
        if not equals:
            raise TagError("a tag has no value")
        key = _KNOWN.get(name) or _checked_name(name)
        # RFC 6376 3.2: tags with duplicate names MUST NOT occur; if they do, the entire list is invalid
        if key in tags:
            raise TagError("a tag stands twice")
        tags[key] = text.strip(_FWS)
    return tags


def without_tag(value: bytes, tag: bytes) -> bytes:
    """A tag list with the value of this tag taken out in place, with the white space around it (RFC 6376 3.7)."""
    # the group stays, and what stands around the matches
    return b"".join(_value_of(tag).split(b";" + value))[1:]


@cache
def _value_of(tag: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"(;[ \t\r\n]*+%b[ \t\r\n]*+=)[^;]*+" % re.escape(tag))


def without_space(value: bytes) -> bytes:
    """A value in which white space means nothing (base64)."""
    return b"".join(value.split())


def colon_list(value: bytes) -> list[bytes]:
    """The members of a list such as that of h=, each without the white space around it."""
    return [member.strip(_FWS) for member in value.split(b":")]


def _checked_name(name: bytes) -> str:
    if not _NAME.fullmatch(name):
        raise TagError("a tag has no name")
    return name.decode("ascii")


def _check_octets(value: bytes, *, utf8: bool) -> None:
    rest = value.translate(None, _TEXT)
    if not rest:
        return
    if rest.translate(None, _FOLDS_AND_BEYOND_ASCII):
        raise TagError("a tag holds a control character")
    if not rest.isascii():
        if not utf8:
            raise TagError("a tag holds an octet beyond ASCII")
        try:
            value.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise TagError("a tag holds what is not UTF-8") from exc
    # a line end stands before white space only, else it is no folding
    folds = value.count(b"\r\n ") + value.count(b"\r\n\t")
    if rest.count(b"\r") + rest.count(b"\n") != 2 * folds:
        raise TagError("a tag holds a line end that is no folding")
