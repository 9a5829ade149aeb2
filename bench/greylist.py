"""What greylisting costs: decisions a second, what it adds to a RCPT, and the octets of one million entries.

A decision is the policy's `on_rcpt` from call to verdict, with its questions to the store: of a stranger (a new triplet
each time, four questions in two steps and a count), of a client that is known (one question that reads), and of one
that was known just before (none). The guard with its deadline is around all but `memory:`, as in a worker. Redis is a
server of its own on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from statistics import quantiles

from bench.store import IN_FLIGHT, KINDS, bytes_per_entry, opened
from gateway.adapters.metrics import ProcessMetrics
from gateway.services import Services
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp.address import parse_forward_path, parse_reverse_path
from gateway.store import Keyspace
from gateway.verdict import Action
from policies.greylist import Greylist, GreylistSettings
from policies.verify.greylist.key import client_network
from policies.verify.greylist.ledger import ORIGIN
from policies.verify.greylist.state import Credit
from tests.fakes import FakeDns, FakeLog

WHO = ("stranger", "known", "again")
_SEEDED_AT_ONCE = 1_000


class _Clock:
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


def _transaction(number: int, who: str) -> Transaction:
    # each from a network of its own, but for who comes again
    client = (10 << 24) + (0 if who == "again" else number << 8)
    path = parse_reverse_path(f"<ann@d{number}.example.net>", smtputf8=False)
    return Transaction("S-1", Session("S", ip_address(client), 25), Envelope(path))


async def _make_known(keys: Keyspace, transactions: Sequence[Transaction]) -> None:
    known = Credit(5, int(time.time() // 86_400)).encoded()
    networks = list(dict.fromkeys(client_network(tx.session.client) for tx in transactions))
    for begin in range(0, len(networks), _SEEDED_AT_ONCE):
        some = networks[begin : begin + _SEEDED_AT_ONCE]
        await keys.ask_together(*[keys.put(ORIGIN + each, known, ttl_s=86_400.0) for each in some])


async def decisions(kind: str, who: str, in_flight: int, count: int) -> tuple[float, float, float, float]:
    """Decisions a second, CPU us of this process for one, and the median and 99th percentile of one in us."""
    async with opened(kind) as (store, _):
        keys = Keyspace(store, "mxgate:greylist:")
        services = Services(_Clock(), FakeLog(), ProcessMetrics(), FakeDns(), keys)
        policy = Greylist(GreylistSettings(max_new_per_hour=0), services)
        await policy.start()
        rcpt = Recipient(parse_forward_path("<bob@example.org>", smtputf8=False))
        transactions = [_transaction(number, who) for number in range(count)]
        if who != "stranger":
            await _make_known(keys, transactions)
        wanted = Action.DEFER if who == "stranger" else Action.CONTINUE
        took: list[float] = []
        waiting: Iterator[Transaction] = iter(transactions)

        async def judge() -> None:
            for tx in waiting:
                begun = time.perf_counter()
                verdict = await policy.on_rcpt(tx, rcpt)
                took.append(time.perf_counter() - begun)
                assert verdict.action is wanted, verdict

        begun, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(judge())
        elapsed, cpu = time.perf_counter() - begun, time.process_time() - cpu
    percentiles = quantiles(took, n=100)
    return count / elapsed, cpu / count * 1e6, percentiles[49] * 1e6, percentiles[98] * 1e6


def main(arguments: list[str]) -> None:
    """Print the table; `--quick` for a look."""
    count, entries = (2_000, 20_000) if "--quick" in arguments else (30_000, 1_000_000)
    run = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - optional

        run = uvloop.run
    print(
        f"{'store':8} {'sender':9} {'in flight':>9} {'decisions/s':>12} {'CPU us':>8} {'p50 us':>8} {'p99 us':>8}"
    )
    for kind in KINDS:
        for who in WHO:
            for in_flight in IN_FLIGHT:
                rate, cpu, p50, p99 = run(decisions(kind, who, in_flight, count))
                print(f"{kind:8} {who:9} {in_flight:9} {rate:12.0f} {cpu:8.1f} {p50:8.0f} {p99:8.0f}")
    for kind in KINDS:
        print(f"{kind:8} {run(bytes_per_entry(kind, entries)):6.0f} octets per entry with {entries:,}")
