"""DKIM signatures: each rule of RFC 6376, 8301, 8463, 8616 and of ours, and the word and reason that come of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import pytest

from gateway.lookup import BUDGET, OUT_OF_TIME, Question, RRType
from gateway.testing import Zone
from gateway.verdict import Result
from policies.verify.dkim.report import DkimEvidence, auth_result
from policies.verify.dkim.signature import Refused, parse_signatures
from policies.verify.dkim.verify import Judged, Limits, judge, want_bodies
from policies.verify.signed import SINGLETONS, Step
from tests.dkimkit import NOW, bare_rsa, judge_all, sign
from tests.mailkit import SigningKey, arrive, compose, dkim_sign, ed25519_key, message_of, rsa_key, zone_of

D = "author.example"
RSA, OTHER = rsa_key(D), rsa_key(D, "s2", number=1)
ED = ed25519_key(D, "ed")
ZONE = zone_of(RSA, OTHER, ED)
MAIL = compose(fields=["Content-Type: text/plain"])


def one(octets: bytes, zone: Zone = ZONE, **keys: Any) -> Judged:
    """What is found at the only signature."""
    (judged,) = judge_all(octets, zone, **keys)
    return judged


def word(octets: bytes, zone: Zone = ZONE, **keys: Any) -> tuple[Result, Step]:
    finding = one(octets, zone, **keys).finding
    assert bool(finding.reason) == (finding.result is not Result.PASS)
    return finding.result, finding.step


def published(record: str, key: SigningKey = RSA) -> Zone:
    """A zone in which the key's name has this record; "{p}" stands for its p=."""
    text = record.replace("{p}", key.record.partition("p=")[2])
    return Zone({key.name: {RRType.TXT: [text.encode()]}})


PASS = (Result.PASS, Step.NONE)
REFUSED = (Result.PERMERROR, Step.SIGNATURE)
NO_KEY = (Result.PERMERROR, Step.KEY)
HEADER_CHANGED = (Result.FAIL, Step.HEADER)
BODY_CHANGED = (Result.FAIL, Step.BODY)


@pytest.mark.parametrize("key", [RSA, ED], ids=["rsa", "ed25519"])
@pytest.mark.parametrize(
    "modes", [None, "simple", "relaxed", "simple/relaxed", "relaxed/simple", "relaxed/relaxed"]
)
@pytest.mark.parametrize("body", ["", "\r\n", "a  b \r\n\r\n\r\n", "x\r\n"])
def test_signature_of_every_algorithm_and_canonicalisation_passes(
    key: SigningKey, modes: str | None, body: str
) -> None:
    assert word(sign(compose(body=body), key, {"c": modes})) == PASS


def test_signatures_by_dkimpy_pass() -> None:
    for key in (RSA, ED):
        assert word(dkim_sign(MAIL, key), now=time.time()) == PASS


@pytest.mark.parametrize(
    "changes",
    [
        {"t": str(NOW), "x": str(NOW + 1)},
        {"x": str(NOW - 300)},
        {"t": str(NOW + 300)},
        {"i": f"@{D}"},
        {"i": f"ann@sub.{D.upper()}"},
        {"i": f"=20a@{D}"},
        {"i": f'"a@b"@{D}'},
        {"d": D.upper()},
        {"q": "dns/txt"},
        {"q": "x-other : dns/txt"},
        {"h": "FROM"},
        {"h": " from :\r\n\tTo : x-absent"},
        {"h": "from:from:to:to:subject"},
        {"h": "from:dkim-signature"},
        {"unknown": "tag", "z": "From:x|To:y"},
        {"l": "12"},  # the whole body
    ],
)
def test_what_the_rfc_allows_passes(changes: Mapping[str, str | None]) -> None:
    assert word(sign(MAIL, RSA, changes)) == PASS


