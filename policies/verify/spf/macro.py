"""Macros of SPF: parse a macro-string once, expand it for each message (RFC 7208 7).

Expansion is text to text: who needs `%{p}` fetches it first (`needs_p`). What comes out is as hostile as what went
in; its length is bounded by the callers' limits, not by the record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote_from_bytes

# RFC 7208 7.3: the longest domain name as text
MAX_NAME = 253

_LETTERS = frozenset("slodiphv")
# RFC 7208 7.2: these are allowed in explanations only
_EXPLAINING_LETTERS = _LETTERS | frozenset("crt")
# RFC 7208 7.1: macro-expand, or macro-literals up to the next "%"; delimiters need no order, so no backtracking
_TOKEN = re.compile(r"%(?:[%_-]|\{([A-Za-z])([0-9]*)([rR]?)([-.+,/_=]*)\})|[^%]+")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_ESCAPES = {"%%": "%", "%_": " ", "%-": "%20"}


class MacroError(ValueError):
    """The text is no macro-string; the message says why in plain words."""


class Macro(NamedTuple):
    """One `%{...}`: letter in lower case, how many parts are kept (0: all), and what to do with the value."""

    letter: str
    keep: int
    is_reversed: bool
    delimiters: str
    is_escaped: bool

    def of(self, values: Mapping[str, str]) -> str:
        """Its text, from the values by letter."""
        value = values[self.letter]
        if self.keep or self.is_reversed or self.delimiters:
            # RFC 7208 7.3: split at the delimiters, by default dots; joined by dots whatever they were
            delimiters = self.delimiters or "."
            for each in delimiters[1:]:
                value = value.replace(each, delimiters[0])
            parts = value.split(delimiters[0])
            if self.is_reversed:
                parts.reverse()
            value = ".".join(parts[-self.keep :])
        # RFC 7208 7.3: an upper-case letter asks for URL escaping of all but the unreserved characters
        return quote_from_bytes(value.encode("utf-8", "surrogatepass"), safe="") if self.is_escaped else value


class MacroString(NamedTuple):
    """Literal texts and macros in their order. `fixed` is the whole text where there is no macro."""

    parts: tuple[str | Macro, ...]
    fixed: str | None
    ends_with_macro: bool
    needs_p: bool


def parse_macro_string(text: str, *, is_explanation: bool = False) -> MacroString:
    """A macro-string of printable ASCII; `%{c}`, `%{r}` and `%{t}` only in an explanation. Raises MacroError."""
    letters = _EXPLAINING_LETTERS if is_explanation else _LETTERS
    if not _PRINTABLE.fullmatch(text):
        # RFC 7208 7.1: macro-literal; 6.2: explain-string has SP too, terms are parted by it
        raise MacroError("characters other than printable ASCII")
    parts: list[str | Macro] = []
    ends_with_macro = False
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            # RFC 7208 7.1: "%" that begins no macro-expand is a syntax error
            raise MacroError("invalid macro")
        at = token.end()
        ends_with_macro = token[0][0] == "%"
        parts.append(_ESCAPES.get(token[0], token[0]) if token[1] is None else _macro(token, letters))
    macros = [part for part in parts if isinstance(part, Macro)]
    return MacroString(
        tuple(parts),
        None if macros else "".join([part for part in parts if isinstance(part, str)]),
        ends_with_macro,
        any(macro.letter == "p" for macro in macros),
    )


def _macro(token: re.Match[str], letters: frozenset[str]) -> Macro:
    letter, digits, reverse, delimiters = token.groups()
    if letter.lower() not in letters:
        raise MacroError("unknown macro letter, or one for explanations only")
    significant = digits.lstrip("0")
    # RFC 7208 7.3: a number has to be nonzero
    if digits and not significant:
        raise MacroError("a macro that keeps no part")
    # four digits are more than any value has parts, and int() does not take thousands of them
    keep = int(significant[:4] or "0")
    unique = "".join(dict.fromkeys(delimiters))
    return Macro(letter.lower(), keep, bool(reverse), unique, letter.isupper())


def expand_domain(spec: MacroString, values: Mapping[str, str]) -> str:
    """A domain-spec as a name without its final dot, of at most 253 characters (RFC 7208 7.3); maybe no valid name."""
    if spec.fixed is not None and len(spec.fixed) <= MAX_NAME:
        return spec.fixed.removesuffix(".")
    # from the right, and no further than can count: a record may hold thousands of macros
    pieces: list[str] = []
    length = 0
    for part in reversed(spec.parts):
        piece = part if isinstance(part, str) else part.of(values)
        pieces.append(piece)
        length += len(piece)
        if length > MAX_NAME + 1:
            break
    name = "".join(reversed(pieces)).removesuffix(".")
    if len(name) > MAX_NAME:
        # RFC 7208 7.3: whole labels are removed from the left until it fits
        name = name[-MAX_NAME - 1 :].partition(".")[2]
    return name


def expand_text(text: MacroString, values: Mapping[str, str], limit: int) -> str:
    """An explanation, cut to `limit` characters."""
    pieces: list[str] = []
    length = 0
    for part in text.parts:
        piece = part if isinstance(part, str) else part.of(values)
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            break
    return "".join(pieces)[:limit]
