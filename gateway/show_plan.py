"""The plan as `mxgate plan` prints it: the policies with the operator's keys, and who runs when at each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

from gateway.pipeline import STAGE_BUDGET_S
from gateway.plan import RECIPIENT, rcpt_ranks, stage_ranks
from gateway.verdict import Stage

if TYPE_CHECKING:
    from gateway.plugins import PlannedOverride, PlannedPolicy


class ShownStage(TypedDict):
    """A stage: its budget in seconds, and names rank by rank; `recipient` is the downstream's own answer."""

    budget_s: float
    ranks: list[list[str]]


class ShownPolicy(TypedDict):
    """A policy with what is in force for it; `domains` are its overrides by pattern."""

    name: str
    source: str
    mode: str
    timeout_s: float
    on_error: str
    stages: list[str]
    requires: list[str]
    after: list[str]
    exempt: list[str]
    domains: dict[str, str]


class ShownPlan(TypedDict):
    """What `mxgate plan --json` prints."""

    policies: list[ShownPolicy]
    stages: dict[str, ShownStage]


def shown_plan(planned: Sequence[PlannedPolicy]) -> ShownPlan:
    """The plan in JSON's types."""
    return {
        "policies": [_policy(each) for each in planned],
        "stages": {
            str(stage): {"budget_s": STAGE_BUDGET_S[stage], "ranks": _ranks(planned, stage)}
            for stage in Stage
        },
    }


def plan_lines(plan: ShownPlan) -> Iterator[str]:
    """The same for people."""
    width = max((len(each["name"]) for each in plan["policies"]), default=0)
    for each in plan["policies"]:
        line = f"{each['name']:{width}}  {each['mode']}, {each['timeout_s']:g} s, on_error {each['on_error']}"
        yield f"{line}, from {each['source']}"
        for word in ("requires", "after", "exempt"):
            if names := each[word]:
                yield f"{'':{width}}  {word} {', '.join(names)}"
        for pattern, override in each["domains"].items():
            yield f"{'':{width}}  {pattern}: {override}"
    yield ""
    for name, stage in plan["stages"].items():
        order = " > ".join(", ".join(rank) for rank in stage["ranks"])
        yield f"{name:{max(map(len, Stage))}}  {stage['budget_s']:g} s  {order}".rstrip()


def _policy(planned: PlannedPolicy) -> ShownPolicy:
    policy = planned.policy
    return {
        "name": planned.name,
        "source": planned.source,
        "mode": str(planned.mode),
        "timeout_s": planned.timeout_s,
        "on_error": str(planned.on_error),
        "stages": [str(stage) for stage in Stage if stage in planned.stages],
        "requires": [*policy.requires],
        "after": [*policy.after],
        "exempt": [str(each) for each in planned.exempt],
        "domains": {each.pattern: _override(each) for each in planned.overrides},
    }


def _override(override: PlannedOverride) -> str:
    return f"{override.mode}{'' if override.settings is None else ', other settings'}"


def _ranks(planned: Sequence[PlannedPolicy], stage: Stage) -> list[list[str]]:
    if stage is not Stage.RCPT:
        return [[each.name for each in rank] for rank in stage_ranks(planned, stage)]
    before, behind = rcpt_ranks(planned)
    return [
        *([each.name for each in rank] for rank in before),
        [RECIPIENT],
        *([each.name for each in rank] for rank in behind),
    ]
