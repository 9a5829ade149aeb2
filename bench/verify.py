"""`bench verify`: what it costs to check SPF and DKIM of a message, beside pyspf and dkimpy.

Both sides run in this process, one after the other in each round, on the same messages and with the same answers of
DNS from memory; CPU is what the process used.  Prints one table, and whether what must be reached is reached.  Exit
code 0 whatever the figures are; 1 when a check did not pass that should.
"""

import argparse
import base64
import hashlib
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TypeVar

import dkim  # type: ignore[import-untyped]  # it has no annotations
import spf  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from bench.table import KIB, MIB, Gate, Ratio, ratio
from gateway.lookup import Answer, Found, Lookup
from gateway.mail.body import Spool
from gateway.mail.digest import BodyDigests, Canonicalization
from gateway.mail.message import HeaderReader, Message
from gateway.verdict import Result
from policies.verify.dkim.signature import parse_signatures
from policies.verify.dkim.verify import Limits, judge, want_bodies
from policies.verify.spf import check_host

T = TypeVar("T")

FAILED = 1
LIMITS = Limits()
BLOCK = 64 * KIB
CLIENT, HELO, MAIL_FROM, DOMAIN, SELECTOR = (
    "192.0.2.1",
    "mx.example.org",
    "ann@example.org",
    "example.org",
    "s1",
)
LINE = b"Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod\r\n"
LINEAR_MIB = (1, 4, 16, 64)
SPACES = 200_000


@dataclass(frozen=True, slots=True)
class Case:
    """A message, and how often it is checked in a round by us; by the others a tenth of it."""

    label: str
    message: bytes
    times: int


@dataclass(frozen=True, slots=True)
class Row:
    """CPU of one check in each round."""

    label: str
    ours_us: tuple[float, ...]
    theirs_us: tuple[float, ...]

    @property
    def ratio(self) -> Ratio:
        return ratio(self.ours_us, self.theirs_us)


