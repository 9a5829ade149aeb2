"""The DMARC record parser beside a slow one, written character by character (`./dev fuzz -k dmarc_record`)."""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st

from policies.verify.dmarc.record import DmarcPolicy, parse_record

WSP = " \t"
POLICIES = {policy.value for policy in DmarcPolicy}
PIECES = st.one_of(
    st.sampled_from(["p", "sp", "np", "adkim", "aspf", "psd", "t", "rua", "v", "P", "x1"]),
    st.sampled_from(
        ["none", "quarantine", "reject", "Reject", "y", "n", "s", "S", "r", "mailto:a@b.example", "a:b!1k"]
    ),
    st.sampled_from([*"=;, \t\n!\x00\x7f\xff", "=", ";", ";p=", ";sp=", ";rua=", "v=DMARC1;"]),
)


def is_uri(text: str) -> bool:
    scheme, colon, rest = text.strip(WSP).partition(":")
    rest, exclamation, size = rest.partition("!")
    if exclamation:
        size = size[:-1] if size[-1:] in tuple("kmgtKMGT") else size
        if not (size.isascii() and size.isdigit()):
            return False
    return (
        bool(colon and rest and scheme)
        and scheme[0] in string.ascii_letters
        and set(scheme) <= {*string.ascii_letters, *string.digits, *"+.-"}
        and not set(rest) & {*string.whitespace, *'!,"<>\\^`{|}'}
    )


def slow(text: str) -> tuple[object, ...] | None:
    """What a record says, in the order of DmarcRecord's fields."""
    first, *others = text.split(";")
    name, _, version = first.partition("=")
    if name.rstrip(WSP) not in {"v", "V"} or version.strip(WSP) != "DMARC1":
        return None
    tags: dict[str, str] = {}
    for other in others:
        name, equals, value = other.partition("=")
        name = name.strip(WSP)
        is_name = bool(name) and set(name) <= set(string.ascii_letters)
        if equals and is_name and all(" " <= c <= "~" or c == "\t" for c in value) and name not in tags:
            tags[name] = value.strip(WSP).lower()
    p, sp, np = (tags.get(name) for name in ("p", "sp", "np"))
    is_applicable = True
    if p not in POLICIES or sp not in {None, *POLICIES} or np not in {None, *POLICIES}:
        p, sp, np = "none", None, None
        is_applicable = any(is_uri(uri) for uri in tags.get("rua", "").split(","))
    sp = p if sp is None else sp
    np = sp if np is None else np
    psd = tags.get("psd")
    strict = (tags.get("adkim") == "s", tags.get("aspf") == "s")
    return (p, sp, np, *strict, psd if psd in {"y", "n"} else "u", tags.get("t") == "y", is_applicable)


@given(st.lists(PIECES, max_size=16).map("".join), st.booleans())
@example("V\t= DMARC1 ;p=reject", False)
@example(" v=DMARC1;p=reject", False)
@example("p=reject;sp=;rua=a:b!1k", True)
@example("p=reject;np=x;rua=a:b!1kk", True)
def test_reads_what_the_slow_parser_reads(text: str, is_record: bool) -> None:
    text = f"v=DMARC1;{text}" if is_record else text
    assert parse_record(text.encode("latin-1")) == slow(text)


@given(st.binary(max_size=300))
def test_any_octets_are_a_record_or_none(octets: bytes) -> None:
    parse_record(octets)
    assert parse_record(b"v=DMARC1;" + octets) is not None
