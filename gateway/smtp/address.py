"""Addresses of the SMTP envelope: Domain, AddressLiteral, Mailbox, and the paths of MAIL and RCPT.

RFC 5321 4.1.2 and 4.1.3 (grammar), 4.5.3.1 (limits); RFC 6531 3.3 (UTF-8); RFC 5890 and 5891 (IDNA 2008); RFC
1035 2.3.4 (limits of names). Text becomes a value here once, at the border; behind it nobody parses again.

A value is valid however it was made: the constructors refuse what the parsers refuse. Nothing is repaired:
what is not in the grammar is an AddressError, because a repaired address may be another one to the next hop.
No value can hold a control character, a line end of Unicode or a lone surrogate.

Domains are lower-case A-labels whatever form they came in; the local part stays as the client gave it, since only
its own domain may interpret it (RFC 5321 2.3.11). This is not the parser of header fields (RFC 5322).

Every length is bounded before a pattern runs, and the patterns can match a text in one way only, so the time for
one address is bounded. Called by command.py for the wire, by config.py, the policies and the verifiers for domains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import final

import idna

from gateway.errors import GatewayError

# RFC 1035 2.3.4: a name has at most 255 octets with its length octets and the root, which is 253 as text
MAX_DOMAIN = 253
# RFC 1035 2.3.4
MAX_LABEL = 63
# RFC 5321 4.5.3.1.1
MAX_LOCAL = 64
# RFC 5321 4.5.3.1.3: octets, with the angle brackets
MAX_PATH = 256

_CACHED_DOMAINS = 4096

# RFC 5321 4.1.2: sub-domain = Let-dig [Ldh-str]; a label of more than 63 octets does not match
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")

# What no part of an address may hold: ASCII and C1 controls, the line ends of Unicode, surrogates (RFC 3629 3)
_FORBIDDEN = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
# RFC 5322 3.2.3: atext is what is printable and no special; RFC 6531 3.3: and UTF-8 beyond ASCII
_ATEXT = rf'[^ "(),.:;<>@\[\\\]{_FORBIDDEN}]'
# RFC 5321 4.1.2: qtextSMTP, quoted-pairSMTP; RFC 6531 3.3: qtextSMTP =/ UTF8-non-ascii
_QCONTENT = rf'(?:[^"\\{_FORBIDDEN}]|\\[\x20-\x7e])'
_LOCAL = re.compile(rf'{_ATEXT}++(?:\.{_ATEXT}++)*|"{_QCONTENT}*"')
_QUOTED_PAIR = re.compile(r"\\(.)")


class AddressFault(StrEnum):
    """What is wrong with an address, as far as it changes the reply."""

    SYNTAX = "syntax"
    ROUTE = "route"  # it is a source route
    UTF8 = "utf8"  # it needs SMTPUTF8, which this transaction does not have


class AddressError(GatewayError):
    """Text is no address. The message holds the text escaped; it is for the log, never for the client."""

    def __init__(self, kind: AddressFault, text: str, why: str) -> None:
        super().__init__(f"{text[:MAX_PATH]!a} {why}")
        self.kind = kind


@final
class Domain(str):
    """A domain name as lower-case A-labels, without a trailing dot: "example.org", "xn--bcher-kva.example".

    It is a `str` and equals, hashes, sorts and prints as one. Raises AddressError (SYNTAX) for what `parse` refuses.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Domain:
        """The same as `parse`, so that no other text can become a Domain."""
        return _parse_domain(text)

    @classmethod
    def parse(cls, text: str) -> Domain:
        """A domain from A-labels, U-labels and other LDH labels; the case of ASCII labels does not matter.

        Raises AddressError (SYNTAX): over 253 octets, a label that is empty, over 63 octets or not LDH (so no
        underscore), a trailing dot, digits only as the last label, an A-label or U-label that IDNA 2008 refuses.
        """
        return _parse_domain(text)

    def is_subdomain_of(self, other: Domain) -> bool:
        """Whether it lies below the other one; a domain is not its own subdomain."""
        return self.endswith(f".{other}")


