"""DMARC records: what counts of them, and that any text is a record or none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.verify.dmarc.record import DmarcPolicy, DmarcRecord, Psd, only_record, parse_record

NONE, QUARANTINE, REJECT = DmarcPolicy


def record(text: str) -> DmarcRecord:
    parsed = parse_record(text.encode())
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v=DMARC1x; p=reject",
        "v=dmarc1; p=reject",
        "v=DMARC1 p=reject",
        "v=DMARC2; p=reject",
        " v=DMARC1; p=reject",
        "p=reject; v=DMARC1",
        "v=spf1 -all",
        "v=DMARC1\n; p=reject",
        "version=DMARC1",
    ],
)
def test_what_does_not_begin_with_the_version_is_no_record(text: str) -> None:
    assert parse_record(text.encode()) is None


@pytest.mark.parametrize(
    "text",
    [
        "v=DMARC1;p=reject",
        "v = DMARC1 ; p = reject",
        "V=DMARC1; p=reject",
        "v=DMARC1; P=REJECT;",
        "v=DMARC1; p=reject; P=none",
        "v=DMARC1;;; p=reject ;;",
        "v=DMARC1; x=y; p=reject; pct=0; rf=afrf; ri=1",
        "v=DMARC1; p=reject; p=none",
        "v=DMARC1; junk; =; p=reject; \x00=1; adkim",
        "v=DMARC1; p=reject; adkim=x; aspf=; t=1; psd=z",
        "v=DMARC1; p=reject; rua=junk",
    ],
)
def test_what_breaks_the_syntax_is_ignored(text: str) -> None:
    assert record(text) == DmarcRecord(REJECT, REJECT, REJECT)


@pytest.mark.parametrize(
    ("text", "policies"),
    [
        ("p=reject; sp=quarantine; np=none", (REJECT, QUARANTINE, NONE)),
        ("p=reject; sp=quarantine", (REJECT, QUARANTINE, QUARANTINE)),
        ("p=reject; np=none", (REJECT, REJECT, NONE)),
        ("p=none; sp=reject", (NONE, REJECT, REJECT)),
    ],
)
def test_np_falls_back_to_sp_and_sp_to_p(text: str, policies: tuple[DmarcPolicy, ...]) -> None:
    assert record(f"v=DMARC1; {text}")[:3] == policies


@pytest.mark.parametrize("policies", ["", "p=", "p=rejected", "sp=reject", "p=reject; sp=x", "p=reject; np="])
def test_an_invalid_policy_is_none_for_who_asks_for_reports_else_nothing(policies: str) -> None:
    asks = record(f"v=DMARC1; rua=mailto:d@example.org; {policies}")
    assert (asks.p, asks.sp, asks.np, asks.is_applicable) == (NONE, NONE, NONE, True)
    assert not record(f"v=DMARC1; {policies}").is_applicable


@pytest.mark.parametrize(
    ("rua", "is_applicable"),
    [
        ("mailto:a@example.org!10m", True),
        ("junk, https://example.org/x", True),
        ("a@example.org", False),
        ("mailto:", False),
        ("mailto:a b", False),
        ("", False),
    ],
)
def test_reports_are_asked_for_with_a_uri(rua: str, is_applicable: bool) -> None:
    assert record(f"v=DMARC1; rua={rua}").is_applicable is is_applicable


def test_other_tags() -> None:
    assert record("v=DMARC1; p=none; adkim=S; aspf=s; psd=Y; t=y") == DmarcRecord(
        is_dkim_strict=True, is_spf_strict=True, psd=Psd.YES, is_test=True
    )
    assert record("v=DMARC1; p=none; psd=n").psd is Psd.NO


def test_several_records_are_none() -> None:
    reject, other = b"v=DMARC1; p=reject", b"v=spf1 -all"
    assert only_record([other, reject, b""]) == record("v=DMARC1; p=reject")
    assert only_record([reject, b"v=DMARC1"]) is None
    assert only_record([other]) is None


def test_a_policy_is_lowered_by_one_level() -> None:
    assert [policy.lowered for policy in DmarcPolicy] == [NONE, NONE, QUARANTINE]


def test_shows_what_counts() -> None:
    assert str(record("v=DMARC1; p=reject; t=y; aspf=s")) == (
        "p=reject sp=reject np=reject adkim=r aspf=s psd=u t=y"
    )
    assert str(record("v=DMARC1; p=none; adkim=s")) == "p=none sp=none np=none adkim=s aspf=r psd=u"


TAGS = st.tuples(
    st.sampled_from(["p", "sp", "np", "adkim", "aspf", "psd", "t", "rua", "x", "v"]),
    st.sampled_from(
        ["none", "quarantine", "reject", "y", "n", "r", "s", "", "mailto:a@b.example", "\xff", "\x00"]
    ),
)


@given(st.lists(TAGS, max_size=8), st.sampled_from(["", " ", "\t "]))
def test_the_order_of_different_tags_and_blanks_do_not_matter(
    tags: list[tuple[str, str]], blank: str
) -> None:
    unique = dict(reversed(tags))
    plain = ";".join(["v=DMARC1", *(f"{name}={value}" for name, value in unique.items())])
    spaced = f"{blank};{blank}".join(
        [f"v{blank}={blank}DMARC1", *(f"{n}{blank}={blank}{v}" for n, v in reversed(unique.items()))]
    )
    assert parse_record(plain.encode("latin-1")) == parse_record(spaced.encode("latin-1"))


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(b"v=DMARC1;".__add__)))
def test_any_text_is_a_record_or_none(text: bytes) -> None:
    parsed = parse_record(text)
    assert parsed is None or text[:1] in b"vV"


@pytest.mark.parametrize(
    "rest",
    [
        ",".join(["rua=mailto:a@example.org"] * 3000) + ";" * 3000,
        "sp=" + " " * 64_000 + "\xff",
        "sp=" + " =" * 32_000 + "\xff",
        " " * 64_000 + "\xff",
        "sp" + "\t" * 64_000 + "\xff",
        "s" * 64_000,
    ],
)
def test_a_long_record_is_read_in_no_time(rest: str) -> None:
    begun = time.process_time()
    assert record(f"v=DMARC1; p=reject; {rest}").p is REJECT
    # 0.001 s here; there may be a record at each of some eighty names
    assert time.process_time() - begun < 0.1


def test_what_stands_far_behind_is_not_read() -> None:
    near, far = " " * 4000, " " * 4096
    assert record(f"v=DMARC1; p=reject;{near}; np=none") == DmarcRecord(REJECT, REJECT, NONE)
    assert record(f"v=DMARC1; p=reject;{far}; np=none") == DmarcRecord(REJECT, REJECT, REJECT)
