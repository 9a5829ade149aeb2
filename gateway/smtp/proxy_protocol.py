"""The PROXY header that a balancer sends before everything else: versions 1 and 2 of HAProxy's proxy-protocol.txt.

    found = read_header(data)       # a ProxyHeader, or how many octets are missing at least

Pure: bytes in, a ProxyHeader, a number or ProxyHeaderError out. Who may send a header, and how long it is waited for,
is the listener's matter. TLVs are skipped, not looked at: nothing here needs them. The sending side is
`gateway.smtp.client.proxy_v2`.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.errors import GatewayError
from gateway.session import unmapped

# proxy-protocol.txt 2.1: the longest line with its CRLF
_V1_MAX_BYTES = 107
_V1_BEGIN = b"PROXY "
# The fields behind PROXY with the length of the shortest: addresses, ports. UNKNOWN has none that count.
_V1_SHORTEST = {b"TCP4": (7, 7, 1, 1), b"TCP6": (2, 2, 1, 1), b"UNKNOWN": ()}
_V1_SHORTEST_BYTES = len(b"PROXY UNKNOWN\r\n")

# 2.2: signature; version and command; family and protocol; length of what follows
_V2 = struct.Struct("!12sBBH")
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
# The values that 2.2 defines, all others "must be rejected", and how long their addresses are
_V2_ADDRESS_BYTES = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}
_V2_TCP4, _V2_TCP6 = 0x11, 0x21
_V2_MAX_LENGTH = 4096  # of addresses and TLVs; a client's certificate is the longest that balancers send

MAX_HEADER_BYTES = _V2.size + _V2_MAX_LENGTH
"""No header is longer, of whichever version."""

Endpoint = tuple[IPv4Address | IPv6Address, int]


class ProxyHeaderError(GatewayError):
    """What came is no PROXY header and cannot become one; the text says why and repeats nothing of it."""


class HeaderKind(StrEnum):
    """What a header says; also a label of a metric."""

    PROXIED = "proxied"  # the connection is this client's
    LOCAL = "local"  # it is the balancer's own: a health check
    UNKNOWN = "unknown"  # it is a client's, and the balancer cannot tell which


class ProxyHeader(NamedTuple):
    """A whole header: `size` octets long; `client` is None unless it is PROXIED, and IPv4 where it came IPv4-mapped."""

    kind: HeaderKind
    client: Endpoint | None
    size: int


def read_header(data: bytes) -> ProxyHeader | int:
    """The header at the begin of `data`, or the number of octets that are missing at least.

    Whoever reads no more than that reads nothing of what stands behind the header. Raises ProxyHeaderError when no
    header can come of it, without waiting for the rest; one longer than MAX_HEADER_BYTES is none.
    """
    if not data:
        return _V1_SHORTEST_BYTES
    return _read_v2(data) if data[:1] == _V2_SIGNATURE[:1] else _read_v1(data)


# --- version 1: a line ---------------------------------------------------------------------------------


def _read_v1(data: bytes) -> ProxyHeader | int:
    if data[: len(_V1_BEGIN)] != _V1_BEGIN[: len(data)]:
        raise ProxyHeaderError("not a PROXY header")
    end = data.find(b"\r\n", 0, _V1_MAX_BYTES)
    line = data[:end] if end >= 0 else data[:_V1_MAX_BYTES].removesuffix(b"\r")
    if not (line.isascii() and line.decode("ascii").isprintable()):
        raise ProxyHeaderError("a control or 8-bit character in the line")
    protocol, *fields = line[len(_V1_BEGIN) :].split(b" ")
    if protocol not in _V1_SHORTEST and (fields or end >= 0):
        raise ProxyHeaderError("neither TCP4, TCP6 nor UNKNOWN")
    if end < 0:
        if len(data) >= _V1_MAX_BYTES:
            raise ProxyHeaderError("the line is too long")
        return _v1_missing(data, protocol, len(fields))
    if protocol == b"UNKNOWN":  # 2.1: whatever stands behind it is ignored
        return ProxyHeader(HeaderKind.UNKNOWN, None, end + 2)
    if len(fields) != 4:
        raise ProxyHeaderError("not two addresses and two ports")
    address = _ipv4 if protocol == b"TCP4" else _ipv6
    source, _ = address(fields[0]), address(fields[1])
    port, _ = _port(fields[2]), _port(fields[3])
    return ProxyHeader(HeaderKind.PROXIED, (unmapped(source), port), end + 2)


def _v1_missing(data: bytes, protocol: bytes, fields: int) -> int:
    """How much the rest of a line has at least: its fields that did not begin yet, each behind a blank, and CRLF."""
    if data.endswith(b"\r"):
        return 1
    if protocol not in _V1_SHORTEST:
        return max(_V1_SHORTEST_BYTES - len(data), 2)
    return sum(1 + shortest for shortest in _V1_SHORTEST[protocol][fields:]) + 2


def _ipv4(field: bytes) -> IPv4Address:
    try:
        return IPv4Address(field.decode("ascii"))
    except ValueError:
        raise ProxyHeaderError("not an IPv4 address") from None


def _ipv6(field: bytes) -> IPv6Address:
    text = field.decode("ascii")
    try:
        address = IPv6Address(text)
    except ValueError:
        raise ProxyHeaderError("not an IPv6 address") from None
    if address.scope_id is not None:
        raise ProxyHeaderError("an IPv6 address with a zone")
    return address


def _port(field: bytes) -> int:
    # 2.1: a decimal integer without leading zeros, 0 to 65535
    if not field.isdigit() or len(field) > 5 or (field[:1] == b"0" and field != b"0") or int(field) > 65535:
        raise ProxyHeaderError("not a port")
    return int(field)


# --- version 2: binary ----------------------------------------------------------------------------------


def _read_v2(data: bytes) -> ProxyHeader | int:
    if data[: len(_V2_SIGNATURE)] != _V2_SIGNATURE[: len(data)]:
        raise ProxyHeaderError("not a PROXY header")
    if len(data) < _V2.size:
        return _V2.size - len(data)
    command: int
    family: int
    length: int
    _, command, family, length = _V2.unpack_from(data)
    if command not in (_V2_LOCAL, _V2_PROXY):
        raise ProxyHeaderError("another version than 1 and 2, or an unknown command")
    if length > _V2_MAX_LENGTH:
        raise ProxyHeaderError(f"{length} octets of addresses and TLVs")
    size = _V2.size + length
    if command == _V2_PROXY:
        addresses = _V2_ADDRESS_BYTES.get(family)
        if addresses is None:
            raise ProxyHeaderError("an unknown family of addresses")
        if length < addresses:
            raise ProxyHeaderError("addresses that are cut off")
    if len(data) < size:
        return size - len(data)
    if command == _V2_LOCAL:  # 2.2: the addresses of such a header are ignored
        return ProxyHeader(HeaderKind.LOCAL, None, size)
    return _v2_client(data, family, size)


def _v2_client(data: bytes, family: int, size: int) -> ProxyHeader:
    at = _V2.size
    source: IPv4Address | IPv6Address
    if family == _V2_TCP4:
        source, ports = IPv4Address(data[at : at + 4]), at + 8
    elif family == _V2_TCP6:
        source, ports = IPv6Address(data[at : at + 16]), at + 32
    else:
        # Unspecified, UDP or a Unix socket: no address of a client that speaks SMTP
        return ProxyHeader(HeaderKind.UNKNOWN, None, size)
    port = int.from_bytes(data[ports : ports + 2])
    return ProxyHeader(HeaderKind.PROXIED, (unmapped(source), port), size)