@pytest.mark.parametrize(
    "changes",
    [
        {"v": None},
        {"v": "2"},
        {"v": "1.0"},
        {"a": None},
        {"a": "rsa-sha512"},
        {"a": "RSA-SHA256"},
        {"a": "ed448-shake256"},
        {"b": "!"},
        {"b": " "},
        {"bh": None},
        {"bh": "a"},
        {"bh": "="},
        {"c": "nowsp"},
        {"c": "relaxed/"},
        {"c": "relaxed/relaxed/relaxed"},
        {"d": None},
        {"d": "example"},
        {"d": f"{D}."},
        {"d": "a_b.example"},
        {"d": "192.0.2.1"},
        {"d": f"{D}\x00.example.org"},
        {"d": "author.example'a.attack.example"},
        {"d": "author.example(.attack.example"},
        {"d": "a" * 64 + ".example"},
        {"d": "xn--a.example"},
        {"d": f"{D}", "s": ".".join(["b" * 50] * 5)},
        {"s": None},
        {"s": "b" * 64},
        {"s": "a..b"},
        {"s": "a b"},
        {"s": "s1._domainkey.attack.example\x00.x"},
        {"h": None},
        {"h": "to:subject"},
        {"h": "from::to"},
        {"h": "from:to:"},
        {"h": "from:a b"},
        {"i": "@example.org"},
        {"i": f"@x{D}"},
        {"i": "@example"},
        {"i": D},
        {"i": f"a@b@{D}"},
        {"i": ""},
        {"l": "-1"},
        {"l": "1" * 77},
        {"l": "0x1"},
        {"l": ""},
        {"q": "http"},
        {"q": "dns"},
        {"t": "now"},
        {"t": str(NOW), "x": str(NOW)},
        {"t": "1" * 13},
        {"x": "-5"},
        {"n": "\xe4"},
        {"n": "\x7f"},
        {"n": "a\x00b"},
        {"1": "a"},
    ],
)
def test_malformed_signature_is_a_permerror_and_no_question_is_asked(
    changes: Mapping[str, str | None],
) -> None:
    zone = zone_of(RSA)
    assert word(sign(MAIL, RSA, changes), zone) == REFUSED
    assert not zone.trail


@pytest.mark.parametrize("tag", ["d=example.net", "d = x", "v=1", "b=x"])
def test_tag_that_stands_twice_is_a_permerror(tag: str) -> None:
    octets = sign(MAIL, RSA).replace(b"v=1; ", f"v=1; {tag}; ".encode(), 1)
    assert word(octets) == REFUSED


def test_rsa_sha1_is_not_accepted_and_its_domain_is_told() -> None:
    judged = one(sign(MAIL, RSA, {"a": "rsa-sha1"}))
    assert judged.finding == (Result.POLICY, Step.SIGNATURE, "rsa-sha1 is not accepted")
    properties = auth_result(judged).properties
    assert properties[:-1] == (("header.d", D), ("header.s", "s1"), ("header.a", "rsa-sha1"))
    assert properties[-1][0] == "header.b"


@pytest.mark.parametrize("changes", [{"x": str(NOW - 301)}, {"t": str(NOW + 301)}])
def test_signature_of_another_time_is_not_accepted(changes: Mapping[str, str | None]) -> None:
    zone = zone_of(RSA)
    assert word(sign(MAIL, RSA, changes), zone) == (Result.POLICY, Step.TIME)
    assert not zone.trail


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("v=DKIM1; p={p}", PASS),
        ("v=DKIM1; t=y; p={p}", PASS),
        ("v=DKIM1; t=s; p={p}", PASS),
        ("v=DKIM1; k=rsa; h=sha256:sha1; s=email; p={p}", PASS),
        ("v=DKIM1; p=", NO_KEY),
        ("v=DKIM1; k=rsa", NO_KEY),
        ("v=DKIM1; h=sha1; p={p}", NO_KEY),
        ("v=DKIM1; s=other; p={p}", NO_KEY),
        ("v=DKIM1; k=ed25519; p=" + ED.record.partition("p=")[2], NO_KEY),
        ("junk", NO_KEY),
        (OTHER.record, HEADER_CHANGED),
    ],
    ids=count(),  # keys are made anew in each process
)
def test_key_record_says_whether_it_may_verify(record: str, expected: tuple[Result, Step]) -> None:
    assert word(sign(MAIL, RSA), published(record)) == expected


