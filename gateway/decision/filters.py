"""Which records somebody wants to see: what /api/v1/decisions takes as its query, and the worker over the channel.

Every value is text of whoever asks; it is checked here once, and a FilterError says in one line what is wrong.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from gateway.decision.record import ACTIONS, Decision, Judged
from gateway.errors import GatewayError
from gateway.session import unmapped
from gateway.smtp.address import AddressError, Domain
from gateway.verdict import Action, Verdict

MAX_LIMIT: Final = 1000
DEFAULT_LIMIT: Final = 20
NAMES: Final = (
    *("tx", "rcpt", "sender", "domain", "client", "action", "reason", "policy", "since", "limit"),
)
"""What a query may hold."""
OTHER_NAMES: Final = {"id": "tx", "from": "sender", "network": "client"}
"""What the same is called elsewhere, and may be called here."""
# RFC 5321 4.5.3.1.3 bounds the longest of them, an address
_MAX_VALUE = 256
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGO = re.compile(r"([0-9]{1,9})([smhd])")


class FilterError(GatewayError):
    """A query that cannot be answered; the text says why, in printable ASCII."""


@dataclass(frozen=True)
class Filters:
    """What a record must have to be shown; "" asks for nothing. Case counts in none of them.

    `tx` is the id of a transaction, or of a session for all of its transactions. `rcpt` and `sender` are an address,
    or a domain (of its recipients one, of its sender the one); `<>` is the null reverse-path. `domain` is that of the
    sender or of a recipient, or one above it. `client` is an address or a network. `action` is one of ACTIONS.
    `policy` is one that decided about the transaction or one of its recipients, failed, or would have decided if it
    were not observed only; `reason` is the reason of any of these. `since` is when it ended at the earliest, seconds
    since the epoch.
    """

    tx: str = ""
    rcpt: str = ""
    sender: str = ""
    client: IPv4Network | IPv6Network | None = None
    action: str = ""
    policy: str = ""
    domain: str = ""
    reason: str = ""
    since: float = 0.0

    def matches(self, decision: Decision) -> bool:
        """Whether the record is one of those that were asked for."""
        return (
            decision.time >= self.since
            and (not self.action or decision.action == self.action)
            and (self.client is None or unmapped(decision.session.client) in self.client)
            and (not self.tx or self.tx in (decision.id.lower(), decision.session.id.lower()))
            and (not self.sender or self._is_sender(decision))
            and (not self.rcpt or any(_is(answer.rcpt.mailbox.text, self.rcpt) for answer in decision.rcpts))
            and (not self.domain or self._is_of_domain(decision))
            and (not self.policy or self._has_decided(decision))
            and (not self.reason or self._has_reason(decision))
        )

    def _is_of_domain(self, decision: Decision) -> bool:
        mail_from = decision.envelope.mail_from
        addresses = [answer.rcpt.mailbox.text for answer in decision.rcpts]
        if mail_from is not None:
            addresses.append(mail_from.text)
        return any(
            f".{address.lower().rpartition('@')[2]}".endswith(f".{self.domain}") for address in addresses
        )

    def _has_reason(self, decision: Decision) -> bool:
        return (
            self.reason in (decision.reason.lower(), decision.error.lower())
            or any(answer.reason.lower() == self.reason for answer in decision.rcpts)
            or any(
                str(verdict.reason).lower() == self.reason
                for judged in decision.judged
                if _says_something(judged)
                for verdict in (judged.verdict, judged.would_be)
                if isinstance(verdict, Verdict)
            )
        )

    def _is_sender(self, decision: Decision) -> bool:
        mail_from = decision.envelope.mail_from
        return self.sender == "<>" if mail_from is None else _is(mail_from.text, self.sender)

    def _has_decided(self, decision: Decision) -> bool:
        policy = self.policy
        return (
            decision.policy == policy
            or any(answer.policy == policy for answer in decision.rcpts)
            or any(judged.policy == policy and _says_something(judged) for judged in decision.judged)
        )


ANY: Final = Filters()


def parse_query(query: Mapping[str, object], now: Callable[[], float] = time.time) -> tuple[Filters, int]:
    """The filters of a query, and how many records it wants (20 when it does not say, at most 1000).

    `since` is a time as the records have it (2026-11-22T05:33:44Z), or how long before `now`: 90s, 15m, 2h, 1d.
    Raises FilterError for an unknown name, one that stands there under two names, an action that does not exist, what
    is no address or network as `client`, no domain, no time, and a limit that is no number of 1..1000.
    """
    for other, name in OTHER_NAMES.items():
        if other in query:
            if name in query:
                raise FilterError(f"{other} and {name} are the same filter; give one of them")
            query = {name if key == other else key: value for key, value in query.items()}
    unknown = sorted(set(query) - set(NAMES))
    if unknown:
        raise FilterError(f"unknown filter {unknown[0][:40]!a}; there are {', '.join(NAMES)}")
    given = {name: _value(name, query.get(name, "")) for name in NAMES}
    action = given["action"]
    if action and action not in ACTIONS:
        raise FilterError(f"action {action!a} is none of {', '.join(ACTIONS)}")
    filters = Filters(
        tx=given["tx"],
        rcpt=given["rcpt"].strip("<>"),
        sender=given["sender"] if given["sender"] == "<>" else given["sender"].strip("<>"),
        client=_network(given["client"]) if given["client"] else None,
        action=action,
        policy=given["policy"],
        domain=_domain(given["domain"]) if given["domain"] else "",
        reason=given["reason"],
        since=_since(given["since"], now) if given["since"] else 0.0,
    )
    return filters, _limit(given["limit"]) if given["limit"] else DEFAULT_LIMIT


def _value(name: str, value: object) -> str:
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or len(value) > _MAX_VALUE:
        raise FilterError(f"{name} is no text of at most {_MAX_VALUE} characters")
    return value.strip().lower()


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(text, strict=False)
    except ValueError as exc:
        raise FilterError(f"client {text!a} is no address and no network") from exc
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:  # RFC 4291 2.5.5.2
        return IPv4Network((mapped, network.prefixlen - 96))
    return network


def _domain(text: str) -> str:
    try:
        return Domain.parse(text.removeprefix("@").removeprefix("."))
    except AddressError as exc:
        raise FilterError(f"domain {text!a} is no domain") from exc


def _since(text: str, now: Callable[[], float]) -> float:
    if ago := _AGO.fullmatch(text):
        return now() - int(ago[1]) * _UNITS_S[ago[2]]
    try:
        at = datetime.fromisoformat(text.upper())
        # without a zone it is UTC, as in the records
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError) as exc:
        raise FilterError(
            f"since {text!a} is neither a time (2026-11-22T05:33:44Z) nor 90s, 15m, 2h or 1d"
        ) from exc


def _limit(text: str) -> int:
    # not int() of any digits: those of other scripts are no number here, nor is one of a thousand digits
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= MAX_LIMIT):
        raise FilterError(f"limit {text!a} is not in 1..{MAX_LIMIT}")
    return int(text)


def _is(address: str, wanted: str) -> bool:
    """Whether an address is the one that is wanted, or in the domain that is."""
    address = address.lower()
    return address == wanted or ("@" not in wanted[1:] and address.endswith("@" + wanted.removeprefix("@")))


def _says_something(judged: Judged) -> bool:
    return bool(judged.failure) or any(
        isinstance(verdict, Verdict) and verdict.action != Action.CONTINUE
        for verdict in (judged.verdict, judged.would_be)
    )
