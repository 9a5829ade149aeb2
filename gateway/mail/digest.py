"""Body digests: SHA-256 of the canonicalised body (RFC 6376 3.4), computed once while it streams in.

Policies ask in `on_header`, when each signature's canonicalisation and length are known, and read in `on_eom`. The
engine feeds the body in between: BodyDigests is a watch (gateway.policy.Watch) of every message of which a digest
is wanted. One pass over the body serves all signatures of a canonicalisation. Time is linear in the octets of the
body whatever they are, and nothing of the body is kept: what may still turn out to be nothing, the white space and
the empty lines at the end, is a count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple, Self


class Canonicalization(StrEnum):
    """RFC 6376 3.4: how a body is brought into one form before it is hashed."""

    SIMPLE = "simple"
    RELAXED = "relaxed"


class BodyDigest(NamedTuple):
    """A finished digest. `size_bytes` is the length of the whole canonicalised body, also where less was hashed."""

    sha256: bytes
    size_bytes: int


Wanted = tuple[Canonicalization, int | None]
"""A canonicalisation, and how many octets of what it gives; None for all of them."""

_CRLFS = b"\r\n" * 4096
_RUNS = (b" " * 64, b" " * 8, b"  ")


class BodyDigests:
    """The digests of one message: wanted at the header, fed with the body, read at EOM."""

    __slots__ = ("_canonicalizers", "_finished", "_is_too_late")

    def __init__(self) -> None:
        self._canonicalizers: dict[Canonicalization, _Simple] = {}
        self._finished: dict[Wanted, BodyDigest] = {}
        self._is_too_late = False

    @classmethod
    def recorded(cls, finished: Mapping[Wanted, BodyDigest]) -> Self:
        """The digests of a message whose body is not here any more; what they lack is not to be had."""
        digests = cls()
        digests._finished = dict(finished)
        digests._is_too_late = True
        return digests

    @property
    def is_wanted(self) -> bool:
        """Whether there is a reason to feed the body."""
        return bool(self._canonicalizers)

    @property
    def finished(self) -> Mapping[Wanted, BodyDigest]:
        """All digests that were wanted, when the body is complete; for the record of the decision."""
        return self._finished

    def want(self, canonicalization: Canonicalization, length: int | None = None) -> None:
        """Have the first `length` octets of the canonicalised body hashed, all of them when None (RFC 6376 3.7).

        Comes too late, and to nothing, when the body has begun.
        """
        if self._is_too_late:
            return
        canonicalizer = self._canonicalizers.get(canonicalization)
        if canonicalizer is None:
            canonicalizer = _Simple() if canonicalization is Canonicalization.SIMPLE else _Relaxed()
            self._canonicalizers[canonicalization] = canonicalizer
        canonicalizer.hashed.want(length)

    def get(self, canonicalization: Canonicalization, length: int | None = None) -> BodyDigest:
        """What was wanted. Raises LookupError for what was not, or while the body is not complete."""
        return self._finished[canonicalization, length]

    def block(self, data: bytes) -> None:
        """The next octets of the body; cut anywhere."""
        self._is_too_late = True
        for canonicalizer in self._canonicalizers.values():
            canonicalizer.block(data)

    def end(self) -> None:
        """The body is complete."""
        self._is_too_late = True
        for name, canonicalizer in self._canonicalizers.items():
            canonicalizer.end()
            hashed = canonicalizer.hashed
            for length in hashed.lengths:
                self._finished[name, length] = BodyDigest(hashed.digest(length), hashed.size_bytes)


class _Prefixes:
    """SHA-256 of the first octets of a stream, for several lengths of them; None is its whole length."""

    __slots__ = ("_digests", "_left", "_sha256", "lengths", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.lengths: set[int | None] = set()
        self._left: list[int] = []  # lengths not reached yet, the next one last
        self._sha256 = hashlib.sha256()
        self._digests: dict[int | None, bytes] = {}

    def want(self, length: int | None) -> None:
        if length is not None and length not in self.lengths:
            self._left.append(length)
            self._left.sort(reverse=True)
        self.lengths.add(length)

    def update(self, data: bytes) -> None:
        while self._left and self._left[-1] <= self.size_bytes + len(data):
            length = self._left.pop()
            at = length - self.size_bytes
            self._sha256.update(data[:at])
            self.size_bytes = length
            self._digests[length] = self._sha256.digest()
            data = data[at:]
        self.size_bytes += len(data)
        if self._left or None in self.lengths:
            self._sha256.update(data)

    def digest(self, length: int | None) -> bytes:
        """Of the whole stream where it is shorter."""
        return self._digests.get(length) or self._sha256.digest()


class _Simple:
    """RFC 6376 3.4.3: empty lines at the end of the body become one line end, which an empty body gets too."""

    __slots__ = ("_line_ends", "_rest", "hashed")

    def __init__(self) -> None:
        self.hashed = _Prefixes()
        # what came and is not hashed yet: line ends that may be the last ones, and behind them the beginning of one
        self._line_ends = 0
        self._rest = b""

    def block(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if data.endswith(b"\r"):
            self._rest = b"\r"
            data = data[:-1]
        self._feed(data)

    def end(self) -> None:
        self._feed(self._rest)
        self.hashed.update(b"\r\n")

    def _feed(self, data: bytes) -> None:
        """Hash octets that end in no part of a line end, but for the line ends behind them."""
        at, line_ends = _trailing_line_ends(data)
        if at:
            if self._line_ends:
                self._flush()
            self.hashed.update(data if at == len(data) else data[:at])
        self._line_ends += line_ends

    def _flush(self) -> None:
        """Hash line ends that turned out not to be the last ones."""
        while self._line_ends:
            now = min(self._line_ends, len(_CRLFS) // 2)
            self.hashed.update(_CRLFS[: 2 * now])
            self._line_ends -= now


class _Relaxed(_Simple):
    """RFC 6376 3.4.4: white space is one space inside of a line and nothing at its end; an empty body stays empty."""

    __slots__ = ()

    def block(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        data = _squeeze(data)
        # a space may be at the end of a line, or go on; a CR may be the beginning of a line end
        end = len(data) - data.endswith(b"\r")
        end -= data.endswith(b" ", 0, end)
        self._rest = data[end:]
        self._feed(data[:end])

    def end(self) -> None:
        self._feed(self._rest.rstrip(b" "))
        if self.hashed.size_bytes:
            self.hashed.update(b"\r\n")


def _squeeze(data: bytes) -> bytes:
    """With one space for each run of spaces and tabs, and none before a line end; each step is linear."""
    if b"\t" in data:
        data = data.replace(b"\t", b" ")
    if b"  " in data:
        # each turn makes the runs many times shorter, so that the turns together cost little more than the first
        for run in _RUNS:
            while run in data:
                data = data.replace(run, b" ")
    return data.replace(b" \r\n", b"\r\n") if b" \r\n" in data else data


def _trailing_line_ends(data: bytes) -> tuple[int, int]:
    """Where the line ends (CRLF) at the end of this begin, and how many they are."""
    if not data.endswith(b"\r\n"):
        return len(data), 0
    at = len(data.rstrip(b"\r\n"))
    tail = data[at:]
    if 2 * tail.count(b"\r\n") != len(tail):
        # a bare CR or LF is text: the line ends begin behind the last place where the two do not alternate
        odd = max(tail.rfind(b"\r\r"), tail.rfind(b"\n\n")) + 1
        odd += tail.startswith(b"\n", odd)
        at, tail = at + odd, tail[odd:]
    return at, len(tail) // 2