class World:
    """One sender: its key, what DNS has for it, and both ways to check its mail."""

    def __init__(self) -> None:
        self._private = rsa.generate_private_key(65537, 2048)
        public = self._private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._texts = {
            f"{SELECTOR}._domainkey.{DOMAIN}": b"v=DKIM1; k=rsa; p=" + base64.b64encode(public),
            DOMAIN: b"v=spf1 ip4:198.51.100.0/24 include:_spf.example.net -all",
            "_spf.example.net": b"v=spf1 ip4:203.0.113.0/24 ip4:192.0.2.0/24 ip6:2001:db8::/32 ~all",
        }
        self._answers = {name: Answer(Found.RECORDS, (text,)) for name, text in self._texts.items()}
        self._spool = Spool()
        spf.DNSLookup = self._records

    def message(self, size_bytes: int) -> bytes:
        """A signed message of about this size."""
        fields = [
            b"Received: from a.example.org (a.example.org [192.0.2.7])",
            b"\tby mx.example.org with ESMTPS id 4F1A2B3C; Tue, 14 Nov 2023 22:13:20 +0000",
            b"From: Ann <ann@example.org>",
            b"To: Bob <bob@example.net>",
            b"Subject: What it costs to check a message",
            b"Date: Tue, 14 Nov 2023 22:13:20 +0000",
            b"Message-ID: <20231114221320.4F1A2B3C@a.example.org>",
            b"MIME-Version: 1.0",
            b"Content-Type: text/plain; charset=utf-8",
        ]
        header = b"\r\n".join(fields) + b"\r\n\r\n"
        signature_bytes = 700
        lines = max(1, (size_bytes - len(header) - signature_bytes) // len(LINE))
        message = header + LINE * lines
        signature: bytes = dkim.sign(
            message,
            SELECTOR.encode(),
            DOMAIN.encode(),
            self._private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
            canonicalize=(b"relaxed", b"relaxed"),
            include_headers=[
                b"from",
                b"to",
                b"subject",
                b"date",
                b"message-id",
                b"mime-version",
                b"content-type",
            ],
        )
        return signature + message

    def ours(self, octets: bytes) -> bool:
        """What the gateway does with a message that comes in blocks."""
        reader = HeaderReader(is_stuffed=False, max_bytes=256 * KIB, max_fields=1000)
        first = octets[:BLOCK]
        reader.feed(first)
        header = reader.finish()
        message = Message(header, self._spool.new(is_stuffed=False))
        signatures = parse_signatures(header, now=time.time(), most=10)
        want_bodies(signatures, message.digests)
        message.digests.block(first[header.wire_bytes + 2 :])
        for at in range(BLOCK, len(octets), BLOCK):
            message.digests.block(octets[at : at + BLOCK])
        message.digests.end()
        judged = self._run(judge(header, message.digests, signatures, LIMITS))
        result = self._run(check_host(IPv4Address(CLIENT), DOMAIN, MAIL_FROM, HELO))
        return result.result is Result.PASS and [each.finding.result for each in judged] == [Result.PASS]

    def theirs(self, octets: bytes) -> bool:
        """The same by dkimpy and pyspf."""
        result = spf.check2(CLIENT, MAIL_FROM, HELO)[0]
        return bool(dkim.verify(octets, dnsfunc=self._text)) and result == "pass"

    def _run(self, lookup: Lookup[T]) -> T:
        try:
            questions = next(lookup)
            while True:
                questions = lookup.send([self._answers[name] for name, _ in questions])
        except StopIteration as done:
            result: T = done.value
            return result

    def _text(self, name: bytes, timeout: int = 0) -> bytes | None:
        return self._texts.get(name.decode().removesuffix("."))

    def _records(self, name: str, kind: str, *_: object) -> list[tuple[tuple[str, str], tuple[bytes, ...]]]:
        text = self._texts.get(name.removesuffix("."))
        return [((name, kind), (text,))] if text and kind == "TXT" else []


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="bench verify", description="CPU of SPF and DKIM, beside peers")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two short rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (9; 2 with --quick)")
    given = parser.parse_args(arguments)
    rounds = given.rounds or (2 if given.quick else 9)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    world = World()
    share = 10 if given.quick else 1
    cases = (
        Case("2 KiB", world.message(2 * KIB), 2000 // share),
        Case("1 MiB", world.message(MIB), 50 // share),
    )
    for case in cases:
        for check in (world.ours, world.theirs):
            if not check(case.message):
                print(f"bench: {case.label}: {check.__name__} did not pass", file=sys.stderr)
                return FAILED
    rows = [_measure(world, case, rounds) for case in cases]
    linear = _linear(rounds=min(rounds, 3))
    print_report(rows, linear, rounds)
    return 0


def _measure(world: World, case: Case, rounds: int) -> Row:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_cpu_us(world.ours, case.message, case.times))
        theirs.append(_cpu_us(world.theirs, case.message, max(1, case.times // 10)))
    return Row(case.label, tuple(ours), tuple(theirs))


def _cpu_us(check: Callable[[bytes], bool], message: bytes, times: int) -> float:
    begun = time.process_time()
    for _ in range(times):
        check(message)
    return (time.process_time() - begun) / times * 1e6


@dataclass(frozen=True, slots=True)
class Linear:
    """What a body costs: `us_per_mib` by its MiB, that of a line of spaces, and what memory it takes at most."""

    us_per_mib: dict[int, float]
    spaces_us_per_mib: float
    peak_kib: dict[int, float]


def _linear(rounds: int) -> Linear:
    block = (LINE * (BLOCK // len(LINE) + 1))[:BLOCK]
    spaces = b"x" + b" " * SPACES + b"\r\n"

    def of_mib(mib: int) -> Iterator[bytes]:
        return (block for _ in range(mib * MIB // BLOCK))

    def us(blocks: Callable[[], Iterator[bytes]]) -> float:
        return min(_digest_us(blocks()) for _ in range(rounds))

    times = 10  # the clock's steps are coarse
    peaks = {}
    for mib in LINEAR_MIB:
        tracemalloc.start()
        _digest_us(of_mib(mib))
        peaks[mib] = tracemalloc.get_traced_memory()[1] / KIB
        tracemalloc.stop()
    return Linear(
        {mib: us(lambda mib=mib: of_mib(mib)) / mib for mib in LINEAR_MIB},  # type: ignore[misc]  # mypy cannot infer it
        us(lambda: (spaces[at : at + BLOCK] for _ in range(times) for at in range(0, len(spaces), BLOCK)))
        / (times * len(spaces) / MIB),
        peaks,
    )


def _digest_us(blocks: Iterator[bytes]) -> float:
    digests = BodyDigests()
    digests.want(Canonicalization.RELAXED)
    begun = time.process_time()
    for block in blocks:
        digests.block(block)
    digests.end()
    return (time.process_time() - begun) * 1e6


def print_report(rows: Sequence[Row], linear: Linear, rounds: int) -> None:
    """The table, and what must be reached."""
    print(
        "CPU of SPF (one include) and DKIM (RSA-2048, relaxed/relaxed) of a message, DNS from memory; medians of\n"
        f"{rounds} alternating rounds. Ratios: median (lowest-highest) of the rounds' ratios.\n"
    )
    print(f"{'case':10s} {'mxgate us':>10s} {'pyspf + dkimpy us':>18s} {'ratio':>18s}")
    for row in rows:
        ours, theirs = statistics.median(row.ours_us), statistics.median(row.theirs_us)
        print(f"{row.label:10s} {ours:10.0f} {theirs:18.0f} {row.ratio!s:>18s}")
    print(f"\nOne digest of a body, relaxed (SHA-256 alone: {_sha256_us():.0f} us per MiB):\n")
    print(f"{'MiB':>6s} {'us per MiB':>11s} {'peak KiB':>9s}")
    for mib, us in linear.us_per_mib.items():
        print(f"{mib:6d} {us:11.0f} {linear.peak_kib[mib]:9.0f}")
    print(f"{'spaces':>6s} {linear.spaces_us_per_mib:11.0f}           (lines of {SPACES} of them)\n")
    first, last = LINEAR_MIB[0], LINEAR_MIB[-1]
    small, big = rows
    for gate in (
        Gate("2 KiB: CPU to pyspf + dkimpy", small.ratio.median, 0.25, 0.20),
        Gate("1 MiB: CPU to pyspf + dkimpy", big.ratio.median, 0.15),
        Gate(
            f"{last} MiB: time per MiB to that of {first} MiB",
            linear.us_per_mib[last] / linear.us_per_mib[first],
            1.3,
        ),
        Gate(
            f"{last} MiB: memory to that of {first} MiB", linear.peak_kib[last] / linear.peak_kib[first], 1.1
        ),
        Gate(
            "line of spaces: time per MiB to text", linear.spaces_us_per_mib / linear.us_per_mib[first], 5.0
        ),
    ):
        print(gate)


def _sha256_us() -> float:
    data = LINE * (MIB // len(LINE))
    return min(_cpu_us(lambda text: bool(hashlib.sha256(text).digest()), data, 5) for _ in range(3))
