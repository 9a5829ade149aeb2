"""Tag lists, key records and whole DKIM messages: a value or the one typed error, never more (`./dev fuzz -k dkim`)."""

from __future__ import annotations

import re
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from gateway.lookup import RRType
from gateway.mail.message import HeaderError
from gateway.testing import Zone
from gateway.verdict import Result
from policies.verify.dkim.report import DkimEvidence, auth_result
from policies.verify.keys import BadKey, PublicKey, parse_key
from policies.verify.signed import SignatureError, parse_coverage, parse_signer
from policies.verify.tags import TagError, parse_tags, without_tag
from tests.dkimkit import judge_all, sign
from tests.mailkit import compose, ed25519_key, rsa_key

RSA, ED = rsa_key("example.org"), ed25519_key("example.org", "ed")
SIGNED = sign(sign(compose("a@example.org", body="Hi.\r\n"), RSA, {"z": "From:a|To:=20b"}), ED, {"l": "3"})
RECORDS = (RSA.record.encode(), ED.record.encode())

# What the grammar is made of, and what it is not
LISTS = st.lists(
    st.sampled_from(
        [b"a", b"b", b"v", b"1", b"_", b"=", b";", b" ", b"\t", b"\r\n ", b"\r\n", b"\r", b"\0", b"\xc3\xa4"]
    )
    | st.binary(max_size=2),
    max_size=14,
).map(b"".join)
NAMES = st.sampled_from(
    ["v", "a", "b", "bh", "c", "d", "h", "i", "l", "q", "s", "t", "x", "z", "k", "p", "n"]
)
WORDS = (
    *(
        "1",
        "rsa-sha256",
        "ed25519-sha256",
        "rsa-sha1",
        "relaxed/simple",
        "example.org",
        "@example.org",
        "from:to",
    ),
    *(
        "s1",
        "AAAA",
        "",
        "dns/txt",
        "DKIM1",
        "*",
        "email",
        "y:s",
        "bücher.example",
        "9" * 76,
        "9" * 13,
        "a" * 64,
    ),
)
VALUES = st.sampled_from(WORDS)
TAG_LISTS = st.lists(st.tuples(NAMES, VALUES | st.text(max_size=5)), max_size=12).map(
    lambda tags: ";".join(f"{name}={value}" for name, value in tags).encode("utf-8", "surrogatepass")
)


def tags_by_the_grammar(text: bytes) -> dict[str, bytes] | None:
    """RFC 6376 3.2 by one pattern for each tag-spec; None for what is no tag-list."""
    fws = rb"(?:[ \t]|\r\n[ \t])*"
    value = rb"(?:[!-:<-~](?:(?:[ \t]|\r\n[ \t])*[!-:<-~])*)?"
    spec = re.compile(rb"%s([A-Za-z][A-Za-z0-9_]*)%s=%s(%s)%s" % (fws, fws, fws, value, fws))
    pieces = text.split(b";")
    if len(pieces) > 1 and re.fullmatch(fws, pieces[-1]):
        pieces.pop()
    found = [spec.fullmatch(piece) for piece in pieces]
    tags = {match[1].decode(): match[2] for match in found if match}
    return tags if len(tags) == len(pieces) else None


@given(LISTS | TAG_LISTS)
def test_tag_list_is_what_the_grammar_says(text: bytes) -> None:
    try:
        tags: dict[str, bytes] | None = parse_tags(text)
    except TagError:
        tags = None
    assert tags == tags_by_the_grammar(text)
    if tags and "b" in tags:
        assert parse_tags(without_tag(text, b"b")) == tags | {"b": b""}


@given(TAG_LISTS, st.booleans())
def test_signature_is_parsed_or_refused(text: bytes, utf8: bool) -> None:
    try:
        tags = parse_tags(text, utf8=utf8)
    except TagError:
        return
    with suppress(SignatureError):
        assert parse_signer(tags).question.name.isascii()
    with suppress(SignatureError):
        assert all(parse_coverage(tags).names)


@given(
    LISTS
    | TAG_LISTS
    | st.tuples(st.sampled_from(RECORDS), st.integers(0, 400), st.binary(max_size=3)).map(
        lambda change: change[0][: change[1]] + change[2] + change[0][change[1] + len(change[2]) :]
    )
)
def test_record_is_a_key_or_says_why_not(record: bytes) -> None:
    key = parse_key(record)
    if isinstance(key, BadKey):
        assert key.why
    else:
        assert isinstance(key, PublicKey)
        assert not key.verify(b"", b"\0" * 32)
        assert not key.verify(b"\xff" * 256, b"\0" * 32)


@given(st.integers(0, len(SIGNED) - 1), st.integers(0, 3), st.binary(max_size=4), st.booleans())
def test_changed_message_is_judged(at: int, removed: int, added: bytes, utf8: bool) -> None:
    octets = SIGNED[:at] + added + SIGNED[at + removed :]
    if octets[:1] in (b" ", b"\t", b"\r", b"\n"):
        return  # no header: refused before
    zone = Zone({RSA.name: {RRType.TXT: [RECORDS[0]]}, ED.name: {RRType.TXT: [RECORDS[1]]}})
    try:
        judged = judge_all(octets, zone, is_internationalized=utf8)
    except HeaderError:
        return  # so here
    assert len(judged) <= 3
    for each in judged:
        assert auth_result(each).result in Result
    assert DkimEvidence(judged).lines()
