"""sunday: mail waits until Monday."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.api import Policy, Reply, Transaction, Verdict, defer, proceed

CLOSED = Reply(450, "4.7.1", "Come back on Monday")


@dataclass(frozen=True, slots=True)
class SundaySettings:
    """[policy.sunday.settings]."""

    weekdays: tuple[int, ...] = field(
        default=(7,), metadata={"doc": "days on which mail is deferred; 1 is Monday"}
    )


class Sunday(Policy[SundaySettings]):
    """Days are those of UTC."""

    name = "sunday"
    Settings = SundaySettings

    async def on_mail(self, tx: Transaction) -> Verdict:
        """Defer on these days."""
        now = datetime.fromtimestamp(self.services.clock.now(), UTC)
        return defer("closed", CLOSED) if now.isoweekday() in self.settings.weekdays else proceed()
