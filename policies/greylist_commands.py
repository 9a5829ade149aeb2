"""The command `mxgate greylist`: what the greylist knows, and the operator's word on it, in the store that mail uses.

Offered by an entry point of the group `gateway.commands`; `context.obj.store("greylist")` opens the store of the
configuration. An operator names who sends: a domain stands for its organisational domain, which counts where it is
authenticated, an address for its network. Exit codes: 0 done, 1 nothing of it is there, or the store does not answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Protocol, TypeVar

import click

from gateway.api import AddressError, Domain, Entry, Keyspace, parse_forward_path
from policies.verify.greylist.key import (
    IPV4_PREFIX,
    IPV6_PREFIX,
    TRIPLET,
    client_network,
    parts_of,
    rcpt_key,
    sender_key,
)
from policies.verify.greylist.ledger import DAY, DAYS_KEPT, ORIGIN
from policies.verify.greylist.state import DAY_S, RECENT_S, Credit, day_of, decode, decode_credit
from policies.verify.org_domain import registrable

T = TypeVar("T")
_MAX_DAYS = 366


class Store(Protocol):
    """What the gateway's command line gives."""

    def run(self, use: Callable[[Keyspace], Awaitable[T]]) -> T:
        """Open the store and use it."""


@dataclass(frozen=True, slots=True)
class _Who:
    """What an operator named: an origin, or a mailbox as it stands in triplets, as sender and as recipient."""

    origin: str = ""
    sender: str = ""
    rcpts: tuple[str, ...] = ()


def _who(_context: click.Context, _parameter: click.Parameter, value: str) -> _Who:
    """An address, a network no wider than those that are told apart, a domain, or a mailbox."""
    if "@" in value:
        try:
            mailbox = parse_forward_path(f"<{value}>", smtputf8=True)
        except AddressError as exc:
            raise click.BadParameter(str(exc)) from exc
        rcpts = tuple([rcpt_key(mailbox, is_domain=is_domain) for is_domain in (False, True)])
        return _Who(sender=sender_key(mailbox), rcpts=rcpts)
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        return _Who(origin=_org_domain(value))
    if network.prefixlen < (IPV4_PREFIX if network.version == 4 else IPV6_PREFIX):
        raise click.BadParameter(
            f"{network} is wider than a /{IPV4_PREFIX} or a /{IPV6_PREFIX}; policy.greylist.exempt takes it"
        )
    return _Who(origin=client_network(ip_address(network.network_address)))


def _org_domain(value: str) -> str:
    try:
        org = registrable(Domain.parse(value))
    except AddressError as exc:
        raise click.BadParameter(str(exc)) from exc
    if org is None:
        raise click.BadParameter(f"{value} is a public suffix, below which everybody may have a domain")
    return org


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_who_argument = click.argument("who", callback=_who)


@click.group()
def greylist() -> None:
    """Show and change what the greylist knows."""


