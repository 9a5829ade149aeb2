"""The plan: which policies run at which stage, in which order, for which recipients and clients.

Ranks come from `requires` and `after`: a policy stands one rank behind the last of those that it waits for, ties are in
the order of the configuration. At RCPT the relay guard stands alone and first, and the downstream's own answer
(`recipient`) parts the stage in two.

Overrides for recipient domains make groups of domains: all domains with the same closest pattern are judged alike.
Only data here: the pipeline runs it, `mxgate plan` prints it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gateway.errors import GatewayError
from gateway.policy import Mode, OnError, Policy
from gateway.session import AddressSource, Trust
from gateway.verdict import Stage

if TYPE_CHECKING:
    from gateway.session import Session
    from gateway.smtp.address import AddressLiteral, Domain

RECIPIENT = "recipient"
"""The engine's own step at RCPT, the downstream's answer; policies may name it in `after`."""

GUARD = "relay_guard"
"""Runs alone and first at RCPT; without it nothing starts."""

_AUTHENTICATED = Trust.AUTHENTICATED
_HIDDEN = AddressSource.HIDDEN  # asked for each hook: of the class it costs ten times as much


class PlanError(GatewayError):
    """The policies cannot be put in order; the text names them."""


class Ordered(Protocol):
    """What has a place in the plan: a policy or its class, under its name."""

    @property
    def name(self) -> str: ...
    @property
    def policy(self) -> Policy[Any] | type[Policy[Any]]: ...
    @property
    def stages(self) -> frozenset[Stage]: ...


P = TypeVar("P", bound=Ordered)
Ranks = tuple[tuple[P, ...], ...]


@dataclass(frozen=True, slots=True)
class Override:
    """Another mode, and another policy object where its settings differ, for recipients of a domain.

    `pattern` is `example.org`, `.example.org` (its subdomains) or `*`.
    """

    pattern: str
    mode: Mode
    policy: Policy[Any] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One policy in the plan, with the operator's keys for it."""

    policy: Policy[Any]
    timeout_s: float
    on_error: OnError
    mode: Mode = Mode.ENFORCE
    exempt: tuple[IPv4Network | IPv6Network | Trust, ...] = ()
    overrides: tuple[Override, ...] = ()

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def stages(self) -> frozenset[Stage]:
        """Where it has something to say."""
        return self.policy.stages(self.policy.settings)

    def exempts(self, session: Session) -> bool:
        """Whether this client skips the policy; an address that hides its clients says nothing about them."""
        if session.trust is _AUTHENTICATED and _AUTHENTICATED in self.exempt:
            return True
        return session.address_source is not _HIDDEN and any(
            session.trust is each if isinstance(each, Trust) else session.client in each
            for each in self.exempt
        )

    def at(self, pattern: str) -> Step:
        """The step for the domains whose closest pattern is this one."""
        here = {each.pattern: each for each in self.overrides}
        closest = closest_pattern(pattern, here)
        if closest is None:
            return replace(self, overrides=())
        override = here[closest]
        return replace(self, policy=override.policy or self.policy, mode=override.mode, overrides=())


def closest_pattern(domain: Domain | AddressLiteral | str | None, patterns: Collection[str]) -> str | None:
    """The pattern that fits best: the domain itself, its closest parent written as ".parent", or "*".

    `domain` may be a pattern: the domains that it stands for. A mailbox without a domain has "*" only.
    """
    name = domain if isinstance(domain, str) else ""
    # "a.b.c" -> ".b.c" -> ".c"
    while name:
        if name in patterns:
            return name
        _, dot, parent = name.removeprefix(".").partition(".")
        name = dot + parent
    return "*" if "*" in patterns else None


def rank_of(steps: Sequence[Ordered]) -> dict[str, int]:
    """How many others each policy has to wait for in sequence. Raises PlanError for what is missing or circular."""
    by_name = {step.name: step.policy for step in steps}
    if len(by_name) != len(steps):
        raise PlanError("a policy stands twice in the plan")
    for name, policy in by_name.items():
        if missing := set(policy.requires) - by_name.keys():
            raise PlanError(f"policy {name} requires {', '.join(sorted(missing))}, which is not in the plan")
    before = {n: (set(p.requires) | set(p.after)) & by_name.keys() for n, p in by_name.items()}
    ranks: dict[str, int] = {}
    while len(ranks) < len(before):
        ready = [n for n, earlier in before.items() if n not in ranks and earlier <= ranks.keys()]
        if not ready:
            circle = ", ".join(sorted(before.keys() - ranks.keys()))
            raise PlanError(f"policies wait for each other: {circle}")
        for name in ready:
            ranks[name] = max((ranks[n] + 1 for n in before[name]), default=0)
    return ranks


def stage_ranks(steps: Sequence[P], stage: Stage) -> Ranks[P]:
    """The policies of a stage, rank by rank. For RCPT see rcpt_ranks."""
    return _ranks([step for step in steps if stage in step.stages], rank_of(steps))


def rcpt_ranks(steps: Sequence[P]) -> tuple[Ranks[P], Ranks[P]]:
    """The policies of RCPT before and behind the downstream's answer: the guard alone and first."""
    order = rank_of(steps)
    behind = _behind_recipient(steps, order)
    here = [step for step in steps if Stage.RCPT in step.stages]
    guard = [step for step in here if step.name == GUARD]
    before = [step for step in here if step.name not in behind and step.name != GUARD]
    return _ranks(guard, order) + _ranks(before, order), _ranks([s for s in here if s.name in behind], order)


def _behind_recipient(steps: Sequence[Ordered], order: dict[str, int]) -> frozenset[str]:
    """Those that run behind the downstream's answer: who says so, and who waits for one of them."""
    behind: set[str] = set()
    for step in sorted(steps, key=lambda s: order[s.name]):
        earlier = {*step.policy.requires, *step.policy.after}
        if RECIPIENT in step.policy.after or earlier & behind:
            behind.add(step.name)
    return frozenset(behind - {GUARD})


def _ranks(steps: Sequence[P], order: dict[str, int]) -> Ranks[P]:
    """Rank by rank; within a rank in the order of the configuration."""
    numbers = sorted({order[step.name] for step in steps})
    return tuple(tuple(s for s in steps if order[s.name] == number) for number in numbers)