def test_strict_key_is_for_its_own_domain_only() -> None:
    zone = published("v=DKIM1; t=y:s; p={p}")
    assert word(sign(MAIL, RSA, {"i": f"a@{D}"}), zone) == PASS
    assert word(sign(MAIL, RSA, {"i": f"a@sub.{D}"}), zone) == NO_KEY


def test_rsa_key_below_the_least_length_never_passes() -> None:
    judged = one(sign(MAIL, RSA), published(f"v=DKIM1; p={bare_rsa((1 << 767) | 1, 3)}"))
    assert judged.finding == (Result.POLICY, Step.KEY, "the RSA key has only 768 bits")
    assert word(sign(MAIL, RSA), limits=Limits(min_rsa_bits=2049)) == (Result.POLICY, Step.KEY)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({}, NO_KEY),
        ({RRType.TXT: "TIMEOUT"}, (Result.TEMPERROR, Step.KEY)),
        ({RRType.TXT: "SERVFAIL"}, (Result.TEMPERROR, Step.KEY)),
        ({"CNAME": ["nowhere.example"]}, NO_KEY),
    ],
)
def test_key_that_is_not_to_be_had(node: Any, expected: tuple[Result, Step]) -> None:
    assert word(sign(MAIL, RSA), Zone({RSA.name: node})) == expected


def test_no_such_name_is_a_permerror() -> None:
    assert word(sign(MAIL, RSA), Zone()) == NO_KEY


def test_of_several_records_those_that_are_keys_are_tried() -> None:
    records = ["junk", "v=DKIM1; p=", OTHER.record, ED.record, RSA.record]
    zone = Zone({RSA.name: {RRType.TXT: [each.encode() for each in records]}})
    assert word(sign(MAIL, RSA), zone) == PASS
    zone = Zone({RSA.name: {RRType.TXT: [each.encode() for each in records[:-1]]}})
    assert word(sign(MAIL, RSA), zone) == HEADER_CHANGED


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["junk"] * 5 + [OTHER.record] * 2, PASS),
        (["junk"] * 8, NO_KEY),
        ([OTHER.record] * 3, HEADER_CHANGED),
    ],
    ids=count(),
)
def test_many_records_are_not_all_tried(others: list[str], expected: tuple[Result, Step]) -> None:
    zone = Zone({RSA.name: {RRType.TXT: [each.encode() for each in (*others, RSA.record)]}})
    assert word(sign(MAIL, RSA), zone) == expected


def test_changed_body_fails_whatever_the_key_says() -> None:
    octets = sign(MAIL, RSA) + b"added\r\n"
    judged = one(octets)
    assert judged.finding == (Result.FAIL, Step.BODY, "body hash did not verify")
    assert judged.proof is not None
    assert judged.proof.result is Result.PASS
    assert word(octets, Zone({RSA.name: {RRType.TXT: "TIMEOUT"}})) == BODY_CHANGED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Subject: Hello", b"Subject: Hallo"),
        (b"Subject:", b"X-Subject:"),
        (b"; t=", b"; u=1; t="),
        (b"; s=s1", b"; s=s2"),
    ],
)
def test_changed_header_fails(old: bytes, new: bytes) -> None:
    assert word(sign(MAIL, RSA, {"t": str(NOW)}).replace(old, new, 1)) == HEADER_CHANGED


def test_length_limit_that_leaves_text_unsigned_is_not_accepted() -> None:
    octets = sign(compose(body="real\r\n"), RSA, {"l": "6"})
    assert word(octets) == PASS
    assert word(octets + b"evil\r\n") == (Result.POLICY, Step.COVERAGE)
    noted = one(octets + b"evil\r\n", limits=Limits(allows_partial_body=True)).finding
    assert noted == (Result.PASS, Step.COVERAGE, "the body is longer than l=")
    assert word(sign(MAIL, RSA, {"l": "0"})) == (Result.POLICY, Step.COVERAGE)


