"""Whose word counts: nobody's but that of listed sealers, back to the first of them who says the author is genuine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gateway.smtp.address import Domain
from gateway.verdict import Result
from policies.verify.arc.chain import prepare, validate
from policies.verify.arc.report import ArcEvidence
from policies.verify.arc.trust import Standing, Trust, claims, trusted_claim
from policies.verify.domain_list import DomainList
from tests.mailkit import (
    HONEST,
    SealOptions,
    SigningKey,
    arrive,
    compose,
    message_of,
    rsa_key,
    seal,
    zone_of,
)

AUTHOR = Domain.parse("author.example")
LIST = rsa_key("list.example")
FORWARDER = rsa_key("mail.forwarder.example", number=1)
STRANGER = rsa_key("stranger.example", number=2)
LISTED = DomainList(["list.example", ".forwarder.example"])
YES = "mx; dmarc=pass header.from=author.example"
NO = "mx; dmarc=fail header.from=author.example; arc=pass"

Hop = tuple[SigningKey, str] | tuple[SigningKey, str, SealOptions]


def trust(*hops: Hop, message: bytes = b"", listed: DomainList = LISTED) -> Trust:
    """What is believed of a message that went by these hops, the first of them the oldest."""
    octets = message or compose()
    for key, results, *rest in hops:
        octets = seal(octets, key, results, rest[0] if rest else HONEST)
    return trust_of(octets, listed)


def trust_of(octets: bytes, listed: DomainList = LISTED) -> Trust:
    read = message_of(octets)
    chain = prepare(read.header, read.digests)
    arrive(read)
    zone = zone_of(LIST, FORWARDER, STRANGER)
    result = zone.run(validate(chain, read.header, read.digests, now=1_700_000_100))
    assert result.result is Result.PASS, result.reason
    found = trusted_claim(result.sets, read.header, AUTHOR, listed)
    ArcEvidence(result, AUTHOR, found).lines()
    return found


@pytest.mark.parametrize(
    ("hops", "sealer"),
    [
        ([(LIST, YES)], "list.example"),
        # what came before a listed sealer that saw the author itself does not matter
        ([(STRANGER, NO), (LIST, YES)], "list.example"),
        ([(STRANGER, YES), (LIST, YES)], "list.example"),
        # a forwarder that got what a list had broken hands on the word of the list
        ([(LIST, YES), (FORWARDER, NO)], "list.example"),
        ([(LIST, YES), (FORWARDER, NO), (LIST, NO)], "list.example"),
        ([(STRANGER, NO), (LIST, YES), (FORWARDER, NO)], "list.example"),
        # the newest claim is enough
        ([(LIST, YES), (FORWARDER, YES)], "mail.forwarder.example"),
        ([(LIST, NO), (FORWARDER, YES)], "mail.forwarder.example"),
    ],
)
def test_believes_the_first_claim_behind_which_there_are_listed_sealers_only(
    hops: Sequence[Hop], sealer: str
) -> None:
    assert trust(*hops).sealer == sealer


@pytest.mark.parametrize(
    "hops",
    [
        [(STRANGER, YES)],
        [(LIST, NO)],
        [(LIST, NO), (FORWARDER, NO)],
        # one that is not listed had it in its hands behind the one who is
        [(LIST, YES), (STRANGER, YES)],
        [(LIST, YES), (STRANGER, NO), (FORWARDER, NO)],
        [(LIST, YES), (STRANGER, YES), (LIST, NO)],
        # a forger seals as if he were a forwarder and has it sent by a list
        [(STRANGER, YES), (LIST, NO)],
    ],
)
def test_believes_nothing_where_a_sealer_that_is_not_listed_comes_before_a_claim(hops: Sequence[Hop]) -> None:
    assert trust(*hops).sealer is None


def test_says_what_was_made_of_each_sealer_on_the_way_back() -> None:
    assert trust((LIST, YES), (STRANGER, YES), (LIST, NO)).standings == (
        Standing.NO_CLAIM,
        Standing.NOT_LISTED,
    )
    assert trust((LIST, YES), (LIST, NO)).standings == (Standing.NO_CLAIM, Standing.BELIEVED)


def test_an_empty_list_believes_nobody() -> None:
    assert trust((LIST, YES), listed=DomainList([])).sealer is None


def test_the_domain_itself_is_not_listed_by_a_dot() -> None:
    assert trust((LIST, YES), listed=DomainList([".list.example"])).sealer is None
    assert trust((FORWARDER, YES), listed=DomainList(["forwarder.example"])).sealer is None


def test_both_signatures_of_a_set_have_to_be_by_listed_domains() -> None:
    foreign = SealOptions(ams_key=STRANGER)

    assert trust((LIST, YES, foreign)).standings == (Standing.NOT_LISTED,)
    assert trust((LIST, YES), (LIST, NO, foreign)).sealer is None
    assert trust((LIST, YES, foreign), (LIST, NO)).sealer is None


def test_from_has_to_be_signed() -> None:
    assert trust((LIST, YES, SealOptions(headers=("to", "subject")))).standings == (Standing.NOT_AS_SEALED,)


@pytest.mark.parametrize("field", ["Subject: Buy", "To: all@example.org", "SUBJECT : x", "Message-ID: <2@x>"])
def test_a_second_field_of_a_kind_that_stands_once_may_not_be_put_above_a_seal(field: str) -> None:
    octets = field.encode() + b"\r\n" + seal(compose(), LIST, YES)

    assert trust_of(octets).standings == (Standing.NOT_AS_SEALED,)


def test_other_fields_may() -> None:
    assert trust_of(
        b"Received: x\r\nX-Spam: no\r\nReply-To: a@b.example\r\n" + seal(compose(), LIST, YES)
    ).sealer


@pytest.mark.parametrize(
    "results",
    [
        "mx; dmarc=pass header.from=author.example",
        "mx; dmarc=pass",
        "mx; DMARC=PASS (p=reject) Header.From=Author.Example",
        'mx; spf=fail; dmarc=pass (p=none; dis=none) header.from="author.example"; dkim=none',
        "mx 1; spf=pass smtp.mailfrom=x; dmarc=pass action=none header.from=author.example;\r\n\tdkim=fail",
        "mx; dkim=pass header.d=author.example",
        "mx; dkim=pass (2048-bit key) header.i=@author.example header.s=s1 header.b=abc",
        "mx; dkim=fail header.d=author.example; dkim=pass header.d=author.example",
        "mx; spf=pass smtp.mailfrom=bounce@author.example",
        'mx; spf=pass smtp.mailfrom="a; b@c"@author.example',
    ],
)
def test_an_aar_claims_the_author_by_dmarc_or_by_an_aligned_pass(results: str) -> None:
    assert claims(f" {results}".encode(), AUTHOR)


@pytest.mark.parametrize(
    "results",
    [
        "",
        "mx",
        "mx; none",
        "mx; dmarc=fail header.from=author.example",
        "mx; dmarc=none header.from=author.example; dkim=pass header.d=author.example",
        "mx; dmarc=temperror; spf=pass smtp.mailfrom=author.example",
        "mx; dmarc=bestguesspass header.from=author.example",
        "mx; dmarc=pass header.from=evil.example",
        "mx; dmarc=pass header.from=author.example header.from=evil.example",
        "mx; dmarc=pass header.from=",
        # a claim that got in by what a sealer copied, beside its own
        "mx; spf=fail smtp.mailfrom=x;dmarc=pass header.from=author.example; dmarc=fail header.from=author.example",
        "mx; dmarc=fail header.from=author.example; dmarc=pass",
        'mx; spf=fail smtp.mailfrom="a; dmarc=pass header.from=author.example"',
        "mx; spf=fail (; dmarc=pass header.from=author.example) smtp.mailfrom=x",
        "mx; dkim=pass",
        "mx; dkim=pass header.d=evil.example header.i=@author.example",
        "mx; dkim=pass header.d=author.example header.d=evil.example",
        "mx; dkim=pass header.d=sub.author.example",
        "mx; dkim=pass header.d=example",
        "mx; dkim=fail header.d=author.example",
        "mx; spf=softfail smtp.mailfrom=author.example",
        "mx; spf=pass smtp.helo=author.example",
        "mx; spf=pass smtp.mailfrom=author.example@evil.example",
        "mx; arc=pass header.d=author.example",
        "mx; iprev=pass policy.iprev=author.example",
    ],
)
def test_an_aar_claims_nothing_else(results: str) -> None:
    assert not claims(f" {results}".encode(), AUTHOR)


@pytest.mark.parametrize("filler", ["; dkim=fail" * 60, "; dkim=fail reason=" + "x" * 20_000])
def test_an_aar_that_is_beyond_measure_claims_nothing(filler: str) -> None:
    assert not claims(f"{YES}{filler}; dmarc=fail".encode(), AUTHOR)
