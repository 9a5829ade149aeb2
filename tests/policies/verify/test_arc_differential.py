"""ARC beside dkimpy: of chains that were changed somewhere, both say pass to the same, but for the rule below."""

from __future__ import annotations

import random

import pytest

from gateway.mail.message import HeaderError
from policies.verify.arc.chain import prepare, validate
from policies.verify.second_opinion.signatures import arc_opinion
from tests.mailkit import arrive, compose, message_of, rsa_key, seal, zone_of

LIST = rsa_key("list.example")
RELAY = rsa_key("relay.example", number=1)
ZONE = zone_of(LIST, RELAY)
PIECES = [
    b"",
    b" ",
    b"\t",
    b"\r\n ",
    b"\r\n",
    b"x",
    b"A",
    b"a",
    b";",
    b" ;",
    b"=",
    b"=20",
    b":",
    b"i=1",
    b"; y=1",
    b"h=from;",
]


def we_pass(octets: bytes) -> bool:
    message = message_of(octets)
    chain = prepare(message.header, message.digests)
    arrive(message)
    result = ZONE.run(validate(chain, message.header, message.digests, now=1_700_000_100))
    return str(result.result) == "pass"


def can_arrive(octets: bytes) -> bool:
    """The rule: dkimpy takes a bare CR or LF for a line end, and an unended last line for text; neither comes in."""
    rest = octets.replace(b"\r\n", b"")
    return octets.endswith(b"\r\n") and not (b"\r" in rest or b"\n" in rest)


@pytest.mark.parametrize("seed", range(4))
def test_of_changed_chains_the_same_pass(seed: int) -> None:
    chain = seal(seal(compose(), LIST, "mx.list.example; dmarc=pass"), RELAY, "mx.relay.example; arc=pass")
    chance = random.Random(seed)
    passed = 0
    for _ in range(200):
        at = chance.randrange(1, len(chain))
        changed = chain[:at] + chance.choice(PIECES) + chain[at + chance.randrange(4) :]
        try:
            ours = we_pass(changed)
        except HeaderError:
            continue
        theirs = arc_opinion(changed, ZONE.answer).passes if can_arrive(changed) else None
        if theirs is not None:
            assert ours == theirs, changed
            passed += ours

    assert passed
