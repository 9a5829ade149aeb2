"""`mxgate plugin list`: which policies there are, where they come from, what they hook into, and what is on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from gateway.plan import rank_of
from gateway.plugins import PlannedPolicy, PluginError, installed, load_from
from gateway.policy import Policy, has_hook
from gateway.verdict import Stage

# In the order of a session.
_HOOKS = (*(str(stage) for stage in Stage if stage is not Stage.EOM), "header", "eom", "outcome")


class Listed(TypedDict):
    """One policy. `mode` is "" for one that is not in the plan; `order` its rank there, -1 outside."""

    name: str
    source: str
    mode: str
    order: int
    hooks: list[str]
    error: str


def listed(planned: Sequence[PlannedPolicy]) -> list[Listed]:
    """The plan in its order, then what else is installed. Imports all of it. Raises PluginError for a name twice."""
    ranks = rank_of(planned)
    inside: list[Listed] = [
        {
            "name": each.name,
            "source": each.source,
            "mode": str(each.mode),
            "order": ranks[each.name],
            "hooks": _hooks(each.policy),
            "error": "",
        }
        for each in sorted(planned, key=lambda each: ranks[each.name])
    ]
    outside: list[Listed] = []
    for name, source in sorted(installed().items()):
        if name in ranks:
            continue
        error, hooks = "", []
        try:
            hooks = _hooks(load_from(source))
        except PluginError as exc:
            error = str(exc)
        outside.append(
            {"name": name, "source": str(source), "mode": "", "order": -1, "hooks": hooks, "error": error}
        )
    return inside + outside


def listing_lines(policies: Sequence[Listed]) -> Iterator[str]:
    """The same for people."""
    width = max((len(each["name"]) for each in policies), default=0)
    sources = max((len(each["source"]) for each in policies), default=0)
    for each in policies:
        order = f"{each['order'] + 1}" if each["mode"] else "-"
        hooks = f"error: {each['error']}" if each["error"] else " ".join(each["hooks"])
        mode = each["mode"] or "not enabled"
        yield f"{order:>2}  {each['name']:{width}}  {mode:11}  {each['source']:{sources}}  {hooks}".rstrip()


def _hooks(policy: type[Policy[Any]]) -> list[str]:
    return [hook for hook in _HOOKS if has_hook(policy, f"on_{hook}")]
