"""The author domain: the one that every reader of the From field sees, or none."""

from __future__ import annotations

import time

import pytest

from gateway.mail.author import (
    MAX_COMMENT_DEPTH,
    MAX_FIELD_BYTES,
    MAX_LOCAL,
    AuthorError,
    AuthorFault,
    author_domain,
)
from gateway.mail.message import parse_header


def author_of(*fields: bytes) -> str:
    """The author domain of a header, or the fault."""
    octets = b"".join(field + b"\r\n" for field in fields)
    header = parse_header(octets, max_fields=1000, wire_bytes=len(octets))
    try:
        return author_domain(header)
    except AuthorError as exc:
        return exc.fault


def author_in(value: str | bytes) -> str:
    """The author domain of a From field with this value."""
    return author_of(b"From:" + (value if isinstance(value, bytes) else value.encode()), b"Subject: x")


@pytest.mark.parametrize(
    "value",
    [
        " a@example.org",
        "a@example.org",
        " <a@example.org>",
        " A@EXAMPLE.Org \t",
        " Joe <a@example.org>",
        " Joe<a@example.org>",
        " John Q. Public <a@example.org>",
        ' "Public, John <Q>" <a@example.org>',
        ' "John \\"Q\\" Public" <a@example.org>',
        ' "b@example.net" <a@example.org>',
        ' "Joe" Public "x" <a@example.org>',
        " =?utf-8?B?SsO8cmdlbg==?= <a@example.org>",
        ' "=?utf-8?B?SsO8cmdlbg==?=" <a@example.org>',
        " Jürgen <a@example.org>",
        " (his office) Joe (his (other) name) <a@example.org> (home)",
        " a@example.org (Joe \\) x)",
        "\r\n Joe\r\n\t<a@example.org>",
        " <\r\n a@example.org >",
        " a.b+c=d@example.org",
        ' "a b.c"@example.org',
        " jürgen@example.org",
        " a@example.org, Joe <b@example.org>,\r\n c@EXAMPLE.ORG",
    ],
)
def test_reads_what_honest_software_writes(value: str) -> None:
    assert author_in(value) == "example.org"


def test_reads_names_in_old_charsets() -> None:
    assert author_in(b" J\xfcrgen <a@example.org>") == "example.org"
    assert author_in(b' "J\xfcrgen" <a@example.org> (\xe4)') == "example.org"


def test_gives_a_labels() -> None:
    assert author_in(" a@bücher.example") == "xn--bcher-kva.example"
    assert author_in(" a@bücher.example, b@XN--BCHER-KVA.example") == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        " ()",
        " <>",
        " Joe",
        " Joe <>",
        " example.org",
        " @example.org",
        " a@",
        " a@example.org.",
        " a@.example.org",
        " .a@example.org",
        " a..b@example.org",
        " a@[192.0.2.1]",
        " a@under_score.example.org",
        " a@1.2.3.4",
        " a@b@example.org",
        " <<a@example.org>>",
        " <a@example.org",
        " a@example.org>",
        " <a@example.org>, ",
        " ,a@example.org",
        " a@example.org,,b@example.org",
        " a@example.org; b@example.org",
        " <a@example.org> x",
        " <a@example.org>b@example.org",
        " <a@example.org> <b@example.org>",
        " b@example.org <a@example.org>",
        " [x] <a@example.org>",
        " . <a@example.org>",
        " x\\ <a@example.org>",
        # routes and groups
        " <@example.net:a@example.org>",
        " <@example.net,@example.com:a@example.org>",
        " us: a@example.org;",
        " us:;",
        " us: <a@example.org>, b@example.org;",
        # comments and folds within an address
        " a(x)@example.org",
        " a@(x)example.org",
        " a@example(x).org",
        " <(x)a@example.org>",
        " a @example.org",
        " <a@\r\n example.org>",
        " Joe\r\n \r\n <a@example.org>",
        " <a@example.org>\r\n\t",
        # comments
        " a@example.org (b@example.net)",
        " (b@example.net) a@example.org",
        " a@example.org (",
        " a@example.org )",
        " a@example.org (x\\)",
        # names that hide an address
        ' "<b@example.net>" <a@example.org>',
        ' "x\\" <b@example.net>, \\"" <a@example.org>',
        ' "x <a@example.org>',
        # local parts that are not clear
        ' "b@example.net> x"@example.org',
        ' "b@example.net"@example.org',
        ' "b,c"@example.org',
        ' "b\tc"@example.org',
        " =?utf-8?B?YUBleGFtcGxlLm5ldA==?=",
        " =?utf-8?B?YUBleGFtcGxlLm5ldA==?=@example.org",
        " a\uff20example.net@example.org",
        " a\uff1e@example.org",
        " \uff1d\uff1fx@example.org",
        " a\u200b@example.org",
        " a\u202e@example.org",
        " a\u00a0@example.org",
        " a@example\u3002org",
        " a@\uff45xample.org",
        " a@exam\u00adple.org",
        " a@exam\u200bple.org",
        # what ends a line, or reading, for some
        " Joe\x0b <a@example.org>",
        " Joe\x00 <a@example.org>",
        " Joe\x7f <a@example.org>",
        " Joe\x85 <a@example.org>",
        " Joe\u2028 <a@example.org>",
    ],
)
def test_refuses_what_may_be_read_in_two_ways(value: str) -> None:
    assert author_in(value) is AuthorFault.SYNTAX


