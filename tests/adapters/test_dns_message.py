"""Messages of DNS, octet by octet: what is no answer, and what no honest server sends."""

from __future__ import annotations

import dns.message
import pytest

from gateway.adapters.dns.message import Heard, query_for, read_message
from gateway.adapters.dns.reply import Reply, Resource
from gateway.lookup import Mx, RRType

QUERY = query_for("a.example.org", RRType.MX)
ASKED = b"\x01\x61\x07example\x03org\x00\x00\x0f\x00\x01"


def answer(*records: bytes, flags: int = 0x8180, questions: int = 1, asked: bytes = ASKED) -> bytes:
    """A message with these records in its answer section."""
    counts = questions, len(records), 0, 0
    return (
        b"\x12\x34"
        + flags.to_bytes(2)
        + b"".join(each.to_bytes(2) for each in counts)
        + asked
        + b"".join(records)
    )


def mx(exchange: bytes, owner: bytes = b"\xc0\x0c", ttl: bytes = b"\0\0\0\x3c") -> bytes:
    """An MX of preference 10."""
    return owner + b"\0\x0f\0\x01" + ttl + (2 + len(exchange)).to_bytes(2) + b"\0\x0a" + exchange


def found(exchange: str, owner: str = "a.example.org", ttl_s: int = 60) -> Heard:
    return Heard(Reply(resources=(Resource(owner, RRType.MX, ttl_s, Mx(10, exchange)),)))


@pytest.mark.parametrize("edns", [True, False])
def test_a_question_is_written_as_dnspython_writes_it(edns: bool) -> None:
    message = dns.message.make_query(
        "a.example.org", "MX", use_edns=0 if edns else False, payload=1232, id=0x1234
    )
    assert QUERY.wire(0x1234, edns=edns) == message.to_wire()


@pytest.mark.parametrize(
    ("wire", "heard"),
    [
        (answer(mx(b"\x01x\0")), found("x")),
        (answer(mx(b"\x01x\xc0\x0e")), found("x.example.org")),
        (answer(mx(b"\0")), found("")),
        (answer(mx(b"\x01x\0", ttl=b"\x80\0\0\0")), found("x", ttl_s=0)),
        (answer(mx(b"\x01x\0", owner=b"\x01B\xc0\x0e")), found("x", owner="b.example.org")),
        (answer(mx(b"\x01x\0"), asked=ASKED.upper()), found("x")),
        (answer(mx(b"\x01x\0")) + b"whatever", found("x")),
        (answer(), Heard(Reply())),
        (answer(flags=0x8500), Heard(Reply())),  # it knows, and asks nobody
        (answer(flags=0x8100), Heard(why="refused")),  # neither
        (answer(flags=0x8103), Heard(Reply(is_no_such_name=True))),
        (answer(mx(b"\x01x\0"), flags=0x8100), found("x")),
        (answer(flags=0x8183), Heard(Reply(is_no_such_name=True))),
        (answer(flags=0x8182), Heard(why="servfail")),
        (answer(flags=0x8182, questions=0, asked=b""), Heard(why="servfail")),
        (answer(flags=0x818B), Heard(why="failed")),
        (answer(flags=0x8380) + b"cut", Heard(is_cut=True)),
    ],
)
def test_an_answer(wire: bytes, heard: Heard) -> None:
    assert read_message(QUERY, wire) == heard


@pytest.mark.parametrize(
    "wire",
    [
        answer(mx(b"\x01x\0"), flags=0x0180),  # a question
        answer(mx(b"\x01x\0"), flags=0xA180),  # of another opcode
        answer(mx(b"\x01x\0"), asked=ASKED[:-1] + b"\x03"),  # of another class
        answer(mx(b"\x01x\0"), asked=ASKED[:-3] + b"\x10\0\x01"),  # of another type
        answer(mx(b"\x01x\0"), asked=ASKED.replace(b"org", b"net")),
        answer(mx(b"\x01x\0"), questions=0, asked=b""),
        answer(mx(b"\x01x\0"), questions=2, asked=ASKED * 2),
        answer(mx(b"\x01x\xc0\x2d")),  # leads to itself
        answer(mx(b"\x01x\xc0\xff")),  # leads forwards
        answer(mx(b"\xc0\x2d")),  # a pointer to itself
        answer(mx(b"\x01x")),  # no end
        answer(mx(b"\x01x\0\0")),  # more behind the name
        answer(mx(b"\x40x\0")),  # a label of no known type
        answer(mx((b"\x3f" + b"x" * 63) * 4 + b"\0")),  # 257 octets
        answer(mx(b"\x01x\0"))[:-1],
        answer()[:11],
        b"",
    ],
)
def test_what_is_no_answer(wire: bytes) -> None:
    assert read_message(QUERY, wire) is None


def test_a_name_of_255_octets_is_one() -> None:
    label = b"\x3f" + b"x" * 63
    exchange = ".".join(["x" * 63] * 3 + ["x" * 61])
    assert read_message(QUERY, answer(mx(label * 3 + b"\x3d" + b"x" * 61 + b"\0"))) == found(exchange)


def chain(length: int) -> bytes:
    """Records each of whose exchanges is a label and a pointer to that of the record before."""
    records = [mx(b"\x01x\0")]
    at = len(answer(*records)) - len(b"\x01x\0")
    for _ in range(length):
        records.append(mx(b"\x01y" + (0xC000 | at).to_bytes(2)))
        at = len(answer(*records)) - len(b"\x01y\xc0\0")
    return answer(*records)


def test_a_chain_of_pointers_is_followed_to_its_end() -> None:
    heard = read_message(QUERY, chain(60))
    assert heard is not None
    assert heard.reply is not None
    assert heard.reply.resources[-1].value == Mx(10, "y." * 60 + "x")


def test_a_chain_of_pointers_that_makes_a_name_too_long_is_no_answer() -> None:
    assert read_message(QUERY, chain(126)) is not None
    assert read_message(QUERY, chain(127)) is None


def test_pointers_that_lead_to_pointers_are_followed_so_far_only() -> None:
    """64 KiB of them in front of 1000 records would be eight million steps."""

    def message(count: int) -> bytes:
        begin = len(answer()) + len(mx(b"")) - 2  # of the text's octets
        hops = [0xC00C, *range(0xC000 | begin, (0xC000 | begin) + 2 * count, 2)]
        text = b"\xc0\x0c\0\x10\0\x01\0\0\0\x3c" + (2 * count).to_bytes(2)
        text += b"".join(hop.to_bytes(2) for hop in hops[:count])
        return answer(text, mx((0xC000 | begin + 2 * (count - 1)).to_bytes(2)))

    assert read_message(QUERY, message(100)) == found("a.example.org")
    assert read_message(QUERY, message(2000)) is None
