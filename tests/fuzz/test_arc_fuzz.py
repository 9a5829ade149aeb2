"""ARC fields, changed chains and AARs: a status or the one typed error, never more (`./dev fuzz -k arc`)."""

from __future__ import annotations

import re
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from gateway.mail.message import HeaderError, parse_header
from gateway.smtp.address import Domain
from gateway.verdict import Result
from policies.verify.arc.chain import ChainResult, prepare, validate
from policies.verify.arc.report import ArcEvidence, auth_result
from policies.verify.arc.sets import ChainError, read_sets
from policies.verify.arc.trust import claims
from tests.mailkit import arrive, compose, ed25519_key, message_of, rsa_key, seal, zone_of

AUTHOR = Domain.parse("author.example")
LIST = rsa_key("list.example")
RELAY = ed25519_key("relay.example")
SEAL = "ARC-Seal: i={i}; a=rsa-sha256; cv={cv}; d=list.example; s=s1; b=AAAA\r\n"
AMS = "ARC-Message-Signature: i={i}; a=rsa-sha256; d=list.example; s=s1; h=from; bh=AAAA; b=AAAA\r\n"
AAR = "ARC-Authentication-Results: i={i}; mx.list.example; dmarc=pass\r\n"


def status(octets: bytes) -> ChainResult:
    message = message_of(octets)
    chain = prepare(message.header, message.digests)
    arrive(message)
    zone = zone_of(LIST, RELAY)
    result = zone.run(validate(chain, message.header, message.digests, now=1_700_000_100))
    assert len(zone.trail) <= 20
    auth_result(result, None)
    ArcEvidence(result).lines()
    return result


def honest() -> bytes:
    """A chain of two hops."""
    octets = seal(compose(body="Hello  Bob.\r\n\r\n"), LIST, "mx.list.example; dmarc=pass")
    return seal(octets, RELAY, "mx.relay.example; dmarc=fail; arc=pass")


FIELD = st.sampled_from([SEAL, AMS, AAR]).flatmap(
    lambda field: st.builds(
        lambda i, cv, junk: field.format(i=i, cv=cv).encode().replace(b"b=AAAA", b"b=AAAA" + junk),
        st.integers(0, 3),
        st.sampled_from(["none", "pass", "fail", ""]),
        st.binary(max_size=5).map(lambda junk: junk.replace(b"\r", b"").replace(b"\n", b"")),
    )
)
JUNK = st.sampled_from([b"arc-seal", b"ARC-Message-Signature", b"Arc-Authentication-Results"]).flatmap(
    lambda name: st.lists(
        st.sampled_from([b"i", b"=", b"1", b";", b"(", b")", b"\\", b" ", b"\r\n ", b"\xff", b"\0", b'"'])
    ).map(lambda parts: name + b":" + b"".join(parts) + b"\r\n")
)


@given(st.lists(FIELD | JUNK, max_size=12))
def test_any_fields_are_a_chain_or_a_chain_error(fields: list[bytes]) -> None:
    octets = b"".join(fields)
    header = parse_header(octets, max_fields=1000, wire_bytes=len(octets))
    try:
        sets = read_sets(header)
    except ChainError:
        return
    assert [each.instance for each in sets] == list(range(1, len(sets) + 1))
    assert 3 * len(sets) == len(fields)


PIECES = st.sampled_from(
    [b" ", b"x", b";", b"=", b"\t", b"\r\n ", b"\r\n", b"\0", b"\xff", b"i=1", b"\r\nArc-Seal: i=3;"]
)


@given(st.data())
def test_a_changed_chain_passes_only_where_the_change_means_nothing(data: st.DataObject) -> None:
    octets = honest()
    at = data.draw(st.integers(1, len(octets) - 1))
    size = data.draw(st.integers(0, 3))
    changed = octets[:at] + data.draw(PIECES) + octets[at + size :]

    with suppress(HeaderError):  # refused before any policy sees it
        result = status(changed)
        if result.result is Result.PASS:
            assert meaning(changed) == meaning(octets)


def meaning(octets: bytes) -> tuple[object, ...]:
    """What relaxed canonicalisation leaves of the fields that are signed and of the body."""
    header, _, body = octets.partition(b"\r\n\r\n")
    fields = [
        (name.strip().lower(), re.sub(rb"[ \t\r\n]+", b" ", value).strip())
        for name, _, value in (field.partition(b":") for field in re.split(rb"\r\n(?![ \t])", header))
    ]
    signed = (b"from", b"to", b"subject", b"date", b"message-id")
    # of b= white space means nothing, anywhere
    sealed = sorted(
        re.sub(rb"\b(b|bh)=[^;]*", lambda tag: b"".join(tag[0].split()), value)
        for name, value in fields
        if name.startswith(b"arc-")
    )
    lines = [re.sub(rb"[ \t]+", b" ", line).rstrip() for line in body.split(b"\r\n")]
    while lines and not lines[-1]:
        lines.pop()
    return [(n, v) for n, v in fields if n in signed], sealed, lines


@given(st.binary(max_size=300), st.booleans())
def test_junk_never_raises(junk: bytes, is_above: bool) -> None:
    octets = honest()

    with suppress(HeaderError):
        status(b"X: " + junk + b"\r\n" + octets if is_above else octets.replace(b"b=", b"b=" + junk, 1))


PART = st.sampled_from(
    [
        "mx",
        "; ",
        "dmarc",
        "=",
        "pass",
        "fail",
        " header.from=",
        "author.example",
        '"',
        "(",
        ")",
        "\\",
        "\r\n ",
    ]
)


@given(st.lists(PART, max_size=15).map("".join).map(str.encode) | st.binary(max_size=60))
def test_any_octets_claim_or_do_not(results: bytes) -> None:
    assert claims(results, AUTHOR) in (True, False)
    # a sealer's own word that the author was not authenticated stands, whatever is put before it
    if b'"' not in results and b"(" not in results:
        assert not claims(results + b"; dmarc=fail header.from=author.example", AUTHOR)
