"""Lookup: verification without I/O. A verifier is a generator that yields DNS questions and is sent the answers.

    def check(domain: str) -> Lookup[Result]:
        (answer,) = yield [Question(domain, RRType.TXT)]
        ...

A resolver (`services.dns.run`, `gateway.testing.Zone.run`) drives it. Questions that are known together are yielded
together and asked at once; the answers come in their order. What was asked and answered is the evidence that
`mxgate explain` prints and a decision record replays.

Names are absolute and never completed by a search list. Any text may be asked for: a name that DNS cannot hold (over
253 octets, a label that is empty or over 63 octets) does not exist, and nobody is asked (RFC 7208 4.3, RFC 1035 2.3.4).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeVar

from gateway.session import Slot, Transaction

T = TypeVar("T")


class RRType(StrEnum):
    """The types of records that verifiers ask for."""

    A = "A"
    AAAA = "AAAA"
    MX = "MX"
    NS = "NS"
    PTR = "PTR"
    TXT = "TXT"


class Question(NamedTuple):
    """A name, absolute, with or without its final dot, in any case, and a type. Beyond ASCII it is UTF-8."""

    name: str
    rrtype: RRType


class Mx(NamedTuple):
    """RFC 5321 5: `host` without its final dot; "" is the null MX (RFC 7505)."""

    preference: int
    host: str


class Found(StrEnum):
    """What came of a question: four different things, never mixed."""

    RECORDS = "records"
    NO_DATA = "no_data"  # the name exists, records of this type do not
    NO_SUCH_NAME = "no_such_name"
    TEMPORARY_FAILURE = "temporary_failure"


Record = IPv4Address | IPv6Address | Mx | str | bytes
"""A, AAAA: an address. MX: Mx. NS, PTR: a name without its final dot. TXT: its strings joined without a space."""


class Answer(NamedTuple):
    """The records of a name, CNAMEs followed, or why there are none.

    `why` says what a temporary failure was: "timeout", "servfail", "refused", ..., and BUDGET when nobody was asked
    because the time for such questions is used up.
    """

    found: Found
    records: tuple[Record, ...] = ()
    why: str = ""

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The records of A or AAAA."""
        return tuple([each for each in self.records if isinstance(each, IPv4Address | IPv6Address)])

    @property
    def texts(self) -> tuple[bytes, ...]:
        """The records of TXT."""
        return tuple([each for each in self.records if isinstance(each, bytes)])

    @property
    def exchanges(self) -> tuple[Mx, ...]:
        """The records of MX."""
        return tuple([each for each in self.records if isinstance(each, Mx)])

    @property
    def names(self) -> tuple[str, ...]:
        """The records of NS or PTR."""
        return tuple([each for each in self.records if isinstance(each, str)])

    @property
    def is_temporary(self) -> bool:
        """Whether the same question may have another answer soon."""
        return self.found is Found.TEMPORARY_FAILURE


BUDGET = "budget"
NO_DATA = Answer(Found.NO_DATA)
NO_SUCH_NAME = Answer(Found.NO_SUCH_NAME)
OUT_OF_TIME = Answer(Found.TEMPORARY_FAILURE, why=BUDGET)

Lookup = Generator[Sequence[Question], Sequence[Answer], T]
"""Yields questions, is sent an answer for each, returns T. It does no I/O and never sees an exception of DNS."""


def ask(*questions: Question) -> Lookup[Sequence[Answer]]:
    """The plainest Lookup: these questions, and their answers."""
    return (yield questions)


class Asked(NamedTuple):
    """One question with its answer, for those who explain: who asked, and how long it took (0 from the cache)."""

    policy: str
    question: Question
    answer: Answer
    duration_s: float = 0.0


TRAIL = Slot[list[Asked]]("dns_trail")
"""Each question of a transaction once, in the order of the answers. The resolver writes it, before the first nobody."""


def asked_for(tx: Transaction) -> tuple[Asked, ...]:
    """What was asked of DNS for this transaction so far, by all policies together; its whole trail in `on_outcome`."""
    return tuple(TRAIL.get(tx) or ())
