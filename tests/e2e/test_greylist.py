"""greylist in real gateways: one greylist on several, a provider's pool, the operator's command, and an ill Redis."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

import pytest

from tests.adapters.store.faulty import Fault, FaultyProxy, faulty_proxy
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway, Value, run_mxgate
from tests.e2e.net import wait_until
from tests.e2e.redis import RedisServer, started
from tests.nameserver import Unbound

pytestmark = pytest.mark.e2e

DELAY_S = 1
RECORDS = """
big.example. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
other.example. 300 IN TXT "v=spf1 ip4:192.0.2.0/24 -all"
"""
RATE = 50
WORST_S = 0.3


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    yield from started(RedisServer)


@pytest.fixture
def unbound(tmp_path: Path) -> Iterator[Unbound]:
    server = Unbound(RECORDS, tmp_path)
    yield server
    server.close()


def config(url: str, *, dns: Unbound | None = None, settings: Config | None = None, **state: str) -> Config:
    policies: dict[str, Value] = {
        "greylist": {"mode": "enforce", "settings": {"delay_s": DELAY_S, **(settings or {})}},
    }
    if dns is None:
        policies |= {"spf": {"mode": "off"}}
    overrides: dict[str, Value] = {"policy": policies, "state": {"url": url, **state}}
    if dns is not None:
        overrides["dns"] = {"nameservers": [f"{dns.address[0]}:{dns.address[1]}"]}
    return overrides


def rcpt(
    gateway: Gateway, mail_from: str, *, to: str = "b@example.org", client: str | None = None
) -> tuple[int, str]:
    """Code and text of the reply to RCPT."""
    with gateway.connect(client) as session:
        session.hello()
        assert session.command(f"MAIL FROM:<{mail_from}>").code == 250
        reply = session.command(f"RCPT TO:<{to}>")
        return reply.code, reply.texts[0]


def passes_somewhen(gateway: Gateway, mail_from: str, **keys: str) -> None:
    wait_until(lambda: rcpt(gateway, mail_from, **keys)[0] == 250, within_s=5, what=f"{mail_from} passes")


# --- several are one ----------------------------------------------------------------------------------------


def assert_one_greylist(gateways: list[Gateway]) -> None:
    """Whoever sees the first attempt, the others know since when the sender waits, and that he passed."""
    turns = cycle(gateways)
    for number in range(4):
        sender = f"{'abcd'[number]}@example.net"
        begun = time.monotonic()
        code, text = rcpt(next(turns), sender)
        assert (code, text[:10]) == (451, "4.7.1 Grey")
        while rcpt(next(turns), sender)[0] == 451:
            assert time.monotonic() - begun < 5 + DELAY_S, "it never passes"
        # a record has whole seconds, so the wait may be that much shorter than the clock of this test sees
        assert time.monotonic() - begun > DELAY_S - 1
        assert {rcpt(each, sender)[0] for each in gateways} == {250}


def test_two_gateways_on_one_redis_are_one_greylist(
    redis: RedisServer, sink: Downstream, start_gateway: StartGateway
) -> None:
    assert_one_greylist([start_gateway(sink.address, config(redis.url)) for _ in range(2)])


def test_four_gateways_on_one_sqlite_file_are_one_greylist(
    tmp_path: Path, sink: Downstream, start_gateway: StartGateway
) -> None:
    url = f"sqlite://{tmp_path}/state.db"
    gateways = [start_gateway(sink.address, config(url)) for _ in range(4)]
    assert_one_greylist(gateways)
    # together they have seen four strangers, and four retries that were let through
    deferred = [each.metric("mxgate_greylist_deferred_total", attempt="first") for each in gateways]
    wait_until(
        lambda: sum(each.metric("mxgate_greylist_delay_seconds_count") for each in gateways) == 4,
        within_s=5,
        what="each retry is counted once",
    )
    assert sum(deferred) <= 4


def test_four_workers_on_one_sqlite_file_are_one_greylist(
    tmp_path: Path, sink: Downstream, start_gateway: StartGateway
) -> None:
    overrides = config(f"sqlite://{tmp_path}/state.db")
    gateway = start_gateway(sink.address, {**overrides, "server": {"workers": 4}})
    # the kernel gives each connection to one of them
    assert_one_greylist([gateway] * 16)


# --- pools --------------------------------------------------------------------------------------------------


def test_a_pool_of_40_addresses_in_12_networks_is_deferred_once(
    tmp_path: Path, unbound: Unbound, sink: Downstream, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(sink.address, config(f"sqlite://{tmp_path}/state.db", dns=unbound))
    pool = [f"127.{10 + network}.0.{host}" for host in range(1, 5) for network in range(12)][:40]
    codes = [rcpt(gateway, "news@big.example", client=pool[0])[0]]
    passes_somewhen(gateway, "news@big.example", client=pool[1])
    codes += [
        rcpt(gateway, f"news-{number}@big.example", to=f"r{number}@example.org", client=client)[0]
        for number, client in enumerate(pool[2:])
    ]
    assert codes == [451] + [250] * 38
    # a forged sender of a domain that is known, from elsewhere: SPF fails
    assert rcpt(gateway, "news@other.example", client="127.99.0.1")[0] == 451


# --- the operator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_command_works_on_the_live_store(
    kind: str, tmp_path: Path, redis: RedisServer, sink: Downstream, start_gateway: StartGateway
) -> None:
    url = redis.url if kind == "redis" else f"sqlite://{tmp_path}/state.db"
    gateway = start_gateway(sink.address, config(url, settings={"delay_s": 600}))

    def greylist(*arguments: str, code: int = 0) -> str:
        done = run_mxgate("--config", str(gateway.config_file), "greylist", *arguments)
        assert done.returncode == code, done.stderr
        return done.stdout

    assert json.loads(greylist("list", "--json")) == []
    assert rcpt(gateway, "ann@example.net")[0] == 451
    (triplet,) = json.loads(greylist("show", "ann@example.net", "--json"))
    assert (triplet["state"], triplet["origin"], triplet["rcpt"]) == (
        "waiting",
        "127.0.0.0/24",
        "b@example.org",
    )
    assert "1 triplets wait, 0 have passed" in greylist("stats")
    greylist("allow", "127.0.0.1", "--days", "1")
    assert rcpt(gateway, "ann@example.net")[0] == 250
    assert "allowed by the operator" in greylist("list", "--known")
    assert greylist("forget", "127.0.0.1") == "2 entries forgotten\n"
    assert rcpt(gateway, "ann@example.net")[0] == 451
    greylist("show", "nobody@example.com", code=1)


def test_a_file_that_cannot_be_written_stops_the_start_and_says_what_to_do(
    tmp_path: Path, sink: Downstream
) -> None:
    from tests.e2e.gateway import config_for

    gateway = Gateway(config_for(sink.address, overrides=config("sqlite:///nowhere/state.db")), tmp_path)
    try:
        assert gateway.process.wait(timeout=30) == 78
        assert "/nowhere/state.db" in gateway.log()
        assert "give state.url a file in a directory that mxgate may write to" in gateway.log()
    finally:
        gateway.kill()


# --- Redis is ill -------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """50 messages a second of strangers, up to RCPT."""

    gateway: Gateway
    took: list[float] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    async def run(self) -> None:
        numbers = count()
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._message(next(numbers)))
                await asyncio.sleep(1 / RATE)

    async def _message(self, number: int) -> None:
        reader, writer = await asyncio.open_connection(*self.gateway.address)
        try:
            for line in ("", "HELO c.example.net", f"MAIL FROM:<{_letters(number)}@example.net>"):
                if line:
                    writer.write(f"{line}\r\n".encode())
                assert (await reader.readline())[:1] == b"2"
            begun = time.perf_counter()
            writer.write(b"RCPT TO:<b@example.org>\r\n")
            code = int((await reader.readline())[:3])
            self.took.append(time.perf_counter() - begun)
            self.codes.append(code)
            writer.write(b"QUIT\r\n")
            await reader.read()
        finally:
            writer.close()


def _letters(number: int) -> str:
    """No digits, which the key would take for a number of VERP."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


