"""The PROXY header's parser beside a slow one, written from the text of the specification (`./dev fuzz -k proxy`)."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from hypothesis import given
from hypothesis import strategies as st

from gateway.smtp.proxy_protocol import ProxyHeader, ProxyHeaderError, read_header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
# proxy-protocol.txt 2.1
LINE = re.compile(
    rb"PROXY (?:(UNKNOWN)(?: [ -~]*)?|(TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (\d+) (\d+))\r\n"
)
ADDRESS_BYTES = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}

Said = tuple[str, str, int, int]
"""Kind, client, port and size of a header."""


def said(kind: str, size: int, client: str = "", port: int = 0) -> Said:
    if client:
        address = ip_address(client)
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        client = str(mapped or address)
    return kind, client, port, size


def is_address(text: bytes, protocol: bytes) -> bool:
    """By the system's own parser, which takes no other forms either."""
    family = socket.AF_INET if protocol == b"TCP4" else socket.AF_INET6
    try:
        socket.inet_pton(family, text.decode("ascii"))
    except OSError:
        return False
    return True


def slow_v1(stream: bytes) -> Said | None:
    found = LINE.match(stream[:107])
    if found is None:
        return None
    unknown, protocol, source, destination, *ports = found.groups()
    if unknown:
        return said("unknown", found.end())
    if not (is_address(source, protocol) and is_address(destination, protocol)):
        return None
    if any(str(int(port)).encode() != port or int(port) > 65535 for port in ports):
        return None
    return said("proxied", found.end(), source.decode("ascii"), int(ports[0]))


def slow_v2(stream: bytes) -> Said | None:
    if len(stream) < 16 or not stream.startswith(SIGNATURE):
        return None
    command, family, length = stream[12], stream[13], stream[14] << 8 | stream[15]
    if command not in (0x20, 0x21) or length > 4096 or len(stream) < 16 + length:
        return None
    if command == 0x20:
        return said("local", 16 + length)
    if family not in ADDRESS_BYTES or length < ADDRESS_BYTES[family]:
        return None
    block = stream[16:]
    if family == 0x11:
        return said("proxied", 16 + length, str(IPv4Address(block[:4])), block[8] << 8 | block[9])
    if family == 0x21:
        return said("proxied", 16 + length, str(IPv6Address(block[:16])), block[32] << 8 | block[33])
    return said("unknown", 16 + length)


def read(stream: bytes) -> Said | None:
    """What the gateway's parser says; None where there is no header, or not the whole of it."""
    try:
        found = read_header(stream)
    except ProxyHeaderError:
        return None
    if not isinstance(found, ProxyHeader):
        return None
    client, port = found.client or ("", 0)
    return str(found.kind), str(client), port, found.size


fields = st.one_of(
    st.sampled_from(["TCP4", "TCP6", "UNKNOWN", "0", "1", "00", "65535", "65536", ""]),
    st.ip_addresses().map(str),
    st.text("0123456789abcdefF.:% \r\n\x00\xb2", max_size=20),
)
lines = st.one_of(
    st.lists(fields, max_size=7).map(" ".join),
    st.tuples(
        st.sampled_from(["TCP4", "TCP6"]), st.ip_addresses(), st.ip_addresses(), st.integers(0, 70000)
    ).map(lambda parts: f"{parts[0]} {parts[1]} {parts[2]} {parts[3]} 25"),
    st.integers(85, 105).map(lambda length: "UNKNOWN " + "x" * (length - 8)),
)
binary = st.builds(
    lambda command, family, block, more: (
        SIGNATURE + bytes([command, family]) + (len(block) + more).to_bytes(2) + block
    ),
    st.sampled_from([0x20, 0x21, 0x22, 0x11]),
    st.sampled_from([*ADDRESS_BYTES, 0x10, 0x41, 0xFF]),
    st.one_of(st.binary(max_size=250), st.integers(4090, 4100).map(bytes)),
    st.sampled_from([0, 0, 0, 1]),
)


@given(line=lines, behind=st.binary(max_size=20))
def test_a_line_is_what_the_specification_says(line: str, behind: bytes) -> None:
    stream = b"PROXY " + line.encode("latin-1") + b"\r\n" + behind
    assert read(stream) == slow_v1(stream)


@given(stream=binary, behind=st.binary(max_size=20))
def test_a_binary_header_is_what_the_specification_says(stream: bytes, behind: bytes) -> None:
    assert read(stream + behind) == slow_v2(stream + behind)