# A pure function remembered: most mail of an hour comes from few domains, and checking a U-label is slow
@lru_cache(maxsize=_CACHED_DOMAINS)
def _parse_domain(text: str) -> Domain:
    if len(text) > MAX_DOMAIN:
        raise AddressError(AddressFault.SYNTAX, text, f"is a domain of more than {MAX_DOMAIN} octets")
    # str.lower() makes ASCII of U+212A KELVIN SIGN, so it must not see anything beyond ASCII
    name = text.lower() if text.isascii() else text
    if "xn--" in name or not name.isascii():
        name = ".".join([_to_ascii(label) for label in name.split(".")])
    if len(name) > MAX_DOMAIN or not _DOMAIN.fullmatch(name):
        raise AddressError(AddressFault.SYNTAX, text, "is no domain")
    # RFC 3696 2: the last label is not all-numeric; so an IPv4 address without brackets is no domain
    if name[name.rfind(".") + 1 :].isdigit():
        raise AddressError(AddressFault.SYNTAX, text, "ends like an IPv4 address")
    return str.__new__(Domain, name)


def _to_ascii(label: str) -> str:
    """The A-label of a U-label; any other label as it is, when it pretends to be no more than it is."""
    if len(label) > MAX_LABEL:
        raise AddressError(AddressFault.SYNTAX, label, f"is a label of more than {MAX_LABEL} octets")
    lower = label.lower() if label.isascii() else label
    if lower.isascii() and not lower.startswith("xn--"):
        return lower
    # STYLE 12 has foreign errors mapped in adapters; docs/adr/0001-idna.md says why idna is used here
    try:
        # RFC 5891 5.3, 5.4: an A-label must decode to a valid U-label and be the A-label of it.
        # RFC 5891 4.2.2, RFC 5892 2.2: upper-case, full-width and other forms that a mapping (RFC 5895, UTS 46)
        # would change are DISALLOWED; RFC 5321 and 6531 allow no mapping on the wire. So also in a label where
        # only ASCII letters are upper-case: it is no U-label.
        a_label = idna.alabel(idna.ulabel(lower)).decode("ascii")
    except ValueError as exc:  # idna.IDNAError, and UnicodeError of the Punycode codec
        raise AddressError(AddressFault.SYNTAX, label, "is not valid in IDNA 2008") from exc
    # RFC 5890 2.3.2.1: else it is a fake A-label; idna itself looks for them only of late
    if lower.isascii() and a_label != lower:
        raise AddressError(AddressFault.SYNTAX, label, "is no canonical A-label")
    return a_label


@dataclass(frozen=True, slots=True)
class AddressLiteral:
    """RFC 5321 4.1.3: an address in the place of a domain; `str` gives "[192.0.2.1]", "[IPv6:2001:db8::1]"."""

    address: IPv4Address | IPv6Address

    @classmethod
    def parse(cls, text: str) -> AddressLiteral:
        """A literal with its brackets. Raises AddressError (SYNTAX), also for tags that are not "IPv6:"."""
        # the longest: "[IPv6:", eight groups of four digits with their colons, or six and an IPv4 address, "]"
        if len(text) > len("[IPv6:]") + 45 or text[:1] != "[" or text[-1:] != "]":
            raise AddressError(AddressFault.SYNTAX, text, "is no address literal")
        inner = text[1:-1]
        try:
            if inner[:5].upper() != "IPV6:":
                return cls(IPv4Address(inner))
            # RFC 5321 4.1.3 has no zone identifier, ipaddress has
            if "%" not in inner:
                return cls(IPv6Address(inner[5:]))
        except ValueError:
            pass
        raise AddressError(AddressFault.SYNTAX, text, "is no address literal")

    def __str__(self) -> str:
        return f"[IPv6:{self.address}]" if self.address.version == 6 else f"[{self.address}]"


