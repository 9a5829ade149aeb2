"""What a transaction knows of DNS, and how much time and how many questions it has left."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.lookup import OUT_OF_TIME, TRAIL, Answer, Asked, Found
from gateway.session import Slot, Transaction

MAX_QUESTIONS = 160
"""Different questions of one transaction, whoever asks: what SPF at its worst may; as many with the own budget."""

OWN_BUDGET_S = 8.0
"""For the author domain's own look-ups, so that a stranger's cannot use their time up."""

LIMIT = "limit"
OVER_LIMIT = Answer(Found.TEMPORARY_FAILURE, why=LIMIT)


@dataclass(slots=True)
class Budget:
    """Time that passes while anybody who is charged to it waits; several who wait at once are charged once."""

    left_s: float
    _waiting: int = 0
    _since: float = 0.0

    def ends_at(self, now: float) -> float:
        """When it is used up if somebody waits from `now` on."""
        return (self._since if self._waiting else now) + self.left_s

    def begin(self, now: float) -> None:
        """Somebody waits."""
        if not self._waiting:
            self._since = now
        self._waiting += 1

    def end(self, now: float) -> None:
        """Somebody waits no more."""
        self._waiting -= 1
        if not self._waiting:
            self.left_s -= now - self._since


@dataclass(slots=True)
class Memory:
    """The answers of one transaction: one question has one answer, failures too, unless a budget cut it short."""

    strangers: Budget
    own: Budget
    answers: dict[str, Answer] = field(default_factory=dict)
    trail: list[Asked] = field(default_factory=list)
    asked: int = 0
    own_asked: int = 0
    hooks: dict[tuple[object, ...], Budget] = field(default_factory=dict)
    """What each policy's hook may wait."""

    def remember(self, key: str, asked: Asked) -> Answer:
        """Keep an answer, unless there is one; the one that counts."""
        known = self.answers.get(key)
        if known is not None:
            return known
        if asked.answer is not OUT_OF_TIME:
            self.answers[key] = asked.answer
        self.trail.append(asked)
        return asked.answer

    def hook(self, policy: str, tx: Transaction | None, limit_s: float) -> Budget:
        """The budget of the policy's hook that runs now; at RCPT that of all hooks since the last good recipient."""
        at = (policy, tx is not None and tx.message is not None, 0 if tx is None else len(tx.envelope.rcpts))
        budget = self.hooks.get(at)
        if budget is None:
            budget = self.hooks[at] = Budget(limit_s)
        return budget

    def is_over(self, *, own_budget: bool) -> bool:
        """Count one more question; whether it is one too many. Strangers cannot use up the author domain's."""
        if own_budget:
            self.own_asked += 1
            return self.own_asked > MAX_QUESTIONS
        self.asked += 1
        return self.asked > MAX_QUESTIONS


_MEMORY = Slot[Memory]("dns_memory")


def memory_of(tx: Transaction | None, total_s: float) -> Memory:
    """The transaction's, made where it has none; a new one without a transaction."""
    if tx is None:
        return Memory(Budget(total_s), Budget(OWN_BUDGET_S))
    memory = _MEMORY.get(tx)
    if memory is None:
        memory = Memory(Budget(total_s), Budget(OWN_BUDGET_S))
        _MEMORY.put(tx, memory)
        TRAIL.put(tx, memory.trail)
    return memory
