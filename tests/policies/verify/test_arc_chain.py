"""ARC chains: real seals of several hops; what was changed behind a sealer breaks them, DNS trouble does not."""

from __future__ import annotations

import time
from dataclasses import replace

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest

from gateway.lookup import Question, RRType
from gateway.testing import Zone
from gateway.verdict import Result
from policies.verify.arc.chain import MAX_KEYS, ChainResult, prepare, validate
from tests.mailkit import (
    SealOptions,
    SigningKey,
    arrive,
    compose,
    ed25519_key,
    message_of,
    rsa_key,
    seal,
    zone_of,
)

NOW = 1_700_000_100.0
LIST = rsa_key("list.example", number=1)
FORWARDER = ed25519_key("forwarder.example")
RELAY = rsa_key("relay.example", "2023._x", number=2)
ALL = zone_of(LIST, FORWARDER, RELAY)
DMARC_PASS = "mx.{}; dmarc=pass header.from=author.example"
AS_IT_CAME = compose(body="Hello  Bob.\r\n\r\n")


def forwarded(*keys: SigningKey, message: bytes = AS_IT_CAME) -> bytes:
    """The message with an honest set of each of these, the first of them the oldest."""
    for key in keys:
        message = seal(message, key, DMARC_PASS.format(key.domain))
    return message


def status(octets: bytes, zone: Zone = ALL, *, now: float = NOW) -> ChainResult:
    message = message_of(octets)
    chain = prepare(message.header, message.digests)
    arrive(message)
    return zone.run(validate(chain, message.header, message.digests, now=now))


def dkimpy_says(octets: bytes, zone: Zone = ALL) -> str:
    """The second opinion; not for Ed25519, which its ARC does not know."""

    def txt(name: bytes, timeout: int = 5) -> bytes | None:
        texts = zone.answer(Question(name.decode(), RRType.TXT)).texts
        return texts[0] if texts else None

    cv = dkim.arc_verify(octets, dnsfunc=txt)[0]
    return cv.decode() if cv else "fail"


@pytest.mark.parametrize("hops", [(LIST,), (LIST, RELAY), (RELAY, LIST, RELAY, LIST, RELAY)])
def test_chains_of_honest_hops_pass_as_dkimpy_says_too(hops: tuple[SigningKey, ...]) -> None:
    octets = forwarded(*hops)
    result = status(octets)

    assert result.result is Result.PASS
    assert result.reason == ""
    assert result.oldest_pass == 0
    assert [each.link.sealer.domain for each in result.sets] == [key.domain for key in reversed(hops)]
    assert dkimpy_says(octets) == "pass"


def test_ed25519_seals_pass() -> None:
    assert status(forwarded(FORWARDER, LIST, FORWARDER)).result is Result.PASS


def test_a_message_without_a_chain_has_none_and_asks_nothing() -> None:
    message = message_of(AS_IT_CAME)

    assert prepare(message.header, message.digests) is None
    assert not message.digests.is_wanted
    assert status(AS_IT_CAME) == ChainResult(Result.NONE)


@pytest.mark.parametrize("mode", ["simple/simple", "simple/relaxed", "relaxed/simple", "relaxed"])
def test_an_ams_may_be_of_any_canonicalization(mode: str) -> None:
    octets = seal(AS_IT_CAME, LIST, "mx; dmarc=pass", SealOptions(canonicalization=mode))

    assert status(octets).result is Result.PASS


def test_fifty_sets_of_one_sealer_pass_with_one_question() -> None:
    zone = zone_of(LIST)

    assert status(forwarded(*[LIST] * 50), zone).oldest_pass == 0
    assert len(zone.trail) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((b"Hello  Bob", b"Hello Mallory"), "ARC-Message-Signature 2: body hash did not verify"),
        ((b"Subject: Hello", b"Subject: Buy"), "ARC-Message-Signature 2: signature did not verify"),
        ((b"mx.relay.example; dmarc=pass", b"mx.relay.example; dmarc=fail"), "ARC-Seal 2: signature did not verify"),
        ((b"mx.list.example; dmarc=pass", b"mx.list.example; dmarc=fail"), "ARC-Seal 2: signature did not verify"),
        ((b"cv=none", b"cv=none; v=1"), "ARC-Seal 2: signature did not verify"),
    ],
)  # fmt: skip
def test_what_was_changed_behind_the_newest_sealer_breaks_the_chain(
    change: tuple[bytes, bytes], reason: str
) -> None:
    octets = forwarded(LIST, RELAY)
    changed = octets.replace(*change)

    assert changed != octets
    result = status(changed)
    assert (result.result, result.reason) == (Result.FAIL, reason)
    assert result.oldest_pass is None
    assert dkimpy_says(changed) == "fail"