@pytest.mark.parametrize(
    "value",
    [b" \xfc@example.org", b" a@\xfc.example", b" x\x95\\ <a@example.org>", b" x\x95@y <a@example.org>"],
)
def test_refuses_octets_that_are_no_utf8_in_an_address_or_beside_a_special(value: bytes) -> None:
    assert author_in(value) is AuthorFault.SYNTAX


def test_refuses_an_octet_that_may_take_the_backslash_with_it() -> None:
    # in Shift_JIS 95 5C is one character, and the quote behind it ends the string
    value = b' "\x95\\" <a@example.net>, "x" <a@example.org>'
    assert author_in(value) is AuthorFault.SYNTAX


@pytest.mark.parametrize(
    "value",
    [" a@example.org, b@example.net", " <a@example.org>,<b@sub.example.org>", " a@x.example,b@y.example,"],
)
def test_refuses_authors_of_several_domains(value: str) -> None:
    assert author_in(value) is AuthorFault.SEVERAL_DOMAINS


def test_refuses_a_header_without_from() -> None:
    assert author_of() is AuthorFault.NO_FROM
    assert author_of(b"Sender: a@example.org", b"Resent-From: a@example.org") is AuthorFault.NO_FROM
    assert author_of(b"From a@example.org Sun Jan  1", b"To: a@example.org") is AuthorFault.NO_FROM


@pytest.mark.parametrize(
    "other",
    [
        b"From: b@example.net",
        b"FROM: a@example.org",
        b"From : b@example.net",
        b"From\t: b@example.net",
        b"From\r\n : b@example.net",
        b"From\x00: b@example.net",
        b"Fr\x01om: b@example.net",
        b"\xef\xbb\xbfFrom: b@example.net",
        b"From\xa0: b@example.net",
    ],
)
def test_refuses_a_second_from_whatever_it_looks_like(other: bytes) -> None:
    assert author_of(b"From: a@example.org", b"X: y", other) is AuthorFault.SEVERAL_FROM
    assert author_of(other, b"no field", b"From: a@example.org") is AuthorFault.SEVERAL_FROM


@pytest.mark.parametrize("name", [b"From ", b"From\r\n ", b"From\x0b", b"\xef\xbb\xbfFrom", b"F\x80rom"])
def test_refuses_one_from_that_some_would_overlook(name: bytes) -> None:
    assert author_of(b"X: y", name + b": a@example.org") is AuthorFault.SYNTAX


def test_finds_from_below_many_fields() -> None:
    assert author_of(*[b"X: y"] * 600, b"fROM: a@example.org") == "example.org"


def test_refuses_what_is_beyond_a_limit() -> None:
    local, deep = "a" * MAX_LOCAL, "(" * MAX_COMMENT_DEPTH + ")" * MAX_COMMENT_DEPTH
    assert author_in(f"{local}@example.org") == "example.org"
    assert author_in(f"{local}a@example.org") is AuthorFault.SYNTAX
    assert author_in(f"x {local}a <a@example.org>") == "example.org"
    assert author_in(f"<{local}@example.org> {deep}") == "example.org"
    assert author_in(f"<{local}a@example.org> {deep}") is AuthorFault.SYNTAX
    assert author_in(f"a@example.org ({deep})") is AuthorFault.SYNTAX
    pad = "x" * (MAX_FIELD_BYTES - len(" <a@example.org>"))
    assert author_in(f"{pad} <a@example.org>") == "example.org"
    assert author_in(f"x{pad} <a@example.org>") is AuthorFault.SYNTAX


@pytest.mark.parametrize(
    "value",
    [
        "(" * 20_000,
        "(x)" * 5000 + "a@example.org",
        "(pad)\r\n " * 300 + "<a@example.org>",
        ",".join(["a@example.org"] * 30_000),
        "a@example.org," * 1000,
        "a." * 8000 + "@example.org",
        "a@" + "a." * 8000,
        '"<' + "<" * 16_000 + '" <a@example.org>',
        '""' * 8000,
        '"\\' * 8000,
        "a " * 8000,
        "<" * 16_000,
        "a\u0301\u0323" * 5000 + "@example.org",
    ],
)
def test_time_is_bounded(value: str) -> None:
    began = time.process_time()
    author_in(value)
    assert time.process_time() - began < 0.5


def test_the_error_says_what_is_wrong_without_a_word_of_the_message() -> None:
    octets = b"From: friends: a@example.org;\r\n"
    with pytest.raises(AuthorError, match=r"^the From field has a group$"):
        author_domain(parse_header(octets, max_fields=10, wire_bytes=len(octets)))
