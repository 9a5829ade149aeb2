"""SPF records: from the text of a TXT record to directives and modifiers (RFC 7208 3, 4.5, 4.6, 5, 6, 12).

The whole record is checked before any of it is evaluated, since a syntax error anywhere is a permerror (RFC 7208
4.6). Parsing takes time and memory in proportion to the text, which has a bound. Nothing here asks DNS; check.py
evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from ipaddress import IPv6Address
from typing import NamedTuple

from gateway.api import Result
from policies.verify.spf.macro import MacroError, MacroString, parse_macro_string

# Ours. RFC 7208 3.4 asks for 450 octets or less; of records of 64 kB, one behind the other, a check would take seconds.
MAX_OCTETS = 8192
# What is remembered is bounded in memory: longer records and terms are parsed each time.
_CACHED_RECORDS = 512
_CACHED_OCTETS = 1024
_CACHED_TERMS = 2048
_CACHED_TERM_OCTETS = 64

_VERSION = b"v=spf1"
# RFC 7208 4.6.1: printable, and parted by spaces only
_PRINTABLE = re.compile(rb"[\x20-\x7e]*")
_MODIFIER = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)=(.*)")
_DIRECTIVE = re.compile(r"([-+?~]?)([A-Za-z0-9]+)(.*)")
# RFC 7208 5.6: no leading zeros
_PREFIX = r"(0|[1-9][0-9]{0,2})"
_OCTET = "(?:0|[1-9][0-9]{0,2})"
_CIDR4 = re.compile(rf"({_OCTET}(?:\.{_OCTET}){{3}})(?:/{_PREFIX})?")
# no zone identifiers, which ipaddress would take
_CIDR6 = re.compile(rf"([0-9A-Fa-f.:]+)(?:/{_PREFIX})?")
_DUAL_CIDR = re.compile(rf"(?:/{_PREFIX})?(?://{_PREFIX})?\Z")
_LDH = re.compile(r"[0-9A-Za-z-]+")


class Mechanism(Enum):
    """RFC 7208 5."""

    ALL = "all"
    INCLUDE = "include"
    A = "a"
    MX = "mx"
    PTR = "ptr"
    IP4 = "ip4"
    IP6 = "ip6"
    EXISTS = "exists"


QUALIFIERS = {
    "": Result.PASS,
    "+": Result.PASS,
    "-": Result.FAIL,
    "~": Result.SOFTFAIL,
    "?": Result.NEUTRAL,
}


class Directive(NamedTuple):
    """One mechanism with its qualifier. `target` None stands for the current domain.

    ip4 and ip6: a client of this `version` matches when `address & mask == network`. a and mx: `mask4` and `mask6`
    are the masks of the prefix lengths.
    """

    text: str
    result: Result
    mechanism: Mechanism
    target: MacroString | None = None
    version: int = 0
    network: int = 0
    mask: int = 0
    mask4: int = (1 << 32) - 1
    mask6: int = (1 << 128) - 1


class Record(NamedTuple):
    """What a domain publishes; unknown modifiers are checked and left out (RFC 7208 6)."""

    text: str
    directives: tuple[Directive, ...]
    redirect: MacroString | None
    exp: MacroString | None


class RecordError(ValueError):
    """RFC 7208 4.6: a syntax error. The message says what in plain words; `term` is the text it is about."""

    def __init__(self, problem: str, term: str = "") -> None:
        super().__init__(problem)
        self.term = term


def is_record(text: bytes) -> bool:
    """RFC 7208 4.5: the version is the whole text or ends at a space, in any case of letters."""
    return text[:6].lower() == _VERSION and text[6:7] in (b"", b" ")


def parse_record(text: bytes) -> Record:
    """The record of a text of which `is_record` is true. Raises RecordError."""
    return _parse_short(text) if len(text) <= _CACHED_OCTETS else _parse(text)


def _parse(text: bytes) -> Record:
    if len(text) > MAX_OCTETS:
        raise RecordError(f"more than {MAX_OCTETS} octets")
    if not _PRINTABLE.fullmatch(text):
        raise RecordError("characters other than printable ASCII")
    readable = text.decode("ascii")
    directives: list[Directive] = []
    modifiers: dict[str, MacroString] = {}
    for term in readable[len(_VERSION) :].split(" "):
        if not term:
            continue
        try:
            if modifier := _MODIFIER.fullmatch(term):
                _add_modifier(modifiers, modifier[1].lower(), modifier[2])
            else:
                directives.append(_directive(term))
        except MacroError as exc:
            raise RecordError(str(exc), term) from exc
        except RecordError as exc:
            raise RecordError(str(exc), term) from None
    return Record(readable, tuple(directives), modifiers.get("redirect"), modifiers.get("exp"))


# A pure function remembered: a few records stand behind most mail
_parse_short = lru_cache(maxsize=_CACHED_RECORDS)(_parse)


def _add_modifier(modifiers: dict[str, MacroString], name: str, value: str) -> None:
    if name not in ("redirect", "exp"):
        # RFC 7208 6: ignored whatever it says, as long as it is a macro-string (12: unknown-modifier)
        parse_macro_string(value)
        return
    # RFC 7208 6: each of the two at most once
    if name in modifiers:
        raise RecordError(f"more than one {name}=")
    modifiers[name] = _domain_spec(value)


def _directive(term: str) -> Directive:
    return _short_directive(term) if len(term) <= _CACHED_TERM_OCTETS else _parse_directive(term)


def _parse_directive(term: str) -> Directive:
    found = _DIRECTIVE.fullmatch(term)
    parse = _MECHANISMS.get(found[2].lower()) if found else None
    if found is None or parse is None:
        # RFC 7208 4.6.1, 5: unknown mechanisms are syntax errors
        raise RecordError("unknown mechanism")
    return parse(found[3], text=term, result=QUALIFIERS[found[1]])


# The same few terms, of large providers, stand in the records of many domains
_short_directive = lru_cache(maxsize=_CACHED_TERMS)(_parse_directive)


def _all(rest: str, *, text: str, result: Result) -> Directive:
    if rest:
        raise RecordError("all takes no argument")
    return Directive(text, result, Mechanism.ALL)


def _named(rest: str, *, text: str, result: Result, mechanism: Mechanism) -> Directive:
    """include, exists and ptr; RFC 7208 5.5: ptr alone may go without a domain-spec."""
    if not rest and mechanism is Mechanism.PTR:
        return Directive(text, result, mechanism)
    return Directive(text, result, mechanism, _argument(rest))


def _addresses(rest: str, *, text: str, result: Result, mechanism: Mechanism) -> Directive:
    """RFC 7208 5.3, 5.4, 5.6: a and mx. A domain-spec may hold slashes: the prefix lengths are what ends the term."""
    cidr = _DUAL_CIDR.search(rest)
    assert cidr is not None  # it matches at the end at the latest
    name = rest[: cidr.start()]
    return Directive(
        text,
        result,
        mechanism,
        _argument(name) if name else None,
        mask4=_mask(cidr[1], 32),
        mask6=_mask(cidr[2], 128),
    )


def _network(rest: str, *, text: str, result: Result, version: int) -> Directive:
    """RFC 7208 5.6: ip4 and ip6. Bits behind the prefix do not count."""
    cidr = (_CIDR4 if version == 4 else _CIDR6).fullmatch(rest[1:]) if rest[:1] == ":" else None
    if cidr is None:
        raise RecordError(f"invalid ip{version} network")
    try:
        # octets above 255 are a ValueError of bytes
        address = (
            int.from_bytes(bytes(map(int, cidr[1].split(".")))) if version == 4 else int(IPv6Address(cidr[1]))
        )
    except ValueError as exc:
        raise RecordError(f"invalid ip{version} network") from exc
    mask = _mask(cidr[2], 32 if version == 4 else 128)
    mechanism = Mechanism.IP4 if version == 4 else Mechanism.IP6
    return Directive(text, result, mechanism, version=version, network=address & mask, mask=mask)


def _mask(prefix: str | None, bits: int) -> int:
    length = bits if prefix is None else int(prefix)
    if length > bits:
        raise RecordError("prefix length too long")
    return (1 << bits) - (1 << (bits - length))


def _argument(rest: str) -> MacroString:
    if rest[0:1] != ":":
        raise RecordError("a domain is missing or misplaced")
    return _domain_spec(rest[1:])


def _domain_spec(text: str) -> MacroString:
    """RFC 7208 7.1: a macro-string that ends with a macro or a top label."""
    spec = parse_macro_string(text)
    if not spec.ends_with_macro:
        # the last part is literal; the dot before a top label stands in it too, since no macro holds a literal dot
        last = spec.parts[-1] if spec.parts else ""
        assert isinstance(last, str)
        _, dot, label = last.removesuffix(".").rpartition(".")
        is_top_label = _LDH.fullmatch(label) and "-" not in (label[0], label[-1]) and not label.isdigit()
        if not (dot and is_top_label):
            raise RecordError("invalid domain")
    return spec


_MECHANISMS: dict[str, Callable[..., Directive]] = {
    "all": _all,
    "include": partial(_named, mechanism=Mechanism.INCLUDE),
    "exists": partial(_named, mechanism=Mechanism.EXISTS),
    "ptr": partial(_named, mechanism=Mechanism.PTR),
    "a": partial(_addresses, mechanism=Mechanism.A),
    "mx": partial(_addresses, mechanism=Mechanism.MX),
    "ip4": partial(_network, version=4),
    "ip6": partial(_network, version=6),
}