def test_what_a_list_changes_before_it_seals_leaves_the_chain_whole_and_says_how_far_back_the_message_is_old() -> (
    None
):
    octets = forwarded(
        LIST, message=forwarded(RELAY, FORWARDER).replace(b"Subject: Hello", b"Subject: [l] Hello")
    )
    octets = forwarded(LIST, message=octets)

    result = status(octets)

    assert (result.result, result.oldest_pass) == (Result.PASS, 3)
    assert [each.ams and each.ams.result for each in result.sets] == [
        Result.PASS,
        Result.PASS,
        Result.FAIL,
        None,
    ]


def test_an_older_ams_that_is_beyond_understanding_is_none_that_passes() -> None:
    octets = seal(AS_IT_CAME, LIST, "mx; dmarc=pass", SealOptions(ams_tags=" x=;"))

    assert status(octets).reason == "ARC-Message-Signature 1: x= is no number"
    assert status(forwarded(LIST, message=octets)).oldest_pass == 2


def test_a_seal_that_is_beyond_understanding_breaks_the_chain() -> None:
    octets = forwarded(LIST, RELAY).replace(b"cv=none; d=list.example", b"cv=none; d=example")

    assert status(octets).reason == "ARC-Seal 1: d= is a single label"


def test_the_seals_of_two_sealers_cannot_be_put_together() -> None:
    """A set of one message is of no use on another, though each signature in it is right."""
    other = forwarded(LIST, message=compose(subject="Other"))
    fields = other[: other.index(b"From:")]

    assert status(fields + AS_IT_CAME).reason == "ARC-Message-Signature 1: signature did not verify"
    # an older set under a newer one of another message
    newest = forwarded(LIST, RELAY)
    newest = newest[: newest.index(b"ARC-Seal: i=1")]
    assert status(newest + fields + AS_IT_CAME).reason == "ARC-Seal 2: signature did not verify"


@pytest.mark.parametrize("missing", ["list.example", "relay.example"])
def test_a_key_that_is_not_there_breaks_the_chain(missing: str) -> None:
    zone = zone_of(*(key for key in (LIST, RELAY) if key.domain != missing))
    result = status(forwarded(LIST, RELAY), zone)

    assert result.result is Result.FAIL
    assert result.reason.endswith(": no key for signature")


@pytest.mark.parametrize("failing", [LIST, RELAY])
def test_a_key_that_cannot_be_looked_up_for_now_is_a_temperror_of_the_chain(failing: SigningKey) -> None:
    zone = zone_of(LIST, RELAY)
    zone.nodes[failing.name] = {RRType.TXT: "servfail"}
    result = status(forwarded(LIST, RELAY), zone)

    assert result.result is Result.TEMPERROR
    assert "the look-up of the key failed for now: servfail" in result.reason
    assert result.oldest_pass is None


def test_what_no_key_can_mend_is_a_failure_whatever_dns_says() -> None:
    zone = Zone({key.name: {RRType.TXT: "timeout"} for key in (LIST, RELAY)})
    octets = forwarded(LIST, RELAY)

    assert status(octets.replace(b"Bob.", b"Eve."), zone).result is Result.FAIL
    zone.nodes[RELAY.name] = {RRType.TXT: [RELAY.record.encode()]}
    assert (
        status(octets.replace(b"mx.list.", b"mx.evil."), zone).reason
        == "ARC-Seal 2: signature did not verify"
    )


def test_l_may_not_leave_a_part_of_the_body_unsigned() -> None:
    whole = seal(AS_IT_CAME, LIST, "mx; dmarc=pass", SealOptions(ams_tags=" l=12;"))
    body_bytes = len("Hello Bob.\r\n")

    assert body_bytes == 12
    assert status(whole).result is Result.PASS
    assert status(whole + b"More.\r\n").reason == "ARC-Message-Signature 1: l= is not the length of the body"


