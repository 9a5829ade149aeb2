"""What an SPF check has found: the result word, why, and every term that was tried (RFC 7208 2.6, 8)."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.api import Result
from policies.verify.spf.record import Directive

# A record may have hundreds of networks, and nobody reads them
_SHOWN_TERMS = 50


class Step(NamedTuple):
    """One step of a check: a record was found, or terms were tried. `depth` counts the includes around it.

    `terms` are networks that did not match, or one term; without terms it is about `domain` itself.
    """

    depth: int
    domain: str
    terms: tuple[Directive, ...]
    outcome: str

    @property
    def line(self) -> str:
        """It in words."""
        shown = " ".join([directive.text for directive in self.terms[:_SHOWN_TERMS]]) or self.domain
        more = len(self.terms) - _SHOWN_TERMS
        return f"{'  ' * self.depth}{shown}{f' and {more} more' if more > 0 else ''}: {self.outcome}"


class SpfResult(NamedTuple):
    """The result of check_host() and its evidence.

    `domain` is the identity that was checked, as A-labels where it has that form. `term` is the directive that
    decided and `decided_by` the domain whose record holds it; both are "" when no directive did. `problem` tells in
    plain words why it is `temperror` or `permerror` (RFC 7208 8.6, 8.7), `problem_domain` whose doing that is.
    `explanation` is what the domain says about its `fail` (RFC 7208 6.2): text of a stranger, printable ASCII, not
    to be shown without saying whose it is. `lookups` are the terms that query, `voids` those that found nothing.
    """

    result: Result
    client: IPv4Address | IPv6Address
    domain: str
    term: str = ""
    decided_by: str = ""
    problem: str = ""
    problem_domain: str = ""
    explanation: str = ""
    lookups: int = 0
    voids: int = 0
    steps: tuple[Step, ...] = ()

    def lines(self) -> Sequence[str]:
        """Every term tried with its outcome, then the result."""
        problem = f" ({self.problem}, {self.problem_domain})" if self.problem else ""
        decided = f" by {self.term} of {self.decided_by}" if self.term else ""
        counts = f"{self.lookups} terms that query, {self.voids} void"
        explained = [f"{self.decided_by} explains: {self.explanation}"] if self.explanation else []
        return (
            f"SPF of {self.domain} for {self.client}",
            *[f"  {step.line}" for step in self.steps],
            f"{self.result}{decided}{problem}; {counts}",
            *explained,
        )
