"""Tag lists: what RFC 6376 3.2 allows, and nothing else."""

from __future__ import annotations

import pytest

from policies.verify.tags import TagError, colon_list, parse_tags, without_space, without_tag


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        (b"v=1", {"v": b"1"}),
        (b" v = 1 ; a_1=b c;\r\n\td=\r\n ", {"v": b"1", "a_1": b"b c", "d": b""}),
        (b"v=1; ", {"v": b"1"}),
        (b"p=a=b==", {"p": b"a=b=="}),
        (b"h=a :\r\n b", {"h": b"a :\r\n b"}),
        (b"v=1; V=2", {"v": b"1", "V": b"2"}),
    ],
)
def test_list_is_parsed(text: bytes, tags: dict[str, bytes]) -> None:
    assert parse_tags(text) == tags


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b";",
        b"v",
        b"v=1;;a=2",
        b";v=1",
        b"=1",
        b"1=1",
        b"a-b=1",
        b"a b=1",
        b"v=1;v=1",
        b"v=1; v =2",
        b"v=\x00",
        b"v=\x7f",
        b"v=\x0b",
        b"v=a\rb",
        b"v=a\nb",
        b"v=a\r\nb",
        b"v=a\r\n\r\n b",
        b"v=\xc3\xa4",
    ],
)
def test_what_is_no_list_is_refused(text: bytes) -> None:
    with pytest.raises(TagError):
        parse_tags(text)


def test_utf8_is_taken_where_it_is_allowed_and_no_other_octets() -> None:
    assert parse_tags("d=bücher.example".encode(), utf8=True) == {"d": "bücher.example".encode()}
    for text in (b"d=\xff", b"d=\xc3", b"d=\xed\xa0\x80", b"d=\xc3\xa4\x00"):
        with pytest.raises(TagError):
            parse_tags(text, utf8=True)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (b" v=1; b=abc; d=x", b" v=1; b=; d=x"),
        (b"v=1;\r\n\tb =\r\n abc\r\n def ;bh=b=", b"v=1;\r\n\tb =;bh=b="),
        (b"bh=abc; b=x", b"bh=abc; b="),
        (b"v=1", b"v=1"),
    ],
)
def test_value_of_one_tag_is_taken_out_in_place(text: bytes, rest: bytes) -> None:
    assert without_tag(text, b"b") == rest


def test_white_space_in_values() -> None:
    assert without_space(b" a\r\n\tb c ") == b"abc"
    assert colon_list(b"From : to:\r\n subject") == [b"From", b"to", b"subject"]
