"""The newest decision records of a worker, up to a number of bytes.

What a record keeps alive is estimated when it is added: a constant for each kind of object, and the length of every
text that a stranger or a policy wrote. Nothing is copied or serialised here, but for records that are too large.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from gateway.decision.filters import ANY, Filters
from gateway.decision.record import Decision
from gateway.verdict import AddField, AuthResult, Verdict, proceed

MAX_BYTES: Final = 4 * 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * 1024
# A sixteenth of the ring: a message for 200 recipients fits as a rule, and no record drives many others out.
MAX_RECORD_BYTES: Final = 256 * 1024
# What is left of the lists of a record that is larger.
_KEPT = 100
_KEPT_TEXT = 500

# Bytes of CPython 3.11 on 64 bits with their share of lists; tests/test_decision.py compares them with tracemalloc.
_RECORD = 1200  # itself, session and envelope
_RCPT = 190
_JUDGED = 150
_VERDICT = 120
_REPLY = 150
_RESULT = 100
_EDIT = 60
_PROPERTY = 60
_ASKED = 250

_size = sys.getsizeof  # of a text: one to four bytes for each character

# what most policies say of most mail, and one object for all of them
_PLAIN = proceed()


class DecisionRing:
    """Keeps the newest records within `max_bytes`, an estimate that is right within a factor of two."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._kept: deque[tuple[Decision, int]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, decision: Decision) -> None:
        """Keep a record, and drop the oldest for it. One that is too large loses much of what it holds; see `_cut`."""
        if len(decision.header) > MAX_HEADER_BYTES:
            decision = decision._replace(header=_capped(decision.header))
        size = estimate_bytes(decision)
        if size > MAX_RECORD_BYTES:
            decision = _cut(decision)
            size = estimate_bytes(decision)
        kept = self._kept
        kept.append((decision, size))
        self.used_bytes += size
        while self.used_bytes > self.max_bytes:
            _, dropped = kept.popleft()
            self.used_bytes -= dropped

    def get(self, tx_id: str) -> Decision | None:
        """The record of this transaction, None when it is not kept (any more)."""
        return next((decision for decision, _ in reversed(self._kept) if decision.id == tx_id), None)

    def latest(self, n: int, *, filters: Filters = ANY) -> Iterator[Decision]:
        """At most `n` records that pass the filters, the newest first. Take them before the next `add`."""
        for decision, _ in reversed(self._kept):
            if n <= 0:
                return
            if filters.matches(decision):
                n -= 1
                yield decision


def estimate_bytes(decision: Decision) -> int:
    """What a record keeps alive."""
    mail_from, answer = decision.envelope.mail_from, decision.reply
    size = _RECORD + len(decision.header) + len(decision.session.helo) + len(decision.error)
    if mail_from is not None:
        size += 2 * len(mail_from.text)  # the whole, and its parts
    if answer is not None:
        size += _REPLY + 2 * len(answer.text)  # as text, and as it is written
    for rcpt, reply, _, _ in decision.rcpts:
        size += _RCPT + 2 * len(rcpt.mailbox.text) + len(rcpt.orcpt) + _REPLY + 2 * len(reply.text)
    for judged in decision.judged:
        size += _JUDGED
        if judged.verdict is not _PLAIN:
            size += _of_verdict(judged.verdict)
        if judged.would_be is not None and judged.would_be is not _PLAIN:
            size += _of_verdict(judged.would_be)
    for asked in decision.dns:
        size += _ASKED + _size(asked.name) + sum(map(_size, asked.records))
    return size


def _of_verdict(verdict: Verdict) -> int:
    size = _VERDICT
    if verdict.reply is not None:
        size += _REPLY + 2 * len(verdict.reply.text)
    for result in verdict.results:
        size += _of_result(result)
    for edit in verdict.edits:
        size += _EDIT + (_size(edit.value) if isinstance(edit, AddField) else 0)
    return size


def _of_result(result: AuthResult) -> int:
    size = _RESULT + _size(result.reason)
    properties: object = result.properties
    # a policy wrote it, and not all of them are checked by mypy
    if isinstance(properties, tuple):
        for pair in properties:
            size += _PROPERTY + (sum(map(_size, pair)) if isinstance(pair, tuple) else 0)
    return size


def _capped(header: bytes) -> bytes:
    """Its first lines, as many as fit."""
    end = header.rfind(b"\r\n", 0, MAX_HEADER_BYTES)
    return header[: end + 2] if end >= 0 else header[:MAX_HEADER_BYTES]


def _cut(decision: Decision) -> Decision:
    """What is left of a record that is too large: the first recipients, and the last verdicts that say something."""
    rcpts = decision.rcpts[:_KEPT]
    telling = [j for j in decision.judged if j.verdict is not _PLAIN or j.would_be is not None or j.failure]
    left = decision._replace(
        envelope=replace(decision.envelope, rcpts=()),
        rcpts=rcpts,
        judged=telling[-_KEPT:],
        results=(),
        header=b"",
        error=decision.error[:_KEPT_TEXT],
        dns=(),
        omitted_rcpts=len(decision.rcpts) - len(rcpts),
    )
    if estimate_bytes(left) > MAX_RECORD_BYTES:  # a policy writes without end
        left = left._replace(judged=())
    return left._replace(omitted_judged=len(decision.judged) - len(left.judged))