@asynccontextmanager
async def traffic(gateway: Gateway) -> AsyncIterator[Traffic]:
    running = Traffic(gateway)
    task = asyncio.create_task(running.run())
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


# Of a stranger whose first attempt this is: deferred by the worker's own greylist, let through, deferred by the outage.
CODES = {"local": 451, "continue": 250, "defer": 451}


class Ill:
    """A Redis behind a proxy, and a way to break and to repair it."""

    def __init__(self, fault: str, proxy: FaultyProxy, server: RedisServer, other: RedisServer) -> None:
        self._fault, self._proxy, self._server, self._other = fault, proxy, server, other
        self._reload: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        match self._fault:
            case "refused":
                await self._proxy.stop()
            case "silent" | "slow":
                self._proxy.fault = Fault(self._fault)
            case "read_only":
                self._server.ask("REPLICAOF", self._other.address[0], self._other.port)
            case "full":
                self._server.ask("CONFIG", "SET", "maxmemory", "1")
            case "loading":
                self._server.ask("CONFIG", "SET", "key-load-delay", "1000")
                self._reload = asyncio.create_task(asyncio.to_thread(_reload, self._server))
            case _:
                self._server.kill()

    async def end(self) -> None:
        match self._fault:
            case "refused":
                await self._proxy.start()
            case "silent" | "slow":
                self._proxy.fault = Fault.NONE
            case "read_only":
                self._server.ask("REPLICAOF", "NO", "ONE")
            case "full":
                self._server.ask("CONFIG", "SET", "maxmemory", "100mb")
            case "loading":
                assert self._reload is not None
                self._server.kill()
                await self._reload
                await asyncio.to_thread(self._server.start)
            case _:
                await asyncio.to_thread(self._server.start)