@pytest.mark.parametrize(
    ("tags", "now", "result"),
    [
        (" x=1700000200;", NOW, Result.PASS),
        (" x=1700000200;", NOW + 300, Result.PASS),
        (" x=1700000200;", NOW + 1000, Result.FAIL),
        ("", NOW - 1000, Result.FAIL),
    ],
)
def test_an_ams_has_its_time_as_signatures_of_dkim_have(tags: str, now: float, result: Result) -> None:
    assert status(seal(AS_IT_CAME, LIST, "mx", SealOptions(ams_tags=tags)), now=now).result is result


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (SealOptions(headers=("from", "ARC-Seal")), "ARC-Message-Signature 1: h= lists ARC-Seal"),
        (SealOptions(ams_key=rsa_key("list.example", "absent")), "ARC-Message-Signature 1: no key for signature"),
        (SealOptions(ams_tags=" c=nowsp;", canonicalization=""), "a signature is malformed: a tag stands twice"),
        (SealOptions(instance=2), "a set is missing or not complete"),
        (SealOptions(cv="pass"), "the cv= of seal 1 is not what its position asks"),
    ],
)  # fmt: skip
def test_sets_that_are_signed_well_but_are_not_as_they_have_to_be(options: SealOptions, reason: str) -> None:
    result = status(seal(AS_IT_CAME, LIST, "mx; dmarc=pass", options))

    assert (result.result, result.reason) == (Result.FAIL, reason)


def test_keys_are_asked_for_all_at_once_and_no_more_than_a_chain_of_ten_hops_has() -> None:
    keys = [replace(LIST, selector=f"k{n}") for n in range(MAX_KEYS)]
    zone = zone_of(*keys, LIST)

    assert status(forwarded(*keys), zone).result is Result.PASS
    assert len(zone.trail) == MAX_KEYS
    zone.trail.clear()
    result = status(forwarded(*keys, LIST), zone)
    assert (result.result, result.reason) == (Result.FAIL, "there are more than 20 keys to look up")
    assert not zone.trail


def test_keys_of_older_amss_are_left_out_where_there_are_too_many() -> None:
    """They are for oldest-pass only."""
    keys = [replace(LIST, selector=f"k{n}") for n in range(MAX_KEYS + 5)]
    octets = AS_IT_CAME
    for key in keys:
        octets = seal(octets, LIST, "mx; dmarc=pass", SealOptions(ams_key=key))
    zone = zone_of(*keys, LIST)

    assert status(octets, zone).oldest_pass == 7
    assert len(zone.trail) == MAX_KEYS


def many(sets: int) -> bytes:
    return b"".join(
        b"ARC-Seal: i=%d; a=rsa-sha256; cv=%s; d=d%d.example; s=s1; b=AAAA\r\n"
        b"ARC-Message-Signature: i=%d; a=rsa-sha256; d=e%d.example; s=s1; h=from; bh=AAAA; b=AAAA\r\n"
        b"ARC-Authentication-Results: i=%d; x; dmarc=pass\r\n"
        % (n, b"none" if n == 1 else b"pass", n, n, n, n)
        for n in range(1, sets + 1)
    )


@pytest.mark.parametrize("sets", [10, 11, 40, 50, 51, 500])
def test_sets_of_many_forgers_cost_few_questions(sets: int) -> None:
    message = message_of(many(sets) + AS_IT_CAME)
    chain = prepare(message.header, message.digests)

    assert chain is not None
    assert len(chain.questions) <= MAX_KEYS
    zone = Zone()
    arrive(message)
    assert zone.run(validate(chain, message.header, message.digests, now=NOW)).result is Result.FAIL
    assert not zone.trail  # the body is not what the newest AMS says


def test_a_long_chain_with_long_fields_costs_linear_time() -> None:
    """Fifty sets, each AMS over a header of 200 kB: the worst that one who owns keys can do."""
    octets = compose(fields=[f"X-{n}: {'a b ' * 250}" for n in range(200)])
    options = SealOptions(headers=("from", *(f"x-{n}" for n in range(200))))
    for _ in range(50):
        octets = seal(octets, FORWARDER, "mx; dmarc=pass", options)
    began = time.process_time()

    assert status(octets).oldest_pass == 0
    assert time.process_time() - began < 2
