"""crosscheck: two independent verifiers watch ours in production; nothing that they say touches mail.

After the reply, for a sampled share of messages, pyspf judges the same SPF identities and dkimpy the same signatures
and ARC chain. They ask nobody: DNS is answered from what the decision itself asked. Whether they agree with what we
found is counted in mxgate_crosscheck_results_total; a disagreement that no known rule explains is logged as
`crosscheck.disagreed` with the id of the decision, which `mxgate decisions` and `mxgate explain` take.

Both libraries block, so they run in a thread, one message at a time: what comes meanwhile is left out and counted, and
so is what is larger than `max_bytes` or would take dkimpy quadratic time. Needs the extra `crosscheck`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakSet

from gateway.api import Asked, Outcome, Policy, Services, Slot, Transaction, asked_for

if TYPE_CHECKING:
    from policies.verify.second_opinion.compare import Compared

# Messages that are kept until their reply; with `max_bytes` of 256 KiB that is 4 MiB at the most
_MAX_KEPT = 16
_MOST_BYTES = 1_048_576
_LIBRARIES = ("dkim", "spf")
_MESSAGES = ("checked", "busy", "too_large", "costly", "not_kept")
_METHODS = ("arc", "dkim", "spf")
_AGREEMENTS = ("agree", "disagree", "explained", "failed", "unanswered")


@dataclass(frozen=True, slots=True)
class CrosscheckSettings:
    """[policy.crosscheck.settings]."""

    share: float = field(
        default=0.01, metadata={"doc": "the part of all messages that is judged a second time, 0 to 1"}
    )
    max_bytes: int = field(
        default=262_144,
        metadata={"doc": "larger messages are left out; dkimpy takes about 35 times as much memory"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("share is not in 0..1")
        if not 1 <= self.max_bytes <= _MOST_BYTES:
            raise ValueError(f"max_bytes is not in 1..{_MOST_BYTES}")
        if any(find_spec(each) is None for each in _LIBRARIES):
            raise ValueError("pyspf and dkimpy are not installed; they come with mxgate[crosscheck]")


class _Kept:
    """The body of one message while it arrives, up to a limit (gateway.policy.Watch)."""

    __slots__ = ("__weakref__", "_blocks", "_left_bytes", "is_complete", "is_too_large")

    def __init__(self, most_bytes: int) -> None:
        self._blocks: list[bytes] = []
        self._left_bytes = most_bytes
        self.is_complete = False
        self.is_too_large = most_bytes < 0

    @property
    def octets(self) -> bytes:
        return b"".join(self._blocks)

    def block(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self.is_too_large = True
            self._blocks.clear()
        else:
            self._blocks.append(data)

    def end(self) -> None:
        self.is_complete = True


_KEPT = Slot[_Kept]("crosscheck.kept")


class Crosscheck(Policy[CrosscheckSettings]):
    """Keeps a sampled message as it arrives, and has it judged again when its client has its answer."""

    name = "crosscheck"
    Settings = CrosscheckSettings
    timeout_s = 30.0

    def __init__(self, settings: CrosscheckSettings, services: Services) -> None:
        super().__init__(settings, services)
        # of the extra: only where the policy is planned
        from policies.verify.second_opinion.compare import compare, is_costly  # noqa: PLC0415

        self._compare: Callable[[Transaction, bytes, Sequence[Asked]], list[Compared]] = compare
        self._is_costly = is_costly
        self._thread = ThreadPoolExecutor(1, "crosscheck")
        self._running: Future[list[Compared]] | None = None
        self._kept: WeakSet[_Kept] = WeakSet()
        messages = services.metrics.counters(
            "messages_total", "Sampled messages by what became of them", ("outcome",)
        )
        self._messages = {each: messages.labels(each) for each in _MESSAGES}
        results = services.metrics.counters(
            "results_total",
            "Results of ours beside those of pyspf and dkimpy, by method and whether they agree",
            ("method", "agreement"),
        )
        self._results = {(m, a): results.labels(m, a) for m in _METHODS for a in _AGREEMENTS}

    async def stop(self) -> None:
        """What has not begun is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def on_header(self, tx: Transaction) -> _Kept | None:
        """Keep the body of a message that is sampled."""
        assert tx.message is not None  # the engine's word: on_header has one
        if not self._is_sampled(tx.id):
            return None
        if len(self._kept) >= _MAX_KEPT:
            self._messages["not_kept"].inc()
            return None
        most_bytes = self.settings.max_bytes - len(tx.message.header.octets)
        kept = _Kept(-1 if tx.envelope.size_hint > self.settings.max_bytes else most_bytes)
        _KEPT.put(tx, kept)
        self._kept.add(kept)
        return kept

    async def on_outcome(self, tx: Transaction, outcome: Outcome) -> None:
        """Have it judged, unless the message before still is."""
        kept, message = _KEPT.get(tx), tx.message
        if kept is None or message is None or not (kept.is_complete or kept.is_too_large):
            return
        self._kept.discard(kept)
        header = message.header.octets
        if kept.is_too_large:
            self._messages["too_large"].inc()
        elif self._running is not None and not self._running.done():
            self._messages["busy"].inc()
        elif self._is_costly(header, body := kept.octets):
            self._messages["costly"].inc()
        else:
            octets = b"".join((header, b"\r\n", body))
            self._running = self._thread.submit(self._compare, tx, octets, asked_for(tx))
            for each in await asyncio.wrap_future(self._running):
                self._results[each.method, each.agreement].inc()
                if each.agreement != "agree":
                    self._note(tx.id, each)
            self._messages["checked"].inc()

    def _note(self, tx_id: str, compared: Compared) -> None:
        keys = {
            "tx": tx_id,
            "method": compared.method,
            "subject": compared.subject,
            "ours": compared.ours,
            "theirs": compared.theirs,
            "reason": compared.why,
        }
        if compared.agreement == "disagree":
            self.services.log.warning("crosscheck.disagreed", **keys)
        else:
            self.services.log.debug("crosscheck.differed", agreement=compared.agreement, **keys)

    def _is_sampled(self, tx_id: str) -> bool:
        """By the id, so that the same share of all messages is taken whoever sends them, and nothing is drawn."""
        place = int.from_bytes(hashlib.blake2b(tx_id.encode(), digest_size=4).digest(), "big")
        return place < self.settings.share * 2**32
