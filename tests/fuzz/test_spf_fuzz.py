"""SPF's parser beside a slow one, written from the grammar of RFC 7208 12 term by term (`./dev fuzz -k spf`)."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.lookup import RRType
from gateway.session import client_address
from gateway.testing import Zone
from policies.verify.spf import check_host, received_spf
from policies.verify.spf.record import RecordError, is_record, parse_record

# RFC 7208 12, as regular expressions; quantifiers may try many ways, which is why this one is slow
MACRO = r"(?:%\{[slodiphv](?:0*[1-9][0-9]*)?r?[-.+,/_=]*\}|%%|%_|%-)"
MACRO_STRING = rf"(?:{MACRO}|[!-$&-~])*"
TOP_LABEL = r"(?:[0-9a-z]*[a-z][0-9a-z]*|[0-9a-z]+-[0-9a-z-]*[0-9a-z])"
DOMAIN_SPEC = rf"{MACRO_STRING}(?:\.{TOP_LABEL}\.?|{MACRO})"
CIDR4 = r"(?:/(?:[0-9]|[12][0-9]|3[0-2]))"
CIDR6 = r"(?:/(?:[0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))"
DUAL_CIDR = rf"{CIDR4}?(?:/{CIDR6})?"
OCTET = r"(?:[0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])"
IP4 = rf"{OCTET}(?:\.{OCTET}){{3}}"
H16 = r"[0-9a-f]{1,4}"
# RFC 5954 4.1
IP6 = "|".join(
    [
        rf"(?:{H16}:){{6}}(?:{H16}:{H16}|{IP4})",
        *(
            rf"(?:(?:{H16}:){{0,{before - 1}}}{H16})?::(?:{H16}:){{{5 - before}}}(?:{H16}:{H16}|{IP4})"
            for before in range(1, 6)
        ),
        rf"::(?:{H16}:){{5}}(?:{H16}:{H16}|{IP4})",
        rf"(?:(?:{H16}:){{0,5}}{H16})?::{H16}",
        rf"(?:(?:{H16}:){{0,6}}{H16})?::",
    ]
)
MECHANISM = re.compile(
    rf"[-+?~]?(?:all|(?:include|exists):{DOMAIN_SPEC}|(?:a|mx)(?::{DOMAIN_SPEC})?{DUAL_CIDR}|ptr(?::{DOMAIN_SPEC})?"
    rf"|ip4:{IP4}{CIDR4}?|ip6:(?:{IP6}){CIDR6}?)",
    re.IGNORECASE,
)
KNOWN_MODIFIER = re.compile(rf"(redirect|exp)=({DOMAIN_SPEC})", re.IGNORECASE)
MODIFIER = re.compile(rf"([a-z][a-z0-9._-]*)={MACRO_STRING}", re.IGNORECASE)


def is_right(text: str) -> bool:
    """By the grammar, and RFC 7208 6 on modifiers that stand twice."""
    seen = set()
    for term in text[6:].split(" "):
        modifier = MODIFIER.fullmatch(term)
        if modifier and modifier[1].lower() in ("redirect", "exp"):
            if modifier[1].lower() in seen or not KNOWN_MODIFIER.fullmatch(term):
                return False
            seen.add(modifier[1].lower())
        elif term and not modifier and not MECHANISM.fullmatch(term):
            return False
    return True


def is_taken(text: bytes) -> bool:
    try:
        parse_record(text)
    except RecordError:
        return False
    return True


words = st.sampled_from(
    [
        *("a", "mx", "ptr", "all", "ip4", "ip6", "exists", "include", "redirect=", "exp=", "x=", "A", "Mx"),
        *(
            ":",
            "/",
            "//",
            "/24",
            "/0",
            "/33",
            "//64",
            "//129",
            ".",
            "-",
            "+",
            "~",
            "=",
            " ",
            " ",
            "192.0.2.1",
            "1.2.3",
        ),
        *(
            "2001:db8::1",
            "::",
            "1:2",
            "::1.2.3.4",
            "example",
            ".org",
            ".7",
            "x-y",
            "%{d}",
            "%{l1r-}",
            "%%",
            "%_",
            "%-",
        ),
        *("%{d0}", "%{ir}", "%{c}", "%", "{", "}", "d", "r", "0", "12", "%{D2R.}", "\t", "ü"),
    ]
)
texts = st.lists(words, max_size=9).map(lambda parts: "v=spf1 " + "".join(parts)) | st.text(max_size=30).map(
    "v=spf1 {}".format
)


@given(texts)
def test_a_record_is_right_when_the_grammar_says_so(text: str) -> None:
    assert is_taken(text.encode("utf-8", "surrogatepass")) == is_right(text)


@given(st.binary(max_size=200))
def test_octets_are_a_record_or_an_error(octets: bytes) -> None:
    assert is_record(b"v=spf1 " + octets)
    assert is_taken(b"v=spf1 " + octets) in (True, False)


@given(texts, st.text(max_size=80), st.text(max_size=80))
def test_what_a_stranger_sends_ends_no_field(text: str, mail_from: str, helo: str) -> None:
    zone = Zone({"example.org": {RRType.TXT: [text.encode("utf-8", "surrogatepass")]}})
    found = zone.run(check_host(client_address("192.0.2.1"), "example.org", mail_from, helo))
    value = received_spf(found, mail_from=mail_from, helo=helo, is_helo=False, receiver=helo)
    unfolded = value.replace("\r\n\t", " ")
    assert unfolded.isascii()
    assert unfolded.isprintable()
    # what stands outside of quotes is ours
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', unfolded)
    assert '"' not in bare.replace('""', "")
    assert re.fullmatch(r"[a-z]+ \([A-Za-z ]+\) [a-z-]+=[^;()]*(?:; [a-z-]+=[^;()]*)*", bare), bare