def test_length_limit_beyond_the_body_fails() -> None:
    assert one(sign(compose(body="real\r\n"), RSA, {"l": "7"})).finding == (
        Result.FAIL,
        Step.BODY,
        "the body is shorter than l=",
    )


@pytest.mark.parametrize("name", sorted(SINGLETONS))
@pytest.mark.parametrize("is_above", [True, False])
def test_added_instance_of_a_signed_field_that_stands_once_never_passes(name: bytes, is_above: bool) -> None:
    mail = b"Reply-To: r@example.org\r\nCc: c@example.org\r\nMIME-Version: 1.0\r\n"
    mail += b"Content-Transfer-Encoding: 8bit\r\n" + MAIL
    signed = sign(mail, RSA, {"h": b":".join(sorted(SINGLETONS)).decode()})
    assert word(signed) == PASS
    added = name.title() + b" : eve@example.net\r\n"
    octets = added + signed if is_above else signed.replace(b"\r\n\r\n", b"\r\n" + added + b"\r\n", 1)
    expected = (Result.POLICY, Step.COVERAGE) if is_above else HEADER_CHANGED
    assert word(octets) == expected


def test_field_that_is_signed_once_more_than_it_stands_cannot_be_added() -> None:
    octets = sign(MAIL, RSA, {"h": "from:from:subject:subject"})
    assert word(octets) == PASS
    assert word(b"Subject: Other\r\n" + octets) == HEADER_CHANGED


def test_unsigned_fields_may_be_added() -> None:
    octets = sign(MAIL, RSA, {"h": "from"})
    assert word(b"Received: x\r\nSubject: a\r\nSubject: b\r\n" + octets) == PASS


def test_fields_are_taken_from_the_bottom_up() -> None:
    octets = sign(b"X-A: 2\r\nX-A: 1\r\n" + MAIL, RSA, {"h": "from:x-a:x-a"})
    assert word(octets) == PASS
    assert word(b"X-A: 3\r\n" + octets) == PASS
    assert word(octets.replace(b"X-A: 2\r\nX-A: 1", b"X-A: 1\r\nX-A: 2")) == HEADER_CHANGED


def test_signatures_over_signatures() -> None:
    inner = sign(MAIL, RSA)
    outer = sign(inner, OTHER, {"h": "from:dkim-signature"})
    assert [each.finding.result for each in judge_all(outer, ZONE)] == [Result.PASS, Result.PASS]


def test_first_signatures_are_judged_and_each_name_is_asked_once() -> None:
    octets = MAIL
    for number in range(12):
        octets = sign(octets, RSA if number % 2 else ED)
    zone = zone_of(RSA, ED)
    assert len(judge_all(octets, zone)) == 10
    assert len(zone.trail) == 2
    assert len(judge_all(octets, zone, most=3)) == 3


def test_all_keys_are_asked_together() -> None:
    message = message_of(sign(sign(MAIL, RSA), ED))
    signatures = parse_signatures(message.header, now=NOW, most=10)
    want_bodies(signatures, message.digests)
    arrive(message)
    lookup = judge(message.header, message.digests, signatures, Limits())
    assert next(lookup) == (Question(ED.name, RRType.TXT), Question(RSA.name, RRType.TXT))
    with pytest.raises(StopIteration) as stop:
        lookup.send((OUT_OF_TIME, ZONE.answer(Question(RSA.name, RRType.TXT))))
    first, second = stop.value.value
    assert first.finding.result is Result.TEMPERROR
    assert BUDGET in first.finding.reason
    assert second.finding.result is Result.PASS


