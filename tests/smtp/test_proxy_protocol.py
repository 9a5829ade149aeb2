"""smtp.proxy_protocol: what is a header, what is none, and that nothing behind a header has to be read to know it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.session import unmapped
from gateway.smtp.client import proxy_v2
from gateway.smtp.proxy_protocol import (
    MAX_HEADER_BYTES,
    HeaderKind,
    ProxyHeader,
    ProxyHeaderError,
    read_header,
)

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
IPV4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 1]) + (56324).to_bytes(2) + (25).to_bytes(2)
CLIENT = (IPv4Address("192.0.2.1"), 56324)

addresses = st.ip_addresses()
ports = st.integers(0, 65535)
endpoints = st.tuples(addresses, ports)


def v1(line: str) -> bytes:
    return f"PROXY {line}\r\n".encode("latin-1")


def v2(command: int, family: int, block: bytes, length: int | None = None) -> bytes:
    length = len(block) if length is None else length
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2) + block


def v1_line(source: tuple[IPv4Address | IPv6Address, int], other: int) -> bytes:
    protocol = f"TCP{source[0].version}"
    return v1(f"{protocol} {source[0]} {type(source[0])(other)} {source[1]} 25")


def read_in_steps(stream: bytes) -> tuple[ProxyHeader, int]:
    """As a careful reader does: never more than is missing. The header, and how much was read."""
    read = 0
    while True:
        found = read_header(stream[:read])
        if isinstance(found, ProxyHeader):
            return found, read
        assert found > 0
        assert read + found <= len(stream), "it wants what is not the header's"
        read += found


# --- what is a header -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "kind", "client"),
    [
        (v1("TCP4 192.0.2.1 198.51.100.1 56324 25"), HeaderKind.PROXIED, CLIENT),
        (
            v1("TCP6 2001:db8::1 2001:db8::2 1 25"),
            HeaderKind.PROXIED,
            (IPv6Address("2001:db8::1"), 1),
        ),
        (v1("TCP6 ::ffff:192.0.2.1 2001:db8::2 56324 25"), HeaderKind.PROXIED, CLIENT),
        (v1("TCP4 0.0.0.0 0.0.0.0 0 65535"), HeaderKind.PROXIED, (IPv4Address("0.0.0.0"), 0)),
        (v1("UNKNOWN"), HeaderKind.UNKNOWN, None),
        (
            v1("UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535"),
            HeaderKind.UNKNOWN,
            None,
        ),
        (v2(0x21, 0x11, IPV4_BLOCK), HeaderKind.PROXIED, CLIENT),
        (v2(0x21, 0x11, IPV4_BLOCK + b"\x04\x00\x03abc"), HeaderKind.PROXIED, CLIENT),
        (v2(0x21, 0x11, IPV4_BLOCK + b"\xff"), HeaderKind.PROXIED, CLIENT),
        (
            v2(0x21, 0x21, ip_address("::ffff:192.0.2.1").packed + bytes(16) + IPV4_BLOCK[8:]),
            HeaderKind.PROXIED,
            CLIENT,
        ),
        (v2(0x20, 0x00, b""), HeaderKind.LOCAL, None),
        (v2(0x20, 0x11, IPV4_BLOCK), HeaderKind.LOCAL, None),
        (v2(0x20, 0xFF, b"whatever"), HeaderKind.LOCAL, None),
        (v2(0x21, 0x00, b"\x04\x00\x00"), HeaderKind.UNKNOWN, None),
        (v2(0x21, 0x12, IPV4_BLOCK), HeaderKind.UNKNOWN, None),
        (v2(0x21, 0x31, b"/run/mail.sock".ljust(216, b"\0")), HeaderKind.UNKNOWN, None),
        (v2(0x21, 0x11, IPV4_BLOCK.ljust(4096, b"\0")), HeaderKind.PROXIED, CLIENT),
    ],
)
def test_a_header_says_whose_the_connection_is(
    header: bytes, kind: HeaderKind, client: tuple[IPv4Address | IPv6Address, int] | None
) -> None:
    expected = ProxyHeader(kind, client, len(header))
    assert read_header(header) == expected
    assert read_header(header + b"EHLO client.example\r\n") == expected
    assert read_in_steps(header + bytes(MAX_HEADER_BYTES)) == (expected, len(header))


def test_the_longest_line_of_the_specification_is_read_and_no_longer_one() -> None:
    longest = v1("UNKNOWN " + " ".join([":".join(["ffff"] * 8)] * 2) + " 65535 65535")
    assert len(longest) == 107
    assert read_header(longest) == ProxyHeader(HeaderKind.UNKNOWN, None, 107)
    with pytest.raises(ProxyHeaderError, match="too long"):
        read_header(longest.replace(b"UNKNOWN", b"UNKNOWN "))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "TCP4",
        "UNKNOWNS",
        "unknown",
        "TCP5 192.0.2.1 198.51.100.1 1 25",
        "TCP4 192.0.2.1 198.51.100.1 1",
        "TCP4 192.0.2.1 198.51.100.1 1 25 ",
        "TCP4 192.0.2.1 198.51.100.1 1 25 26",
        "TCP4  192.0.2.1 198.51.100.1 1 25",
        " TCP4 192.0.2.1 198.51.100.1 1 25",
        "TCP4\t192.0.2.1\t198.51.100.1\t1\t25",
        "TCP4 192.0.2.01 198.51.100.1 1 25",
        "TCP4 192.0.2 198.51.100.1 1 25",
        "TCP4 192.0.2.256 198.51.100.1 1 25",
        "TCP4 2001:db8::1 2001:db8::2 1 25",
        "TCP4 192.0.2.1 2001:db8::2 1 25",
        "TCP4 client.example 198.51.100.1 1 25",
        "TCP6 192.0.2.1 198.51.100.1 1 25",
        "TCP6 fe80::1%eth0 2001:db8::2 1 25",
        "TCP6 [2001:db8::1] 2001:db8::2 1 25",
        "TCP4 192.0.2.1 198.51.100.1 65536 25",
        "TCP4 192.0.2.1 198.51.100.1 1 65536",
        "TCP4 192.0.2.1 198.51.100.1 01 25",
        "TCP4 192.0.2.1 198.51.100.1 +1 25",
        "TCP4 192.0.2.1 198.51.100.1 1_0 25",
        "TCP4 192.0.2.1 198.51.100.1 -1 25",
        "TCP4 192.0.2.1 198.51.100.1  25",
        "TCP4 192.0.2.\xb2 198.51.100.1 1 25",
        "TCP4 192.0.2.1 198.51.100.1 \xb9 25",
        "UNKNOWN \0",
        "UNKNOWN a\nb",
        "UNKNOWN a\rb",
        "UNKNOWN \xff",
    ],
)
def test_a_line_that_is_not_exactly_a_header_is_none(line: str) -> None:
    with pytest.raises(ProxyHeaderError):
        read_header(v1(line))


@pytest.mark.parametrize(
    "header",
    [
        v2(0x11, 0x11, IPV4_BLOCK),  # version 1 in binary
        v2(0x31, 0x11, IPV4_BLOCK),  # version 3
        v2(0x22, 0x11, IPV4_BLOCK),  # no such command
        v2(0x21, 0x13, IPV4_BLOCK),  # no such protocol
        v2(0x21, 0x41, IPV4_BLOCK.ljust(300)),  # no such family
        v2(0x21, 0x10, IPV4_BLOCK),
        v2(0x21, 0x11, IPV4_BLOCK[:-1]),  # cut off
        v2(0x21, 0x21, bytes(35)),
        v2(0x21, 0x31, bytes(215)),
        v2(0x21, 0x11, b"", length=4097),
        v2(0x20, 0x00, b"", length=65535),
        SIGNATURE[:-1] + b"\r",
        b"\r\nEHLO",
    ],
)
def test_a_binary_header_that_breaks_a_rule_is_none(header: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        read_header(header)


@pytest.mark.parametrize(
    "begin", [b"E", b"PROXX", b"proxy ", b"\n", b"\r\n\r\nX", b"\x16\x03\x01", b"PROXY TCP4\r "]
)
def test_what_cannot_become_a_header_is_refused_without_waiting_for_more(begin: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        read_header(begin)


# --- properties -----------------------------------------------------------------------------------------


@given(source=endpoints, destination=endpoints, behind=st.binary(max_size=50))
def test_what_our_own_side_sends_is_read_back(
    source: tuple[IPv4Address | IPv6Address, int],
    destination: tuple[IPv4Address | IPv6Address, int],
    behind: bytes,
) -> None:
    header = proxy_v2(source, destination)
    client = (unmapped(source[0]), source[1])
    assert read_in_steps(header + behind) == (
        ProxyHeader(HeaderKind.PROXIED, client, len(header)),
        len(header),
    )


def test_what_our_own_side_sends_as_local_is_read_back() -> None:
    header = proxy_v2(None, (IPv4Address("192.0.2.1"), 25))
    assert read_header(header) == ProxyHeader(HeaderKind.LOCAL, None, len(header))


@given(source=endpoints, other=st.integers(0, 2**32 - 1), behind=st.binary(max_size=50))
def test_a_line_is_read_back(
    source: tuple[IPv4Address | IPv6Address, int], other: int, behind: bytes
) -> None:
    header = v1_line(source, other)
    client = (unmapped(source[0]), source[1])
    assert read_in_steps(header + behind) == (
        ProxyHeader(HeaderKind.PROXIED, client, len(header)),
        len(header),
    )


near_headers = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda rest: SIGNATURE + rest),
    st.tuples(
        st.sampled_from([0x20, 0x21]),
        st.sampled_from([0x00, 0x11, 0x21, 0x31, 0x13]),
        st.binary(max_size=250),
    ).map(lambda parts: v2(*parts)),
    st.text(st.sampled_from("TCPUNKOW46 0123456789.:abf\r\n\x00\xff"), max_size=110).map(v1),
    st.builds(v1_line, endpoints, st.integers(0, 255)),
)


@given(stream=near_headers, at=st.integers(0, 300), octet=st.integers(0, 255))
def test_any_octets_are_a_header_or_none_whatever_the_pieces(stream: bytes, at: int, octet: int) -> None:
    if at < len(stream):
        stream = stream[:at] + bytes([octet]) + stream[at + 1 :]
    outcomes: list[ProxyHeader | str] = []
    for length in range(len(stream) + 1):
        try:
            found = read_header(stream[:length])
        except ProxyHeaderError as exc:
            outcomes.append(str(exc) and "error")
        else:
            if isinstance(found, int):
                # what is missing is missing: no shorter continuation can have been a header
                assert found > 0
                assert not outcomes
                continue
            assert found.size <= length
            outcomes.append(found)
    # once it is known it does not change with what comes behind
    assert len(set(outcomes)) <= 1


@given(stream=near_headers)
def test_as_much_as_is_missing_is_never_more_than_the_header_has(stream: bytes) -> None:
    try:
        whole = read_header(stream)
    except ProxyHeaderError:
        return
    if isinstance(whole, ProxyHeader):
        assert read_in_steps(stream) == (whole, whole.size)
