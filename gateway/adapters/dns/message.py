"""Messages of DNS: how a question is written, and how an answer is read (RFC 1035 4.1, EDNS of RFC 6891).

What comes in is anybody's. A packet that is not the answer to the question, or in which the records that are looked
for cannot be read, is None, never an exception; no name in it is followed forwards, and none beyond 255 octets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.adapters.dns.names import text_of
from gateway.adapters.dns.reply import CNAME, MAX_RECORDS, Reply, Resource
from gateway.lookup import Mx, Record, RRType
from gateway.session import unmapped

PAYLOAD_BYTES = 1232
"""Largest UDP answer asked for: fits any path without fragments (DNS flag day 2020)."""

_MAX_NAME_BYTES, _MAX_LABEL_BYTES = 255, 63
_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHlH")
_HEADER_BYTES, _RECORD_BYTES = _HEADER.size, _RECORD.size

# RFC 1035 4.1.1
_RESPONSE, _OPCODES, _AUTHORITATIVE, _CUT = 0x8000, 0x7800, 0x0400, 0x0200
_RECURSION_DESIRED, _RECURSION_AVAILABLE, _RCODES = 0x0100, 0x0080, 0x000F
_IN, _CNAME, _SOA, _OPT = 1, 5, 6, 41
_NUMBERS = {RRType.A: 1, RRType.NS: 2, RRType.PTR: 12, RRType.MX: 15, RRType.TXT: 16, RRType.AAAA: 28}
_SIZES = [bytes((size,)) for size in range(_MAX_LABEL_BYTES + 1)]
_ENDS = {rrtype: b"\0" + number.to_bytes(2) + _IN.to_bytes(2) for rrtype, number in _NUMBERS.items()}
# no data, version 0, no flags (RFC 6891 6.1.2)
_EDNS = b"\0" + _RECORD.pack(_OPT, PAYLOAD_BYTES, 0, 0)

_NOERROR, _FORMERR, _SERVFAIL, _NXDOMAIN, _NOTIMP, _REFUSED = range(6)
_WHY = {_FORMERR: "formerr", _SERVFAIL: "servfail", _NOTIMP: "notimp", _REFUSED: "refused"}

_POINTER = 0xC0
# one before each label of the longest name
_MAX_POINTERS = 127
# a pointer to the question's name, which nearly every record begins with
_TO_QUESTION = b"\xc0\x0c"
# RFC 1035 3.3.13: two names, and five numbers of which the minimum is the last
_SOA_BYTES, _SOA_MINIMUM_BYTES = 22, 4


class Query(NamedTuple):
    """A question; `section` is how it is written, and what an answer has to repeat in any case of its letters."""

    name: str
    rrtype: RRType
    section: bytes

    def wire(self, number: int, *, edns: bool = True) -> bytes:
        """The message with this id."""
        header = _HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, edns)
        return header + self.section + (_EDNS if edns else b"")


class Heard(NamedTuple):
    """What a message says: a reply, or that it is cut, or why there is no reply (one of FAILURES)."""

    reply: Reply | None = None
    why: str = ""
    is_cut: bool = False


_IS_CUT = Heard(is_cut=True)
_NOTHING = Reply()


def query_for(name: str, rrtype: RRType) -> Query:
    """The question for a name that can exist (gateway.adapters.dns.names), lower-case and without its final dot."""
    labels = b"".join([_SIZES[len(label)] + label for label in name.encode().split(b".")])
    return Query(name, rrtype, labels + _ENDS[rrtype])


def read_message(query: Query, wire: bytes) -> Heard | None:
    """What a message says to this question, None when it is no answer to it. Its id is for the caller to compare."""
    if len(wire) < _HEADER_BYTES:
        return None
    _, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(wire)
    if flags & (_RESPONSE | _OPCODES) != _RESPONSE:
        return None
    rcode = flags & _RCODES
    at = _HEADER_BYTES
    # RFC 5452 9.1; the octets of lengths, types and classes are below those of letters
    if questions == 1 and wire[at : at + len(query.section)].lower() == query.section:
        at += len(query.section)
    elif questions or rcode not in _WHY:  # who could not read a question need not repeat it
        return None
    # what a cut message holds does not count, and may end in the middle of a record
    if flags & _CUT:
        return _IS_CUT
    if rcode not in {_NOERROR, _NXDOMAIN}:
        return Heard(why=_WHY.get(rcode, "failed"))
    if answers > MAX_RECORDS:
        return Heard(why="too_large")
    try:
        resources, at, has_records = _answers(query, wire, at, answers)
        if has_records:  # all that is to be known
            return Heard(Reply(rcode == _NXDOMAIN, resources))
        negative_ttl_s, extended_rcode = _others(wire, at, authorities, additionals)
    except (ValueError, IndexError, struct.error):
        return None
    if extended_rcode:
        return Heard(why="failed")
    reply = Reply(rcode == _NXDOMAIN, resources, negative_ttl_s)
    # who neither knows nor asks others refers us to these, or to nobody; that there is no data it does not say
    if reply == _NOTHING and not flags & (_AUTHORITATIVE | _RECURSION_AVAILABLE):
        return Heard(why="refused")
    return Heard(reply)


def _answers(query: Query, wire: bytes, at: int, count: int) -> tuple[tuple[Resource, ...], int, bool]:
    """The records that answer, and aliases; where the section ends; and whether any is no alias.

    Raises what `read_message` catches.
    """
    resources = []
    has_records = False
    wanted = _NUMBERS[query.rrtype]
    for _ in range(count):
        begin, at = at, at + 2 if wire[at] >= _POINTER else _behind_name(wire, at)
        number, rdclass, ttl_s, size_bytes = _RECORD.unpack_from(wire, at)
        at += _RECORD_BYTES
        end = at + size_bytes
        if end > len(wire):
            raise ValueError("a record is cut off")
        if number in (wanted, _CNAME) and rdclass == _IN:
            owner = query.name if wire[begin : begin + 2] == _TO_QUESTION else _name(wire, begin)[0]
            kind, value_of = _READERS[number]
            # RFC 2181 8: with its highest bit set a TTL is 0
            resources.append(Resource(owner, kind, max(0, ttl_s), value_of(wire, at, end)))
            has_records = has_records or number == wanted
        at = end
    return tuple(resources), at, has_records


def _others(wire: bytes, at: int, authorities: int, additionals: int) -> tuple[int | None, int]:
    """For how long a negative answer holds (RFC 2308 5), None where nobody says; and the upper bits of the rcode."""
    negative_ttl_s, extended_rcode = None, 0
    for place in range(authorities + additionals):
        at = _behind_name(wire, at)
        number, _, ttl_s, size_bytes = _RECORD.unpack_from(wire, at)
        at += _RECORD_BYTES + size_bytes
        if at > len(wire):
            raise ValueError("a record is cut off")
        if place >= authorities:
            if number == _OPT:
                extended_rcode = ttl_s >> 24 & 0xFF  # RFC 6891 6.1.3
        elif number == _SOA and size_bytes >= _SOA_BYTES:
            minimum_s = int.from_bytes(wire[at - _SOA_MINIMUM_BYTES : at])
            negative_ttl_s = min(
                max(0, ttl_s), minimum_s, 2**31 if negative_ttl_s is None else negative_ttl_s
            )
    return negative_ttl_s, extended_rcode


def _behind_name(wire: bytes, at: int) -> int:
    """Where the name that begins here ends. Raises IndexError and ValueError."""
    while size_bytes := wire[at]:
        if size_bytes >= _POINTER:
            return at + 2
        if size_bytes > _MAX_LABEL_BYTES:
            raise ValueError("a label of no known type")
        at += 1 + size_bytes
    return at + 1


def _name(wire: bytes, at: int) -> tuple[str, int]:
    """The text of the name that begins here, and where it ends. Raises IndexError and ValueError."""
    end = _behind_name(wire, at)
    labels: list[bytes] = []
    left_bytes, left_pointers = _MAX_NAME_BYTES, _MAX_POINTERS
    begin = at
    while size_bytes := wire[at]:
        if size_bytes >= _POINTER:
            at = (size_bytes - _POINTER) << 8 | wire[at + 1]
            # only backwards, so there is an end
            if at >= begin:
                raise ValueError("a pointer that does not lead back")
            left_pointers -= 1
            if left_pointers < 0:
                raise ValueError("a name of too many pointers")
            begin = at
            continue
        if size_bytes > _MAX_LABEL_BYTES:
            raise ValueError("a label of no known type")
        left_bytes -= 1 + size_bytes
        if left_bytes <= 0:
            raise ValueError("a name of more than 255 octets")
        labels.append(wire[at + 1 : at + 1 + size_bytes])
        at += 1 + size_bytes
    return text_of(labels), end


def _whole_name(wire: bytes, at: int, end: int) -> str:
    name, behind = _name(wire, at)
    if behind != end:
        raise ValueError("a name that does not fill its record")
    return name


def _mx(wire: bytes, at: int, end: int) -> Mx:
    return Mx(int.from_bytes(wire[at : at + 2]), _whole_name(wire, at + 2, end))


def _text(wire: bytes, at: int, end: int) -> bytes:
    behind = at + 1 + wire[at]
    if behind == end:  # as nearly always
        return wire[at + 1 : end]
    strings = []
    while at < end:
        behind = at + 1 + wire[at]
        strings.append(wire[at + 1 : behind])
        at = behind
    if at != end:
        raise ValueError("a string that is cut off")
    return b"".join(strings)


_READERS: dict[int, tuple[RRType | str, Callable[[bytes, int, int], Record]]] = {
    _NUMBERS[RRType.A]: (RRType.A, lambda wire, at, end: IPv4Address(wire[at:end])),
    _NUMBERS[RRType.AAAA]: (RRType.AAAA, lambda wire, at, end: unmapped(IPv6Address(wire[at:end]))),
    _NUMBERS[RRType.MX]: (RRType.MX, _mx),
    _NUMBERS[RRType.NS]: (RRType.NS, _whole_name),
    _NUMBERS[RRType.PTR]: (RRType.PTR, _whole_name),
    _NUMBERS[RRType.TXT]: (RRType.TXT, _text),
    _CNAME: (CNAME, _whole_name),
}
