"""What one check asks of DNS: within which limits, the names of the client, the values of macros (RFC 7208 4.6.4, 7).

A check has one Inquiry, which its includes and redirects share (RFC 7208 4.6.4: "a single global limit").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.api import Answer, Found, Lookup, Question, Result, RRType
from policies.verify.spf.macro import MacroString, expand_domain
from policies.verify.spf.names import a_labels, is_askable

_A, _AAAA = RRType.A, RRType.AAAA
_VOID = (Found.NO_DATA, Found.NO_SUCH_NAME)
_UNKNOWN_NAME = "unknown"  # RFC 7208 7.3, of %{p} and %{r}


@dataclass(frozen=True, slots=True)
class SpfLimits:
    """RFC 7208 4.6.4: terms that query, void look-ups, names of one mx or ptr; and questions in all, which is ours."""

    lookups: int = 10
    voids: int = 2
    names: int = 10
    questions: int = 160


DEFAULT_LIMITS = SpfLimits()


class StopError(Exception):
    """A permerror or temperror, which ends the whole check."""

    def __init__(self, result: Result, problem: str, domain: str) -> None:
        super().__init__(problem)
        self.result = result
        self.problem = problem
        self.domain = domain


class Arguments(NamedTuple):
    """What macros tell of beside client and domain."""

    mail_from: str
    helo: str
    receiver: str
    now: float


class Validated(NamedTuple):
    """RFC 7208 5.5: the client's names that lead back to it; what was void or failed on the way."""

    names: tuple[str, ...]
    is_void: bool
    trouble: str


class Inquiry:
    """The questions of one check. `lookups` are the terms that query so far, `voids` those that found nothing."""

    def __init__(self, client: IPv4Address | IPv6Address, limits: SpfLimits, arguments: Arguments) -> None:
        self.client = client
        self.version = version = client.version
        self.address = int(client)
        self.limits = limits
        self.lookups = 0
        self.voids = 0
        # RFC 7208 5: addresses are those of the client's family
        self.rrtype = _A if version == 4 else _AAAA
        self._arguments = arguments
        self._questions = 0
        self._void_term = 0  # the number of the last term that was counted as void
        self._values: dict[str, str] = {}
        self._validated: Validated | None = None

    def ask(self, *questions: Question) -> Lookup[Sequence[Answer]]:
        if not questions:
            return ()
        self._questions += len(questions)
        if self._questions > self.limits.questions:
            raise StopError(Result.PERMERROR, "too many DNS questions", questions[0].name)
        return (yield questions)

    def answer(self, question: Question) -> Lookup[Answer]:
        """One answer that is no error."""
        (answer,) = yield from self.ask(question)
        if answer.is_temporary:
            # RFC 7208 5: a server error or a timeout
            raise StopError(Result.TEMPERROR, f"no answer: {answer.why}", question.name)
        return answer

    def count(self, domain: str) -> None:
        """RFC 7208 4.6.4: one more term that queries."""
        self.lookups += 1
        if self.lookups > self.limits.lookups:
            raise StopError(Result.PERMERROR, f"more than {self.limits.lookups} terms that query DNS", domain)

    def count_void(self, domain: str) -> None:
        """RFC 7208 4.6.4: the term that was counted last found nothing; it counts once."""
        if self._void_term == self.lookups:
            return
        self._void_term = self.lookups
        self.voids += 1
        if self.voids > self.limits.voids:
            raise StopError(Result.PERMERROR, f"more than {self.limits.voids} void look-ups", domain)

    def find_validated(self) -> Lookup[Validated]:
        """RFC 7208 5.5: the first ten names of the client that have its address; asked for once."""
        if self._validated is None:
            (answer,) = yield from self.ask(Question(self.client.reverse_pointer, RRType.PTR))
            # RFC 7208 4.6.4: all but the first ten are ignored
            names = [name for name in answer.names[: self.limits.names] if is_askable(name)]
            answers = yield from self.ask(*[Question(name, self.rrtype) for name in names])
            found = [
                name
                for name, each in zip(names, answers, strict=True)
                if any(address == self.client for address in each.addresses)
            ]
            everything = (answer, *answers)
            self._validated = Validated(
                tuple(found),
                any(each.found in _VOID for each in everything),
                next(
                    (
                        f"no answer for a name of the client: {each.why}"
                        for each in everything
                        if each.is_temporary
                    ),
                    "",
                ),
            )
        return self._validated

    def target(self, spec: MacroString, domain: str) -> Lookup[tuple[str, str]]:
        """RFC 7208 4.8: <target-name> of the term that was counted last, and the trouble that leaves it unknown."""
        if spec.needs_p:
            validated = yield from self.find_validated()
            if validated.trouble and not validated.names:
                return "", validated.trouble
            if validated.is_void:
                self.count_void(domain)
        return self.expand(spec, domain), ""

    def expand(self, spec: MacroString, domain: str) -> str:
        """A domain-spec while `domain` is evaluated; for `%{p}` the names of the client have to be found before."""
        return expand_domain(spec, {} if spec.fixed is not None else self.values_of(domain))

    def values_of(self, domain: str) -> dict[str, str]:
        """RFC 7208 7.2: the values of all macros while this domain is evaluated."""
        if not self._values:
            local, _, sender_domain = self._arguments.mail_from.rpartition("@")
            # RFC 7208 4.3
            local = local or "postmaster"
            sender_domain = a_labels(sender_domain)
            is_ip4 = self.version == 4
            self._values = {
                "s": f"{local}@{sender_domain}",
                "l": local,
                "o": sender_domain,
                "i": str(self.client) if is_ip4 else ".".join(f"{self.address:032X}"),
                "v": "in-addr" if is_ip4 else "ip6",
                "h": self._arguments.helo,
                "c": str(self.client),
                "r": self._arguments.receiver or _UNKNOWN_NAME,
                "t": str(int(self._arguments.now)),
            }
        return {**self._values, "d": domain, "p": self._p(domain)}

    def _p(self, domain: str) -> str:
        """RFC 7208 7.3: of the validated names the domain itself, else one below it, else any."""
        names = self._validated.names if self._validated else ()
        same = domain.lower()
        for name in names:
            if name.lower() == same:
                return name
        below = (name for name in names if name.lower().endswith(f".{same}"))
        return next(below, names[0] if names else _UNKNOWN_NAME)
