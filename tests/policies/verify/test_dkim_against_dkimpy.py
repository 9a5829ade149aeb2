"""DKIM beside dkimpy on generated messages, signed and then changed; each difference has a rule that explains it."""

from __future__ import annotations

import time
from collections import Counter
from random import Random
from typing import Any

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest

from gateway.lookup import RRType
from gateway.testing import Zone
from gateway.verdict import Result
from policies.verify.dkim.verify import Judged
from policies.verify.second_opinion.signatures import Opinion, dkim_opinion, known_dkim_difference
from policies.verify.signed import Step
from tests.dkimkit import HEADERS, judge_all, sign
from tests.mailkit import SigningKey, ed25519_key, rsa_key

DOMAIN = "author.example"
RSA, OTHER_RSA, SMALL_RSA = rsa_key(DOMAIN), rsa_key(DOMAIN, number=1), rsa_key(DOMAIN, bits=1024)
ED = ed25519_key(DOMAIN)
KEYS = (RSA, RSA, ED, SMALL_RSA)
NOW = int(time.time())


class World:
    """One generated message, and what DNS has for it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.key: SigningKey = self.random.choice(KEYS)
        self.records = [self.record()]
        self.notes: list[str] = []
        self.octets = self.signed()
        for _ in range(self.random.choice((0, 0, 1, 1, 2))):
            self.octets = self.mutated(self.octets)

    def record(self) -> bytes:
        public = self.key.record.partition("; ")[2]
        tags = self.random.choice(
            ("v=DKIM1; ",) * 8
            + (
                "",
                "v=DKIM1; h=sha256; ",
                "v=DKIM1; h=sha1; ",
                "v=DKIM1; s=email; ",
                "v=DKIM1;t=s;",
                "v=DKIM1; t=y; ",
            )
            + ("n=note; v=DKIM1; ", "v=DKIM2; ", "v=DKIM1; s=other; ", "v=DKIM1; h=sha1 : sha256;")
        )
        return (tags + public).encode()

    def signed(self) -> bytes:
        choice = self.random.choice
        tags: dict[str, str | None] = {
            "c": choice(
                ("simple/simple", "relaxed/simple", "simple/relaxed", "relaxed/relaxed", "relaxed", None)
            ),
            "h": choice((HEADERS, HEADERS, "From:To", "from : subject:from", "from:to:x-many:x-many:cc:cc")),
        }
        if self.random.random() < 0.5:
            tags |= choice(
                (
                    {"l": choice(("0", "5", "17", "100000"))},
                    {"t": str(NOW), "x": str(NOW + choice((0, 1, 3600)))},
                    {"x": str(NOW - choice((3600, 7 * 86400)))},
                    {"t": str(NOW + choice((3600, 7 * 86400)))},
                    {
                        "i": choice(
                            (
                                f"@{DOMAIN}",
                                f"a@sub.{DOMAIN}",
                                "@example",
                                f"b@{DOMAIN.upper()}",
                                f"@x{DOMAIN}",
                            )
                        )
                    },
                    {"q": choice(("dns/txt", "dns/other", "dns/txt:x-other", "http"))},
                    {"v": choice(("2", None))},
                    {"h": choice(("to:subject", "from::to", "From:Subject:DKIM-Signature"))},
                    {"z": "From:a|Subject:b=20c"},
                    {"n": "anything", "y": ""},
                )
            )
        fold = choice(("; ", ";\r\n ", " ;\r\n\t", ";"))
        message = self.header() + b"\r\n" + self.body()
        return sign(message, self.key, tags, separator=fold)

    def header(self) -> bytes:
        choice = self.random.choice
        fields = [
            choice((b"From: Ann <ann@author.example>", b"from:\tann@author.example ") * 5 + (b"From : ann",)),
            choice((b"To: bob@example.org", b"To: bob@example.org,\r\n  carl@example.org", b"To:")),
            choice(
                (
                    b"Subject: Hello",
                    b"SUBJECT:  Hello \t there ",
                    b"Subject: \xc3\xa4\xff",
                    b"Subject:\r\n Folded",
                )
            ),
            choice((b"Date: Tue, 14 Nov 2023 22:13:20 +0000", b"X-Many: 1\r\nX-Many: 2\r\nX-Many: 3")),
            choice(
                (b"Message-ID: <1@author.example>",) * 9 + (b"Message-ID: <1>\r\nTo: second@example.org",)
            ),
        ]
        self.random.shuffle(fields)
        return b"\r\n".join(fields) + b"\r\n"

    def body(self) -> bytes:
        pieces = (b"Hello Bob.", b" ", b"  ", b"\t", b"\r\n", b"\r\n", b"\r\n\r\n", b"\xe4\xf6", b".", b"a b")
        body = b"".join(self.random.choices(pieces, k=self.random.randrange(12)))
        return body + b"\r\n" * self.random.choice((0, 1, 1, 3)) if body.endswith(b"\r\n") else body + b"\r\n"

    def mutated(self, octets: bytes) -> bytes:
        header, _, body = octets.partition(b"\r\n\r\n")
        mutation = self.random.choice(MUTATIONS)
        self.notes.append(mutation.__name__)
        return bytes(mutation(self, header, body))


def append_to_body(world: World, header: bytes, body: bytes) -> bytes:
    return header + b"\r\n\r\n" + body + world.random.choice((b"x\r\n", b"\r\n", b" \r\n", b"\r\n\r\n"))


def change_octet_of_body(world: World, header: bytes, body: bytes) -> bytes:
    at = world.random.randrange(len(body)) if len(body) > 2 else 0
    return header + b"\r\n\r\n" + body[:at] + b"Z" + body[at:]


def change_space_of_body(world: World, header: bytes, body: bytes) -> bytes:
    return header + b"\r\n\r\n" + body.replace(b" ", b"  ").replace(b"\r\n", b" \r\n")


def change_octet_of_header(world: World, header: bytes, body: bytes) -> bytes:
    at = header.rindex(b":") + 1
    return header[:at] + b"Z" + header[at:] + b"\r\n\r\n" + body


def change_space_of_header(world: World, header: bytes, body: bytes) -> bytes:
    return header.replace(b": ", b":  \t") + b" \r\n\r\n" + body


def add_field(world: World, header: bytes, body: bytes) -> bytes:
    added = world.random.choice(
        (
            b"Subject: Other",
            b"From: eve@example.net",
            b"To: eve@example.net",
            b"X-Other: 1",
            b"X-Many: 9",
            b"Cc: x",
        )
    )
    pair = [added, header] if world.random.random() < 0.5 else [header, added]
    return b"\r\n".join(pair) + b"\r\n\r\n" + body


def change_case_of_names(world: World, header: bytes, body: bytes) -> bytes:
    return header.replace(b"From:", b"FROM:").replace(b"To:", b"tO:") + b"\r\n\r\n" + body


def change_tag(world: World, header: bytes, body: bytes) -> bytes:
    old, new = world.random.choice(
        (
            (b"; s=s1", b"; s=nobody"),
            (b"v=1;", b"v=1; v=1;"),
            (b"; a=", b"; a=x"),
            (b"; bh=", b"; bh= "),
            (b"; bh=", b"; bh=A"),
            (b"; d=", b"; d=sub."),
            (b"rsa-sha256", b"rsa-sha1"),
            (b"; h=", b"; h=x-not-there:"),
            (b"v=1", b"v=1; \x00=1"),
            (b"v=1", b"v=1; u=\xc3\xa4"),
            (b"v=1", b"junk; v=1"),
        )
    )
    return header.replace(old, new, 1) + b"\r\n\r\n" + body


def change_signature(world: World, header: bytes, body: bytes) -> bytes:
    at = header.index(b"b=", header.index(b"bh=") + 3) + 2
    return header[:at] + world.random.choice((b"A", b"AAAA", b"!", b" ")) + header[at:] + b"\r\n\r\n" + body


def change_key(world: World, header: bytes, body: bytes) -> bytes:
    public = world.key.record.partition("p=")[2].encode()
    world.records = world.random.choice(
        (
            [],
            [b"v=DKIM1; p="],
            [b"v=DKIM1; k=rsa; p=AAAA"],
            [b"v=DKIM1; k=ed25519; p=" + public],
            [b"v=DKIM1; k=rsa; p=" + public],
            [b"junk", *world.records],
            [OTHER_RSA.record.encode()],
            [OTHER_RSA.record.encode(), *world.records],
        )
    )
    return header + b"\r\n\r\n" + body


MUTATIONS: Any = (
    append_to_body,
    change_octet_of_body,
    change_space_of_body,
    change_octet_of_header,
    change_space_of_header,
    add_field,
    change_case_of_names,
    change_tag,
    change_signature,
    change_key,
)


def rule_of(world: World, ours: Judged, theirs: Opinion) -> str:
    """The rule that explains why we do not say what dkimpy says, "" when there is none."""
    header = world.octets.partition(b"\r\n\r\n")[0]
    signature = next(value for name, value in dkim.DKIM(world.octets).headers if name == b"DKIM-Signature")
    return known_dkim_difference(ours.finding.reason, signature, header, theirs)


def compare(seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed)
        zone = Zone({world.key.name: {RRType.TXT: world.records}})
        ours = judge_all(world.octets, zone, now=NOW)[0]
        passes = ours.finding.result is Result.PASS
        theirs = dkim_opinion(world.octets, 0, zone.answer)
        if passes == theirs.passes:
            seen["pass" if passes else ours.finding.step] += 1
        else:
            rule = rule_of(world, ours, theirs)
            assert rule, (seed, ours.finding, world.notes, world.records, world.octets)
            seen[rule] += 1
    return seen


def test_differences_are_explained() -> None:
    seen = compare(range(150))
    assert seen["pass"] > 20
    assert seen[Step.HEADER] > 5
    assert seen[Step.BODY] > 5


@pytest.mark.full
def test_differences_of_2000_messages_are_explained() -> None:
    seen = compare(range(1000, 3000))
    assert seen["pass"] > 300
    assert sum(seen.values()) == 2000
