"""Canonicalisation of header fields: as a plain reading of RFC 6376 3.4.2 and dkimpy have it."""

from __future__ import annotations

import re

import dkim.canonicalization  # type: ignore[import-untyped]  # it has no annotations
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import Canonicalization, Field
from policies.verify.canonical import canonical_fields, canonical_header

SIMPLE, RELAXED = Canonicalization
TEXT = st.lists(
    st.sampled_from([b"a", b"B:", b" ", b"\t", b"\r\n ", b"\r\n\t", b"\xff", b"\x0b", b"\x0c"]), max_size=12
).map(b"".join)


def relaxed(raw: bytes) -> bytes:
    """RFC 6376 3.4.2, step by step."""
    name, _, value = raw.replace(b"\r\n", b"").partition(b":")
    value = re.sub(rb"[ \t]+", b" ", value).strip(b" ")
    return name.lower().rstrip(b" \t") + b":" + value + b"\r\n"


@given(TEXT)
def test_relaxed_is_what_the_rfc_says(text: bytes) -> None:
    raw = b"Subject \t:" + text + b"\r\n"
    assert canonical_header(raw, RELAXED) == relaxed(raw)
    assert canonical_header(raw, SIMPLE) == raw
    fields = [Field(b"subject", raw), Field(b"x", b"X:  y\r\n")]
    assert canonical_fields(fields, RELAXED) == relaxed(raw) + b"x:y\r\n"
    assert canonical_fields(fields, SIMPLE) == raw + b"X:  y\r\n"


@given(TEXT.filter(lambda text: not {0x0B, 0x0C} & set(text)))
def test_relaxed_is_what_dkimpy_says(text: bytes) -> None:
    ((name, value),) = dkim.canonicalization.Relaxed.canonicalize_headers([(b"Subject", text + b"\r\n")])
    assert canonical_header(b"Subject:" + text + b"\r\n", RELAXED) == name + b":" + value


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (b"A: X\r\n", b"a:X\r\n"),  # RFC 6376 3.4.5
        (b"B : Y\t\r\n\tZ  \r\n", b"b:Y Z\r\n"),
        (b"C:\r\n", b"c:\r\n"),
        (b"D\r\n : x\r\n", b"d:x\r\n"),
    ],
)
def test_relaxed_field(raw: bytes, canonical: bytes) -> None:
    assert canonical_header(raw, RELAXED) == canonical