def test_u_labels_are_for_internationalized_messages() -> None:
    key = rsa_key("xn--bcher-kva.example", "xn--slektor-rya")
    octets = sign(MAIL, key, {"d": "bücher.example", "s": "sëlektor", "i": "bücher@bücher.example"})
    assert word(octets, zone_of(key)) == REFUSED
    judged = one(octets, zone_of(key), is_internationalized=True)
    assert judged.finding.result is Result.PASS
    properties = dict(auth_result(judged).properties)
    assert properties["header.d"] == "xn--bcher-kva.example"
    assert properties["header.i"] == "bücher@bücher.example"
    for change in ({"a": "rsa-sha256ä"}, {"h": "from:ä"}, {"c": "ä"}, {"s": "_ä"}, {"i": "a@\u017f.example"}):
        assert word(sign(MAIL, key, change), zone_of(key), is_internationalized=True) == REFUSED


def test_result_names_its_signature() -> None:
    judged = one(sign(MAIL, ED, {"i": f"ann@{D}"}))
    result = auth_result(judged)
    assert (result.method, result.result, result.reason) == ("dkim", Result.PASS, "")
    names = [name for name, _ in result.properties]
    assert names == ["header.d", "header.i", "header.s", "header.a", "header.b"]
    shown = dict(result.properties)["header.b"]
    assert len(shown) == 8
    assert f"b={shown}".encode() in judged.signature.field.raw


def test_testing_domain_is_told() -> None:
    zone = published("v=DKIM1; t=y; p={p}")
    assert auth_result(one(sign(MAIL, RSA), zone)).reason == "the domain is testing"
    failed = one(sign(MAIL, RSA).replace(b"Subject: Hello", b"Subject: Bye"), zone)
    assert failed.is_testing
    assert auth_result(failed).reason == "signature did not verify (the domain is testing)"


def test_what_can_be_told_of_a_refused_signature_is_told() -> None:
    (refused,) = parse_signatures(
        message_of(b"DKIM-Signature: d=example.org; s=a(b\r\n" + MAIL).header, now=NOW, most=1
    )
    assert isinstance(refused, Refused)
    result = auth_result(Judged(refused, refused.finding))
    assert (result.result, result.properties) == (Result.PERMERROR, (("header.d", "example.org"),))


def test_evidence_says_what_was_compared() -> None:
    changed = (
        sign(MAIL, RSA, {"z": "From:ann@author.example|subject : Bye=20|To:bob@ example.org"}) + b"more\r\n"
    )
    octets = b"DKIM-Signature: junk\r\n" + changed.replace(b"Subject: Hello", b"Subject: Hi")
    lines = DkimEvidence(judge_all(octets, ZONE), unread=3).lines()
    assert lines == [
        "signature 1 by nobody: permerror, a tag has no value",
        "  refused at its signature, so no key was asked for",
        "signature 2 by author.example: fail, body hash did not verify",
        "  rsa-sha256, key at s1._domainkey.author.example, header relaxed, body relaxed",
        "  signed fields: from to subject date message-id",
        "  body: changed since it was signed",
        "  header: changed since it was signed, or signed with another key",
        "  changed since it was signed, by its copy in z=: subject",
        "3 more signatures were not looked at",
    ]
    assert DkimEvidence(()).lines() == ["no signature"]


def test_evidence_says_which_key_was_missing() -> None:
    judged = judge_all(sign(MAIL, RSA, {"l": "5"}), Zone())
    assert DkimEvidence(judged).lines()[-2:] == [
        "  body (its first 5 octets): as it was signed",
        "  key: no key for signature",
    ]


def test_field_that_stood_twice_and_is_signed_twice_passes() -> None:
    octets = sign(b"To: carl@example.org\r\n" + MAIL, RSA, {"h": "from:to:to"})
    assert word(octets) == PASS
    assert word(b"To: eve@example.net\r\n" + octets) == (Result.POLICY, Step.COVERAGE)


def test_evidence_says_that_a_domain_is_testing() -> None:
    judged = judge_all(sign(MAIL, RSA), published("v=DKIM1; t=y; p={p}"))
    assert DkimEvidence(judged).lines()[-1] == "  the domain only tests DKIM (t=y)"


def test_evidence_of_a_long_list_of_fields_is_short() -> None:
    judged = judge_all(sign(MAIL, RSA, {"h": "from" + ":x" * 60}), ZONE)
    assert DkimEvidence(judged).lines()[2].endswith(" x and 11 more")