@dataclass(frozen=True, slots=True)
class Mailbox:
    """RFC 5321 2.3.11: local part and domain. `domain` is None only for the bare `postmaster` (4.1.1.3).

    `local` is as the client gave it: a dot-string, or a quoted string with its quotes; so two mailboxes are equal
    when they are written alike, "a"@example.org is not a@example.org. Raises AddressError (SYNTAX).
    """

    local: str
    domain: Domain | AddressLiteral | None
    text: str = field(init=False, repr=False, compare=False)
    """As it stands between the angle brackets on the wire, what `str` gives."""

    def __post_init__(self) -> None:
        local, domain = self.local, self.domain
        if len(local) > MAX_LOCAL or not _LOCAL.fullmatch(local):
            raise AddressError(AddressFault.SYNTAX, local, "is no local part")
        octets = len(local) if local.isascii() else len(local.encode())
        if octets > MAX_LOCAL:
            raise AddressError(AddressFault.SYNTAX, local, f"has more than {MAX_LOCAL} octets")
        if domain is None:
            # RFC 5321 4.1.1.3, 4.5.1: <Postmaster>, in any case, is the one mailbox without a domain
            if local.lower() != "postmaster":
                raise AddressError(AddressFault.SYNTAX, local, "has no domain")
        # A-labels may be longer than the U-labels that were given: what we write keeps to the limit
        elif isinstance(domain, Domain) and octets + len(domain) + len("<@>") > MAX_PATH:
            raise AddressError(AddressFault.SYNTAX, local, f"is in a path of more than {MAX_PATH} octets")
        object.__setattr__(self, "text", local if domain is None else f"{local}@{domain}")

    @property
    def local_value(self) -> str:
        """The local part without its quotes and quoted pairs: what its own domain compares."""
        return _QUOTED_PAIR.sub(r"\1", self.local[1:-1]) if self.local[0] == '"' else self.local

    @property
    def is_ascii(self) -> bool:
        """Whether it can be sent without SMTPUTF8; its domain always can."""
        return self.local.isascii()

    def __str__(self) -> str:
        return self.text


def parse_forward_path(text: str, *, smtputf8: bool) -> Mailbox:
    """The Mailbox of `<local@domain>` or `<postmaster>`, as RCPT TO has it. Raises AddressError.

    `smtputf8` tells whether the transaction was begun with SMTPUTF8 (RFC 6531 3.4).
    """
    return _parse_path(text, smtputf8=smtputf8)


def parse_reverse_path(text: str, *, smtputf8: bool) -> Mailbox | None:
    """The Mailbox of `<local@domain>`, as MAIL FROM has it, and None for the null one `<>`. Raises AddressError."""
    if text == "<>":
        return None
    mailbox = _parse_path(text, smtputf8=smtputf8)
    # RFC 5321 4.1.1.2: Reverse-path = Path / "<>"; the bare postmaster is for RCPT alone
    if mailbox.domain is None:
        raise AddressError(AddressFault.SYNTAX, text, "has no domain")
    return mailbox


def _parse_path(text: str, *, smtputf8: bool) -> Mailbox:
    # RFC 6531 3.4: without the SMTPUTF8 parameter of MAIL a path is ASCII
    if not smtputf8 and not text.isascii():
        raise AddressError(AddressFault.UTF8, text, "needs SMTPUTF8")
    if len(text) > MAX_PATH or text[:1] != "<" or text[-1:] != ">":
        raise AddressError(AddressFault.SYNTAX, text, "is no path")
    # RFC 5321 4.1.2: Path = "<" [ A-d-l ":" ] Mailbox ">", and A-d-l begins with "@"
    if text[1] == "@" and ":" in text:
        raise AddressError(AddressFault.ROUTE, text, "is a source route")
    # neither a domain nor an address literal holds an "@", so the last one parts them, quoted or not
    local, at, domain = text[1:-1].rpartition("@")
    if not at:
        return Mailbox(domain, None)
    return Mailbox(local, AddressLiteral.parse(domain) if domain[:1] == "[" else Domain.parse(domain))
