"""rate_limit: how much mail may come from a network, of a sender's domain, of a user, or for a recipient, in some time.

    [[policy.rate_limit.settings.limits]]
    per = "client"          # or "sender", "user", "recipient"
    count = 100
    within_s = 3600
    burst = 20              # how many at once; `count` unless set

Each limit is a token bucket in the store, shared by all workers and machines: a recipient takes a token, `count` of
them come back in `within_s`, and at most `burst` are there. Who finds none is deferred with 450 4.7.1 and told how long
to wait. That is asked once for each RCPT, before the downstream is asked about the recipient, so a dictionary attack is
slowed down before it gets there. What one limit refuses is no burden on the others.

A sender is the organisational domain that SPF proved, so that a provider's many addresses share one bucket and nobody
can empty it in another's name; without proof it is the domain that was given, together with the client's network.
A user is who has authenticated at submission, however the name is written; who has not is not counted.
While clients are hidden behind a balancer's address only what does not depend on it is counted. While the store is out
of reach, `[state] on_outage` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_network
from math import ceil, floor, isfinite

from gateway.api import (
    AddressSource,
    OnError,
    Policy,
    Recipient,
    Reply,
    Result,
    Services,
    Session,
    StoreDownError,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
)
from policies.verify.dmarc.judge import identifiers
from policies.verify.org_domain import registrable

STORE_DOWN = Reply(451, "4.3.0", "Temporary trouble, please try again later")
_MAX_WITHIN_S = 31 * 86_400.0
# what a token is worth in the store: to the millisecond
_LEAST_COST_S = 0.001


class Per(StrEnum):
    """What is counted."""

    CLIENT = "client"
    SENDER = "sender"
    USER = "user"
    RECIPIENT = "recipient"


_WHAT = {
    Per.CLIENT: "from your network",
    Per.SENDER: "of this sender's domain",
    Per.USER: "of yours",
    Per.RECIPIENT: "for this recipient",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit. Raises ValueError for what is none."""

    per: Per = field(metadata={"doc": "what is counted: `client`, `sender`, `user` or `recipient`"})
    count: int = field(metadata={"doc": "recipients that are let through in `within_s`"})
    within_s: float = field(default=3600.0, metadata={"doc": "the time that `count` is for, up to 31 days"})
    burst: int = field(default=0, metadata={"doc": "how many of them at once; 0: all of them"})

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.burst <= self.count:
            raise ValueError("count is not 1 or more, or burst not from 0 to count")
        if not (isfinite(self.within_s) and self.count * _LEAST_COST_S <= self.within_s <= _MAX_WITHIN_S):
            raise ValueError("within_s is over 31 days, or less than a millisecond for each of count")

    @property
    def cost_s(self) -> float:
        """The time in which one token comes back; in whole milliseconds, so that `count` of them fit `within_s`."""
        return floor(self.within_s * 1000 / self.count) / 1000

    @property
    def capacity_s(self) -> float:
        """The time in which an empty bucket is full."""
        return round(self.cost_s * (self.burst or self.count), 3)


@dataclass(frozen=True, slots=True)
class RateLimitSettings:
    """[policy.rate_limit.settings]."""

    limits: tuple[Limit, ...] = field(
        default=(), metadata={"doc": "the limits; each of them has to let mail through"}
    )
    ipv4_prefix: int = field(default=24, metadata={"doc": "how long the network of an IPv4 client is"})
    ipv6_prefix: int = field(default=64, metadata={"doc": "how long the network of an IPv6 client is"})

    def __post_init__(self) -> None:
        if not (8 <= self.ipv4_prefix <= 32 and 16 <= self.ipv6_prefix <= 128):
            raise ValueError("ipv4_prefix is not from 8 to 32, or ipv6_prefix not from 16 to 128")


class RateLimit(Policy[RateLimitSettings]):
    """Asks for a token of each limit, in one go."""

    name = "rate_limit"
    Settings = RateLimitSettings
    after = ("spf",)
    exempt = (Trust.TRUSTED,)
    needs_store = True

    def __init__(self, settings: RateLimitSettings, services: Services) -> None:
        super().__init__(settings, services)
        deferred = services.metrics.counters(
            "deferred_total", "Recipients that were deferred, by what there was too much of", ("per",)
        )
        self._deferred = {per: deferred.labels(per) for per in Per}

    async def start(self) -> None:
        """Read the public suffix list."""
        registrable("example.org")

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """The limit for which there is longest to wait decides."""
        asked = [
            (limit, key) for limit in self.settings.limits if (key := self._key(limit, tx, rcpt)) is not None
        ]
        if not asked:
            return proceed()
        store = self.services.store
        try:
            waits = await store.ask_together(
                *[store.take(key, limit.cost_s, capacity_s=limit.capacity_s) for limit, key in asked]
            )
            if not any(waits):
                return proceed()
            given = [each for each, wait_s in zip(asked, waits, strict=True) if not wait_s]
            await store.ask_together(
                *[store.take(key, -limit.cost_s, capacity_s=limit.capacity_s) for limit, key in given]
            )
        except StoreDownError as exc:
            return (
                defer("store_down", STORE_DOWN)
                if exc.on_outage is OnError.DEFER
                else proceed(reason="store_down")
            )
        longest_s = max(waits)
        limit, key = asked[waits.index(longest_s)]
        self._deferred[limit.per].inc()
        text = f"Too much mail {_WHAT[limit.per]} now, please try again in {ceil(longest_s)} seconds"
        return defer(f"too_much_per_{limit.per}", Reply(450, "4.7.1", text), evidence=_Bucket(limit, key))

    def _key(self, limit: Limit, tx: Transaction, rcpt: Recipient) -> str | None:
        """The bucket of one limit, None where it does not apply. A limit that is changed begins with full buckets."""
        whose = self._whose(limit.per, tx, rcpt)
        return whose and f"{limit.per} {limit.count}/{limit.within_s:g}/{limit.burst} {whose}"

    def _whose(self, per: Per, tx: Transaction, rcpt: Recipient) -> str | None:
        match per:
            case Per.CLIENT:
                return self._network(tx.session)
            case Per.SENDER:
                return self._sender(tx)
            case Per.USER:
                # the back-end `downstream` has the name as the client wrote it
                return tx.session.user and tx.session.user.casefold()
            case Per.RECIPIENT:
                return f"{rcpt.mailbox.local_value.lower()}@{rcpt.mailbox.domain}"

    def _network(self, session: Session) -> str | None:
        if session.address_source is AddressSource.HIDDEN:
            return None
        length = self.settings.ipv4_prefix if session.client.version == 4 else self.settings.ipv6_prefix
        return str(ip_network((session.client, length), strict=False))

    def _sender(self, tx: Transaction) -> str | None:
        mail_from = tx.envelope.mail_from
        for each in identifiers(tx.results, has_reverse_path=mail_from is not None):
            if each.method == "spf" and each.result is Result.PASS:
                return registrable(each.domain) or each.domain
        network = self._network(tx.session)
        return network and f"{'<>' if mail_from is None else mail_from.domain} {network}"


@dataclass(frozen=True, slots=True)
class _Bucket:
    """The bucket that was empty."""

    limit: Limit
    key: str

    def lines(self) -> Sequence[str]:
        return (f"{self.key}: {self.limit.count} in {self.limit.within_s:g} s, and there is none left",)