def _reload(server: RedisServer) -> None:
    try:
        server.ask("DEBUG", "RELOAD", "NOSAVE")
    except OSError:
        return


@asynccontextmanager
async def redis_that_falls_ill(fault: str) -> AsyncIterator[tuple[Ill, str]]:
    """With the URL of the proxy in front of it."""
    server = RedisServer("enable-debug-command yes", "maxmemory 100mb", "maxmemory-policy noeviction")
    other = RedisServer()
    try:
        if fault == "loading":
            # each of them takes a while to be read
            for begin in range(0, 20_000, 2000):
                words = [word for number in range(begin, begin + 2000) for word in (f"k{number}", "v")]
                server.ask("MSET", *words)
            server.ask("SAVE")
        async with faulty_proxy(server.address) as proxy:
            yield Ill(fault, proxy, server, other), proxy.url
    finally:
        server.close()
        other.close()


async def gauge_shows(gateway: Gateway, value: int) -> None:
    def shown() -> bool:
        return gateway.metric("mxgate_store_outage") == value

    await asyncio.to_thread(wait_until, shown, within_s=5, what=f"the gauge shows {value}")


async def more(flow: Traffic, count: int) -> set[int]:
    """The replies to so many more messages; those under way now are left out."""
    begin = len(flow.codes) + 5

    def came() -> bool:
        return len(flow.codes) >= begin + count

    await asyncio.to_thread(wait_until, came, within_s=10, what=f"{count} more replies")
    return set(flow.codes[begin:])


FAULTS = ("refused", "silent", "slow", "read_only", "full", "loading", "killed")
ON_OUTAGE = ("local", "continue", "defer")


@pytest.mark.parametrize(
    ("fault", "on_outage"),
    [
        # each fault once in a quick run, with one of the settings
        pytest.param(fault, on_outage, marks=() if number % 3 == place % 3 else pytest.mark.full)
        for number, fault in enumerate(FAULTS)
        for place, on_outage in enumerate(ON_OUTAGE)
    ],
)
async def test_redis_is_ill_and_mail_goes_on(
    fault: str, on_outage: str, sink: Downstream, start_gateway: StartGateway
) -> None:
    """p99 of RCPT under 300 ms, no 5xx, the mode is kept, the gauge flips, normal within 5 s of the repair."""
    async with redis_that_falls_ill(fault) as (redis, url):
        # so many strangers that come from one address are a flood
        settings: Config = {"delay_s": 600, "max_new_per_hour": 0}
        overrides = config(url, on_outage=on_outage, settings=settings)
        gateway = await asyncio.to_thread(start_gateway, sink.address, overrides)
        async with traffic(gateway) as flow:
            assert await more(flow, 25) == {451}
            await redis.begin()
            await gauge_shows(gateway, 1)
            assert await more(flow, 60) == {CODES[on_outage]}
            await redis.end()
            await gauge_shows(gateway, 0)
            assert await more(flow, 25) == {451}
        took = sorted(flow.took)
        assert took[int(len(took) * 0.99)] < WORST_S, took[-8:]
        assert max(flow.codes) < 500
