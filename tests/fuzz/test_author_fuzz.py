"""The From field beside lenient readers: none sees another domain than we do (`./dev fuzz -k author`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.utils import getaddresses

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.mail.author import (
    _PLAIN,
    MAX_FIELD_BYTES,
    AuthorError,
    AuthorFault,
    _author_domain,
    author_domain,
)
from gateway.mail.message import Header
from gateway.smtp.address import AddressError, Domain

WORDS = st.one_of(
    st.sampled_from(
        ["a", "Joe", "Q.", '"x, y"', '"b@c.example"', '"\\""', "=?utf-8?Q?x?=", "ü", "\udcfc", "\uff20"]
    ),
    st.sampled_from(["(x)", "(y@z.example)", "a@b.example", "<a@b.example>", "<a@d.example>", "[192.0.2.1]"]),
    st.sampled_from([" ", "\t", "\r\n ", *'.,@<>()"\\:;[]', "\x00", "\x85"]),
)
VALUES = st.lists(WORDS, max_size=12).map("".join)
PLAIN_WORDS = st.sampled_from(
    [
        "a",
        "Joe",
        ".",
        " ",
        "\t",
        "=",
        "?",
        '"',
        "x, (y)",
        "<",
        ">",
        "@",
        "a@b.example",
        "<a@b.example>",
        "-",
        ",",
    ]
)
NAIVE = re.compile(r"<([^<>]*@[^<>]*)>")


def header_of(text: str) -> Header:
    octets = f"From:{text}\r\n".encode("utf-8", "surrogateescape")
    return Header(octets, len(octets))


def author_of(text: str) -> str:
    try:
        return author_domain(header_of(text))
    except AuthorError as exc:
        return exc.fault


@given(st.binary(max_size=200))
def test_any_octets_have_an_author_or_a_fault(octets: bytes) -> None:
    assert author_of(octets.decode("utf-8", "surrogateescape"))


def domains_of(addresses: Iterable[str]) -> set[str]:
    """The domains of what is an address to somebody, in A-labels where they are domains."""
    domains = set()
    for address in filter(None, addresses):
        domain = address.strip().rpartition("@")[2]
        try:
            domains.add(str(Domain(domain)))
        except AddressError:
            domains.add(domain)
    return domains


@given(VALUES)
@example('"<a@d.example>" <a@b.example>')
@example('a@b.example, "x\\"" <c@b.example>')
@example(",".join(["<a@b.example>"] * 3))
def test_lenient_readers_see_no_other_domain(text: str) -> None:
    author = author_of(text)
    if author in set(AuthorFault):
        return
    unfolded = text.replace("\r\n", "")
    # the standard library's parser, and one that knows angle brackets only
    assert domains_of(address for _, address in getaddresses([unfolded])) <= {author}
    assert domains_of(NAIVE.findall(unfolded)) <= {author}


@given(st.lists(PLAIN_WORDS, max_size=10).map("".join))
@example(" Joe Q. <a@b.example>")
@example('"Joe" <a@b.example>')
@example("a@b.example")
@example("a@b..example")
@example('"<a@b.example>')
@example("a.@b.example")
@example(f"{'a' * 256}@b.example")
@example(f"{'a' * 257}@b.example")
def test_the_usual_field_is_read_as_the_full_parser_reads_it(text: str) -> None:
    value = text.encode()
    try:
        expected: str = _author_domain(value)
    except AuthorError as exc:
        expected = exc.fault
    assert author_of(text) == expected


@given(
    st.sampled_from(["", "Joe ", "Joe Q. Public ", '"Public, Joe" ']), st.sampled_from(["a", "a.b", "a+b"])
)
def test_the_usual_field_takes_the_short_way(name: str, local: str) -> None:
    assert _PLAIN.fullmatch(f" {name}<{local}@b.example>".encode())


@given(st.text(st.sampled_from('a"\\(<@>., ='), max_size=MAX_FIELD_BYTES))
def test_long_fields_take_no_time(text: str) -> None:
    assert author_of(text)
