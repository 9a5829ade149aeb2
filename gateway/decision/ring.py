"""The newest decision records of a worker, up to a number of bytes.

What a record keeps alive is estimated when it is added: a constant for each kind of object, and the length of every
text that a stranger or a policy wrote. Nothing is copied or serialised here, but for records that are too large.

Evidence is the policies' own: nobody looks into it here. What it quotes of strangers is in the header and in the
answers of DNS, so it is taken for a constant each, for the whole header once more, and for what long texts in DNS may
have become.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from gateway.decision.filters import ANY, Filters
from gateway.decision.record import Decision, Judged
from gateway.lookup import Mx, Record
from gateway.verdict import AddField, AuthResult, Verdict, proceed

MAX_BYTES: Final = 4 * 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * 1024
# A sixteenth of the ring: a message for 200 recipients fits as a rule, and no record drives many others out.
MAX_RECORD_BYTES: Final = 256 * 1024
# More than one message may ask for (SECURITY.md section 1).
_MAX_DNS = 500
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
_EVIDENCE = 2000
_DIGEST = 350
_ASKED = 250
_RECORD_OF_DNS = 60
# What a policy makes of a text in DNS, a network of each few characters, may be that many times as large; of texts of
# the usual length the constant for evidence has it.
_LONG_TEXT = 2048
_MADE_OF_TEXT = 40

_size = sys.getsizeof  # of a text: one to four bytes for each character

# what most policies say of most mail, and one object for all of them
_PLAIN = proceed()


class DecisionRing:
    """Keeps the newest records within `max_bytes`, an estimate that is right within a factor of two.

    With `cut` False a record stays as it is, whatever its size. `on_add` is told of each record, whole.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        *,
        cut: bool = True,
        on_add: Callable[[Decision], None] | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self._on_add = on_add
        self._cuts = cut
        self.used_bytes = 0
        self._kept: deque[tuple[Decision, int]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, decision: Decision) -> None:
        """Keep a record, and drop the oldest for it. One that is too large loses much of what it holds; see `_cut`."""
        if self._on_add is not None:
            self._on_add(decision)
        if self._cuts and (len(decision.header) > MAX_HEADER_BYTES or len(decision.dns) > _MAX_DNS):
            decision = _capped(decision)
        size = estimate_bytes(decision)
        if self._cuts and size > MAX_RECORD_BYTES:
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
    mail_from, last = decision.envelope.mail_from, decision.reply
    size = _RECORD + len(decision.header) + len(decision.session.helo) + len(decision.error)
    has_evidence = False
    if mail_from is not None:
        size += 2 * len(mail_from.text)  # the whole, and its parts
    if last is not None:
        size += _REPLY + 2 * len(last.text)  # as text, and as it is written
    for rcpt, reply, _, _ in decision.rcpts:
        size += _RCPT + 2 * len(rcpt.mailbox.text) + len(rcpt.orcpt) + _REPLY + 2 * len(reply.text)
    for judged in decision.judged:
        size += _JUDGED
        verdict = judged.verdict if judged.would_be is None else judged.would_be
        if verdict is not _PLAIN:
            size += _of_verdict(verdict)
            has_evidence = has_evidence or verdict.evidence is not None
    if has_evidence:
        size += len(decision.header) + decision.omitted_header_bytes
    size += _DIGEST * len(decision.digests)
    for _, question, answer, _ in decision.dns:
        size += _ASKED + _size(question.name)
        if answer.records:
            size += _of_records(answer.records, has_evidence=has_evidence)
    return size


def _of_records(records: Iterable[Record], *, has_evidence: bool) -> int:
    size = 0
    for record in records:
        if isinstance(record, bytes):
            size += _size(record)
            if has_evidence and len(record) > _LONG_TEXT:
                size += _MADE_OF_TEXT * (len(record) - _LONG_TEXT)
        else:
            size += _RECORD_OF_DNS
            if isinstance(record, Mx):
                size += _size(record.host)
            elif isinstance(record, str):
                size += _size(record)
    return size


def _of_verdict(verdict: Verdict) -> int:
    size = _VERDICT if verdict.evidence is None else _VERDICT + _EVIDENCE
    if verdict.reply is not None:
        size += _REPLY + 2 * len(verdict.reply.text)
    for result in verdict.results:
        size += _of_result(result)
    for edit in verdict.edits:
        size += _EDIT + (_size(edit.value) if isinstance(edit, AddField) else 0)
    return size


def _of_result(result: AuthResult) -> int:
    size = _RESULT + _size(result.reason)
    for name, value in result.properties:
        size += _PROPERTY + _size(name) + _size(value)
    return size


def _capped(decision: Decision) -> Decision:
    """Of the header the first lines, as many as fit, and the first questions."""
    header, dns = decision.header, decision.dns
    if len(header) > MAX_HEADER_BYTES:
        end = header.rfind(b"\r\n", 0, MAX_HEADER_BYTES)
        header = header[: end + 2] if end >= 0 else header[:MAX_HEADER_BYTES]
    return decision._replace(
        header=header,
        dns=dns[:_MAX_DNS],
        omitted_header_bytes=len(decision.header) - len(header),
        omitted_dns=max(0, len(dns) - _MAX_DNS),
    )


def _cut(decision: Decision) -> Decision:
    """What is left of a record that is too large: the first recipients, and the last verdicts that say something.

    Their evidence is left out, since it may be what is large.
    """
    rcpts = decision.rcpts[:_KEPT]
    telling = [j for j in decision.judged if j.verdict is not _PLAIN or j.would_be is not None or j.failure]
    left = decision._replace(
        envelope=replace(decision.envelope, rcpts=()),
        rcpts=rcpts,
        judged=[_without_evidence(judged) for judged in telling[-_KEPT:]],
        results=(),
        header=b"",
        error=decision.error[:_KEPT_TEXT],
        dns=(),
        omitted_rcpts=len(decision.rcpts) - len(rcpts),
        omitted_dns=decision.omitted_dns + len(decision.dns),
        omitted_header_bytes=decision.omitted_header_bytes + len(decision.header),
    )
    if estimate_bytes(left) > MAX_RECORD_BYTES:  # a policy writes without end
        left = left._replace(judged=())
    return left._replace(omitted_judged=len(decision.judged) - len(left.judged))


def _without_evidence(judged: Judged) -> Judged:
    verdict, would_be = judged.verdict, judged.would_be
    if verdict.evidence is not None:
        verdict = replace(verdict, evidence=None)
    if would_be is not None and would_be.evidence is not None:
        would_be = replace(would_be, evidence=None)
    return judged._replace(verdict=verdict, would_be=would_be)