@greylist.command("list")
@click.option("--waiting", "what", flag_value="waiting", help="Only triplets that have not passed.")
@click.option("--passed", "what", flag_value="passed", help="Only triplets that have.")
@click.option("--known", "what", flag_value="known", help="Only networks and domains with credit.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@_json
@click.pass_context
def list_(context: click.Context, /, *, what: str | None, limit: int, as_json: bool) -> int:
    """List triplets, and the networks and domains that came back in time. Reads through the whole store."""
    store: Store = context.obj.store("greylist")

    async def use(keys: Keyspace) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        async for entry in _entries(keys):
            shown = _shown(entry)
            if shown is not None and what in (None, shown["state"]):
                found.append(shown)
                if len(found) == limit:
                    break
        return found

    _tell(store.run(use), as_json=as_json)
    return 0


@greylist.command()
@_who_argument
@_json
@click.pass_context
def show(context: click.Context, /, *, who: _Who, as_json: bool) -> int:
    """Show what is known of WHO: a client's address, a domain, or a mailbox that sends or receives."""
    store: Store = context.obj.store("greylist")

    async def use(keys: Keyspace) -> list[dict[str, object]]:
        return [shown async for entry in _of(keys, who) if (shown := _shown(entry)) is not None]

    found = store.run(use)
    _tell(found, as_json=as_json)
    return 0 if found else 1


@greylist.command()
@_who_argument
@click.option("--days", type=click.IntRange(1, _MAX_DAYS), default=_MAX_DAYS, show_default=True)
@click.pass_context
def allow(context: click.Context, /, *, who: _Who, days: int) -> int:
    """Let WHO pass at once: the network of a client's address, or a domain, where it is authenticated."""
    if not who.origin:
        raise click.UsageError(
            "anybody can write a mailbox's address; allow its domain, or the client's address"
        )
    store: Store = context.obj.store("greylist")
    value = Credit(0, day_of(time.time()), is_allowed=True).encoded()
    store.run(lambda keys: keys.ask(keys.put(ORIGIN + who.origin, value, ttl_s=days * DAY_S)))
    click.echo(f"{who.origin} passes at once for {days} days")
    return 0


@greylist.command()
@_who_argument
@click.pass_context
def forget(context: click.Context, /, *, who: _Who) -> int:
    """Forget what is known of WHO, what was allowed too: the next message is a first one again."""
    store: Store = context.obj.store("greylist")

    async def use(keys: Keyspace) -> int:
        names = [entry.key async for entry in _of(keys, who)]
        count = sum([await keys.ask(keys.delete(name)) for name in names])
        if any(name.startswith(ORIGIN) for name in names):
            # until no worker has it in mind any more
            await asyncio.sleep(RECENT_S)
        return count

    count = store.run(use)
    click.echo(f"{count} entries forgotten")
    return 0 if count else 1


@greylist.command()
@_json
@click.pass_context
def stats(context: click.Context, /, *, as_json: bool) -> int:
    """Count what is there, and by day who came back in time. Reads through the whole store."""
    store: Store = context.obj.store("greylist")

    async def use(keys: Keyspace) -> tuple[dict[str, int], list[dict[str, object]]]:
        counts = {"waiting": 0, "passed": 0, "known": 0}
        days: dict[int, dict[str, int]] = {}
        async for entry in _entries(keys):
            shown = _shown(entry)
            if shown is not None:
                counts[str(shown["state"])] += 1
            elif entry.key.startswith(DAY) and entry.value.isdigit():
                day, _, what = entry.key.removeprefix(DAY).partition(" ")
                if day.isdigit() and what in ("first", "back"):
                    days.setdefault(int(day), {"first": 0, "back": 0})[what] = int(entry.value)
        listed: list[dict[str, object]] = [
            {"day": _date(day * DAY_S), **days[day]} for day in sorted(days)[-DAYS_KEPT:]
        ]
        return counts, listed

    counts, days = store.run(use)
    if as_json:
        click.echo(json.dumps({**counts, "days": days}, indent=2))
        return 0
    click.echo(f"{counts['waiting']} triplets wait, {counts['passed']} have passed")
    click.echo(f"{counts['known']} networks and domains have credit")
    for each in days:
        click.echo(f"{each['day']}  first attempts {each['first']}, came back in time {each['back']}")
    return 0


async def _entries(keys: Keyspace, prefix: str = "") -> AsyncIterator[Entry]:
    cursor = ""
    while True:
        page = await keys.scan(prefix, cursor)
        for entry in page.entries:
            yield entry
        if not (cursor := page.cursor):
            return


async def _of(keys: Keyspace, who: _Who) -> AsyncIterator[Entry]:
    """What is kept of somebody."""
    if not who.origin:
        async for entry in _entries(keys, TRIPLET):
            _, sender, rcpt = parts_of(entry.key)
            if sender == who.sender or rcpt in who.rcpts:
                yield entry
        return
    async for entry in _entries(keys, ORIGIN + who.origin):
        if entry.key == ORIGIN + who.origin:
            yield entry
    async for entry in _entries(keys, f"{TRIPLET}{who.origin} "):
        yield entry


def _shown(entry: Entry) -> dict[str, object] | None:
    """A triplet or a credit in JSON's types; None for what else is kept."""
    ends = {"ends_in_s": round(entry.ttl_s)}
    if entry.key.startswith(ORIGIN):
        credit = decode_credit(entry.value)
        return {
            "state": "known",
            "origin": entry.key.removeprefix(ORIGIN),
            "passes": credit.passes,
            "allowed": credit.is_allowed,
            **ends,
        }
    record = decode(entry.value) if entry.key.startswith(TRIPLET) else None
    if record is None:
        return None
    origin, sender, rcpt = parts_of(entry.key)
    return {
        "state": "waiting" if record.passed_day is None else "passed",
        "origin": origin,
        "sender": sender,
        "rcpt": rcpt,
        "first": _time(record.first_s),
        **ends,
    }


def _tell(found: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found:
        click.echo("  ".join(_words(each)).encode("ascii", "backslashreplace").decode())


def _words(shown: Mapping[str, object]) -> Iterator[str]:
    yield f"{shown['state']:7}"
    yield str(shown["origin"])
    if shown["state"] == "known":
        yield "allowed by the operator" if shown["allowed"] else f"{shown['passes']} came back in time"
    else:
        yield f"{shown['sender']} to {shown['rcpt']}  first attempt {shown['first']}"
    yield f"ends in {shown['ends_in_s']} s"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(seconds, 253_402_300_799)))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(min(seconds, 253_402_300_799)))
