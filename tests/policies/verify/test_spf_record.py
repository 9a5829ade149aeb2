"""SPF records and macros: what the grammar of RFC 7208 12 takes, and what comes of it."""

from __future__ import annotations

import time
from itertools import count

import pytest

from gateway.api import Result
from policies.verify.spf.macro import MacroError, expand_domain, expand_text, parse_macro_string
from policies.verify.spf.record import MAX_OCTETS, Mechanism, RecordError, is_record, parse_record

MANY = 8000
# RFC 7208 7.4
VALUES = {
    "s": "strong-bad@email.example.com",
    "l": "strong-bad",
    "o": "email.example.com",
    "d": "email.example.com",
    "i": "192.0.2.3",
    "v": "in-addr",
    "h": "mx.example.org",
    "p": "mx.example.org",
    "c": "192.0.2.3",
    "r": "mx.example.net",
    "t": "1",
}

WRONG = [
    *[
        "a/33",
        "a//129",
        "a/024",
        "a/",
        "a//",
        "a/24/64",
        "a/1//",
        "a:",
        "a:x",
        "a:x.",
        "a:x..",
        "a:x.7",
        "a:x.-y",
        "a:x.y-",
        "a:x.y:25",
        "a:%{d}x",
        "a:%{d}.x_y",
        "a:x.y,",
        "ip4",
        "ip4:",
        "ip4:1.2.3",
        "ip4:1.2.3.04",
        "ip4:1.2.3.4/33",
        "ip4:1.2.3.4//32",
        "ip4:1.2.3.4/",
        "ip4:1.2.3.4/+8",
        "ip6:fe80::1%eth0",
        "ip6:::1/129",
        "ip6:1:2:3",
        "ip6::1",
        "include",
        "include:",
        "include:x.y/24",
        "exists",
        "ptr:",
        "ptr/8",
        "all:",
        "-all.",
        "all/8",
        "--all",
        "+",
        "-",
        "*all",
        "moo",
        "moo:x.y",
        "redirect=",
        "redirect=x",
        "exp=",
        "=x",
        "1up=x",
        "_x=y",
        "a:%",
        "a:%x.y",
        "a:%{.y",
        "a:%{}.y",
        "a:%{q}.y",
        "a:%{c}.y",
        "a:%{t}.y",
        "a:%{r}.y",
        "a:%{d0}.y",
        "a:%{d00}.y",
        "a:%{d-r}.y",
        "a:%{d;}.y",
        "a:%{dd}.y",
        "a:%{2d}.y",
        "m=%{c}",
        "m=%",
        "redirect:x.y",
    ],
    "ip4:1.2.3.4 .5",
    "a:%{ d}.y",
    "a:\xfc.y",
    "a:x.y\x00",
    "a:x\t.y",
    "exp=x.y exp=x.y",
    "redirect=x.y redirect=x.y",
    "all\r",
]

RIGHT = [
    *[
        "a",
        "a/0",
        "a//0",
        "a/32//128",
        "a:x.y",
        "a:x.y.",
        "a:%{d}",
        "a:foo:bar/baz.example.com",
        "a:x/1.y/24//64",
        "a:.com",
        "a:x.1-2",
        "a:%%",
        "a:x%_",
        "mx:%{l1r+-.,/_=}.x.yz",
        "a:x.%{D}//64",
        "ip4:0.0.0.0/0",
        "ip6:::/0",
        "ip6:::1.2.3.4",
        "exists:%{ir}.%{v}._spf.%{d2}",
        "ptr",
        "PTR:x.y",
        "include:x.y",
        "?all",
        "m=",
        "a.b-c_d=x:/y",
        "a=b",
        "redirect=%{d}",
        "exp=%{o}.x.y",
        "a:%{d007}",
        "a:%{d99999999}",
        "a:%{d1R}",
    ],
]


def expanded(text: str) -> str:
    return expand_domain(parse_macro_string(text), VALUES)


@pytest.mark.parametrize("text", ["v=spf1", "V=SPF1 -all", "v=spf1 "])
def test_a_record_begins_with_its_version(text: str) -> None:
    assert is_record(text.encode())


@pytest.mark.parametrize(
    "text", ["", "v=spf10 -all", "v=spf1-all", " v=spf1", "v=spf1\t-all", "spf1", "v=spf2.0/pra"]
)
def test_other_texts_are_no_records(text: str) -> None:
    assert not is_record(text.encode())


def test_terms_and_modifiers_are_read_in_any_case_and_order() -> None:
    record = parse_record(b"v=spf1  REDIRECT=a.example ~MX/24//64 x=%{d} -Ip4:192.0.2.9/24 Exp=b.example. ")
    mx, ip4 = record.directives
    assert (mx.mechanism, mx.result, mx.target) == (Mechanism.MX, Result.SOFTFAIL, None)
    assert (mx.mask4, mx.mask6) == (0xFFFFFF00, ((1 << 64) - 1) << 64)
    assert (ip4.result, ip4.version, ip4.network, ip4.mask) == (Result.FAIL, 4, 0xC0000200, 0xFFFFFF00)
    assert record.redirect is not None
    assert record.redirect.fixed == "a.example"
    assert record.exp is not None
    assert expand_domain(record.exp, {}) == "b.example"


