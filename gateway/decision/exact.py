"""What a replay needs to the octet: DNS records, digests and header octets as texts that are read back as they were.

A TXT record is written as master files write it (RFC 1035 5.1): printable ASCII as it is but for the backslash, all
else as a backslash and three decimal digits. So a person reads it, and it is exact.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

from gateway.lookup import Mx, Record, RRType

_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("\\")}
_NOT_PLAIN = re.compile(rb"[^\x20-\x5b\x5d-\x7e]")
_ESCAPE = re.compile(rb"\\(?:\\|([0-9]{3}))")


def record_text(record: Record) -> str:
    """One record as text; `parse_record` gives it back."""
    match record:
        case Mx():
            return f"{record.preference} {record.host}"
        case bytes():
            return _NOT_PLAIN.sub(_escaped, record).decode("ascii")
        case _:
            return str(record)


def parse_record(rrtype: RRType, text: str) -> Record:
    """The record of a text that `record_text` has made. Raises ValueError for any other."""
    match rrtype:
        case RRType.A:
            return IPv4Address(text)
        case RRType.AAAA:
            return IPv6Address(text)
        case RRType.MX:
            preference, _, host = text.partition(" ")
            if not (preference.isascii() and preference.isdecimal() and len(preference) <= 5):
                raise ValueError(f"{text[:80]!a} is no MX record")
            return Mx(int(preference), host)
        case RRType.TXT:
            octets = text.encode("ascii")
            if b"\\" in _ESCAPE.sub(b"", octets) or not set(octets) <= _PLAIN | {ord("\\")}:
                raise ValueError(f"{text[:80]!a} is no TXT record")
            return _ESCAPE.sub(_unescaped, octets)
        case RRType.NS | RRType.PTR:
            return text


def _escaped(match: re.Match[bytes]) -> bytes:
    octet = match[0][0]
    return b"\\\\" if octet == ord("\\") else b"\\%03d" % octet


def _unescaped(match: re.Match[bytes]) -> bytes:
    if match[1] is None:
        return b"\\"
    octet = int(match[1])
    if octet > 0xFF:
        raise ValueError(f"\\{octet} is no octet")
    return bytes([octet])
