"""exact: what is written of a DNS record is read back to the octet, and is one printable line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision.exact import parse_record, record_text
from gateway.lookup import Mx, Record, RRType

names = st.text(max_size=30)
records: st.SearchStrategy[tuple[RRType, Record]] = st.one_of(
    st.tuples(st.just(RRType.A), st.ip_addresses(v=4)),
    st.tuples(st.just(RRType.AAAA), st.ip_addresses(v=6)),
    st.tuples(st.just(RRType.MX), st.builds(Mx, st.integers(0, 65_535), names)),
    st.tuples(st.just(RRType.TXT), st.binary()),
    st.tuples(st.sampled_from([RRType.NS, RRType.PTR]), names),
)


@given(records)
def test_every_record_comes_back(pair: tuple[RRType, Record]) -> None:
    rrtype, record = pair
    assert parse_record(rrtype, record_text(record)) == record


@given(st.binary())
def test_a_txt_record_is_one_line_of_printable_ascii(record: bytes) -> None:
    text = record_text(record)
    assert text.isascii()
    assert text.isprintable()


@given(st.sampled_from(RRType), st.text())
def test_any_text_is_a_record_or_a_value_error(rrtype: RRType, text: str) -> None:
    try:
        record = parse_record(rrtype, text)
    except ValueError:
        return
    assert isinstance(record_text(record), str)


def test_a_person_can_read_it() -> None:
    assert record_text(b"v=spf1 a:\\x \xc3\x9f\t-all") == r"v=spf1 a:\\x \195\159\009-all"


@pytest.mark.parametrize("text", ["\\", "a\\1", "\\256", "\u00fc", "\t", "\\12x"])
def test_what_nobody_has_written_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of several kinds
        parse_record(RRType.TXT, text)