@pytest.mark.parametrize("term", RIGHT)
def test_the_grammar_takes(term: str) -> None:
    parse_record(f"v=spf1 {term}".encode())


@pytest.mark.parametrize("term", WRONG)
def test_the_grammar_does_not_take(term: str) -> None:
    with pytest.raises(RecordError):
        parse_record(f"v=spf1 {term}".encode("latin-1"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # RFC 7208 7.4
        ("%{o}", "email.example.com"),
        ("%{d4}", "email.example.com"),
        ("%{d2}", "example.com"),
        ("%{d1}", "com"),
        ("%{dr}", "com.example.email"),
        ("%{d2r}", "example.email"),
        ("%{l-}", "strong.bad"),
        ("%{lr}", "strong-bad"),
        ("%{lr-}", "bad.strong"),
        ("%{l1r-}", "strong"),
        ("%{ir}.%{v}._spf.%{d2}", "3.2.0.192.in-addr._spf.example.com"),
        ("%{lr-}.lp.%{ir}.%{v}._spf.%{d2}", "bad.strong.lp.3.2.0.192.in-addr._spf.example.com"),
        ("%{p2}.trusted-domains.example.net", "example.org.trusted-domains.example.net"),
        # delimiters, whichever, are joined by dots; upper case is escaped
        ("%{s2r@}", ""),
        ("%{o-.}", "email.example.com"),
        ("%{o1r.}", "email"),
        ("%{S}", "strong-bad%40email.example.com"),
        ("%{d123456}", "email.example.com"),
        ("%%%_%-.x", "% %20.x"),
        ("x.example.", "x.example"),
    ],
)
def test_macros_expand_as_the_rfc_has_it(text: str, expected: str) -> None:
    if expected:
        assert expanded(text) == expected
    else:
        with pytest.raises(MacroError):
            parse_macro_string(text)


def test_a_long_name_loses_whole_labels_from_its_left() -> None:
    labels = ".".join(["0123456789"] * 23)  # 252 characters
    assert expanded(f"{labels}.x") == labels.partition(".")[2] + ".x"
    assert expanded(f"%{{l}}.{labels}.x.") == labels.partition(".")[2] + ".x"
    assert expanded("x." + "y" * 252) == "y" * 252
    assert expanded("y" * 254) == ""
    assert (
        expanded("%{d}." * 5000 + "example")
        == (("email.example.com." * 20 + "example")[-254:]).partition(".")[2]
    )


def test_an_explanation_may_hold_spaces_and_more_letters() -> None:
    text = parse_macro_string("%{c} at %{t} by %{R}", is_explanation=True)
    assert expand_text(text, VALUES, 100) == "192.0.2.3 at 1 by mx.example.net"
    assert expand_text(text, VALUES, 5) == "192.0"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v=spf1" + " " * MANY, ""),
        ("v=spf1" + " a" * (MANY // 2), ""),
        ("v=spf1 a" + "/1" * (MANY // 2), "misplaced"),
        ("v=spf1 a:x." + "a-" * (MANY // 2) + "!", "invalid domain"),
        ("v=spf1 a:x." + "1" * MANY, "invalid domain"),
        ("v=spf1 a:%{d" + "9" * MANY + "}", ""),
        ("v=spf1 a:%{d" + "-" * MANY + "}", ""),
        ("v=spf1 a:" + "%{l}" * (MANY // 4), ""),
        ("v=spf1 ip6:" + "1:" * (MANY // 2), "invalid ip6 network"),
        ("v=spf1 " + "a" * MANY + "=", ""),
        ("v=spf1" + " " * MAX_OCTETS, "more than 8192 octets"),
    ],
    ids=count(),
)
def test_a_long_text_is_read_and_one_without_measure_is_not(text: str, problem: str) -> None:
    begun = time.process_time()
    if problem:
        with pytest.raises(RecordError, match=problem):
            parse_record(text.encode())
    else:
        assert parse_record(text.encode()).text == text
    # 0.01 s here; a check may read eleven of them
    assert time.process_time() - begun < 0.5


def test_terms_are_shared_by_records_but_for_long_ones() -> None:
    short, long = "include:spf.example.org", f"include:{'a' * 60}.example.org"
    one, other = (parse_record(f"v=spf1 {short} {long} {end}".encode()) for end in ("-all", "~all"))
    assert one.directives[:2] == other.directives[:2]
    assert one.directives[0] is other.directives[0]
    assert one.directives[1] is not other.directives[1]
