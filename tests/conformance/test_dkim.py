"""DKIM against the cases of mail-dkim (Perl) and chasquid (Go); what is asserted is their result with our rulings."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import pytest

from policies.verify.dkim.signature import parse_signatures
from policies.verify.dkim.verify import Limits, judge, want_bodies
from tests.conformance.vectors import disputed, suite, zone_of
from tests.mailkit import arrive, message_of

SUITES = ("dkim-mail-dkim/verifier", "dkim-chasquid/chasquid")
NOW = 1_800_000_000
# What a published word stands for, by the README of the cases
MEANINGS = {
    "fail": ("fail", "permerror", "policy", "neutral"),
    "invalid": ("fail", "permerror", "policy", "neutral", "none", "temperror"),
}
# The word of a message none of whose signatures passes: the first that occurs
ORDER = ("pass", "temperror", "fail", "policy", "permerror", "neutral", "none")


def cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path, case) for path in SUITES for case in suite(path)["cases"] if case.get("kind", "dkim") == "dkim"
    ]


def words_of(path: str, case: dict[str, Any]) -> tuple[str, ...]:
    """Our word for each signature of the message."""
    zones = suite(path)["zones"]
    zone = zone_of(zones[case["zone"]] if "zone" in case else zones[0])
    octets = b64decode(case["msg"])
    if octets[:1] in b" \t":
        return ()  # not a header: refused before anybody looks for signatures
    if b"\r\n" not in octets:
        octets = octets.replace(b"\n", b"\r\n")  # as `server.allow_bare_lf_from` lets it in
    message = message_of(octets)
    signatures = parse_signatures(message.header, now=NOW, most=10)
    want_bodies(signatures, message.digests)
    arrive(message)
    judged = zone.run(judge(message.header, message.digests, signatures, Limits()))
    return tuple(each.finding.result.value for each in judged)


def meets(word: str, expected: Sequence[str]) -> bool:
    return any(word in MEANINGS.get(each, (each,)) for each in expected)


@pytest.mark.parametrize(("path", "case"), [pytest.param(*each, id=each[1]["id"]) for each in cases()])
def test_signatures_are_judged_as_published_and_ruled(path: str, case: dict[str, Any]) -> None:
    ruling = disputed(path).get(case["id"], {})
    expected = ruling.get("expect", [case["expect"]])
    words = words_of(path, case)
    assert meets(min(words, key=ORDER.index, default="none"), expected)
    sigs = ruling.get("sigs", case.get("sigs"))
    if sigs is not None:
        assert len(words) == len(sigs)
        assert all(meets(word, [each]) for word, each in zip(words, sigs, strict=True))
