"""Chaos: everything around a gateway misbehaves at random, and what it promised is counted.

    Chaos(seed, seconds).run(gateway, world)

Honest clients bring messages, each with a name of its own; rude ones do what they should not. Meanwhile the
downstream, DNS and Redis fail, workers are killed and the configuration is loaded again, as a random generator
with a printed seed says. (The seed fixes what is done, the machine's scheduler when.) A run ends with everything well
again. `Record` is what the test holds against what the downstream has.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

import dns.exception
import dns.message
import dns.rcode
import dns.rrset

from tests.e2e.client import Client, Reply, stuff
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import Gateway
from tests.e2e.net import LOOPBACK, Address, wait_until
from tests.e2e.redis import RedisServer

# Senders with a strict DMARC policy: what DNS does not tell about them must not become a refusal for ever.
DOMAINS = tuple(f"d{number}.example.net" for number in range(8))
HONEST_CLIENTS, RUDE_CLIENTS = 6, 3
# A run with fewer messages that were accepted shows nothing.
WORTH = 20
_PATIENCE_S = 90
_NAME = re.compile(rb"^Subject: (chaos-\S+)\r?$", re.MULTILINE)
_OWN_REFUSAL = re.compile(r"5\.3\.9 As the test says at (mail|rcpt|data|eod)$")
# A reply that is no reply (LONG) leaves open whether the message was taken.
_FAULTS: dict[Step, tuple[Fault, ...]] = {
    Step.BANNER: (
        Fault.CLOSE,
        Fault.RST,
        Fault.HANG,
        Fault.CLOSING,
        Fault.PERMANENT,
        Fault.GARBAGE,
        Fault.SLOW,
    ),
    Step.EHLO: (
        Fault.CLOSE,
        Fault.RST,
        Fault.HANG,
        Fault.TRANSIENT,
        Fault.PERMANENT,
        Fault.GARBAGE,
        Fault.LONG,
    ),
    Step.MAIL: tuple(each for each in Fault if each is not Fault.REPLY_THEN_CLOSE),
    Step.RCPT: tuple(each for each in Fault if each is not Fault.REPLY_THEN_CLOSE),
    Step.DATA: tuple(each for each in Fault if each is not Fault.REPLY_THEN_CLOSE),
    Step.BODY: (Fault.CLOSE, Fault.RST, Fault.HANG, Fault.CLOSING, Fault.SLOW),
    Step.EOD: tuple(each for each in Fault if each is not Fault.LONG),
}


class ChaoticDownstream(Downstream):
    """One whose connections fail at random while `fault_rate` says so."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.fault_rate = 0.0
        super().__init__()

    def faults_of_a_connection(self) -> Mapping[Step, Fault]:
        if self._random.random() >= self.fault_rate:
            return {}
        step = self._random.choice([*Step])
        return {step: self._random.choice(_FAULTS[step])}


class DnsMood(Enum):
    """How the name server behaves."""

    WELL = auto()
    SILENT = auto()
    SERVFAIL = auto()
    GARBAGE = auto()
    FORGED = auto()  # a wrong id first, then the answer
    CUT = auto()  # TC, and nobody at the TCP port


class ChaoticDns:
    """A name server for DOMAINS: SPF for loopback, DMARC with p=reject; `mood` may be set at any time."""

    def __init__(self) -> None:
        self.mood = DnsMood.WELL
        self.records: dict[str, str] = {}  # further TXT records
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((LOOPBACK, 0))
        self.address: Address = (LOOPBACK, self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="chaotic-dns", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        # a datagram of no octets ends the thread
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)
        self._thread.join(timeout=5)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            for answer in self._answers(query):
                self._socket.sendto(answer, client)

    def _answers(self, wire: bytes) -> list[bytes]:
        mood = self.mood
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return []
        reply = dns.message.make_response(query)
        reply.flags |= 0x80  # RA
        match mood:
            case DnsMood.SILENT:
                return []
            case DnsMood.GARBAGE:
                return [wire[:2] + os.urandom(40), os.urandom(12)]
            case DnsMood.SERVFAIL:
                reply.set_rcode(dns.rcode.SERVFAIL)
                return [reply.to_wire()]
            case DnsMood.CUT:
                reply.flags |= 0x0200  # TC
                return [reply.to_wire()]
        name = query.question[0].name.to_text().rstrip(".").lower()
        self.asked.append(name)
        text = self.records.get(name) or _record(name)
        if text is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        elif query.question[0].rdtype == 16:  # TXT
            reply.answer.append(dns.rrset.from_text(query.question[0].name, 1, "IN", "TXT", f'"{text}"'))
        answer = reply.to_wire()
        return [bytes([answer[0] ^ 1]) + answer[1:], answer] if mood is DnsMood.FORGED else [answer]


def _record(name: str) -> str | None:
    """The TXT record of a name; "" for a name that has none."""
    if name in DOMAINS:
        return "v=spf1 ip4:127.0.0.0/8 -all"
    if name.removeprefix("_dmarc.") in DOMAINS:
        return "v=DMARC1; p=reject"
    return None


@dataclass
class Record:
    """What clients were told, by the name of the message."""

    accepted: list[str] = field(default_factory=list)
    deferred: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)  # name -> a 5yz reply
    broken: list[str] = field(default_factory=list)  # the connection ended before the answer
    done: Counter[str] = field(default_factory=Counter)  # what the director did

    def __str__(self) -> str:
        told = {"accepted": len(self.accepted), "broken": len(self.broken), "refused": len(self.refused)}
        return f"troubles {dict(self.done)}; answers {told | self.deferred}"

    def unfounded_refusals(self) -> dict[str, str]:
        """The 5yz replies that the downstream did not give to MAIL, RCPT, DATA or the dot."""
        return {name: reply for name, reply in self.refused.items() if not _OWN_REFUSAL.search(reply)}


class Chaos:
    """One run. `record` is complete when `run` has returned."""

    def __init__(
        self, seed: int, gateway: Gateway, sink: ChaoticDownstream, names: ChaoticDns, redis: RedisServer
    ) -> None:
        self.record = Record()
        self._seed = seed
        self._gateway = gateway
        self._sink = sink
        self._names = names
        self._redis = redis
        self._is_over = threading.Event()
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()
        self._defects: list[BaseException] = []

    def run(self, seconds: float) -> None:
        """Make trouble for so long, then repair everything; raises what a client or the director stumbled over."""
        threads = [
            threading.Thread(
                target=self._guarded, args=(play, random.Random(f"{self._seed}/{number}"), number)
            )
            for number, play in enumerate([self._honest] * HONEST_CLIENTS + [self._rude] * RUDE_CLIENTS)
        ]
        director = random.Random(f"{self._seed}/director")
        for thread in threads:
            thread.start()
        try:
            until = time.monotonic() + seconds
            while self._goes_on(until) and not self._defects:
                self._trouble(director)
        finally:
            self._repair()
            self._is_over.set()
            for thread in threads:
                thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
        if self._defects:
            raise self._defects[0]

    def _goes_on(self, until: float) -> bool:
        """On a slow machine a short time is not worth its name: then longer, but not without end."""
        now, record = time.monotonic(), self.record
        is_worth_it = len(record.accepted) >= WORTH and bool(record.deferred)
        return now < until or (not is_worth_it and now < until + _PATIENCE_S)

    def _guarded(
        self, play: Callable[[random.Random, int], None], chance: random.Random, number: int
    ) -> None:
        try:
            while not self._is_over.is_set():
                play(chance, number)
        except BaseException as exc:  # noqa: BLE001 - the test's thread raises it
            self._defects.append(exc)

    # --- the director ----------------------------------------------------------------------------------

    def _trouble(self, chance: random.Random) -> None:
        """One thing goes wrong for a while."""
        acts: list[Callable[[random.Random], None]] = [
            self._downstream_fails,
            self._downstream_fails,
            self._downstream_is_away,
            self._dns_fails,
            self._dns_fails,
            self._redis_hangs,
            self._redis_dies,
            self._worker_dies,
            self._reloads,
        ]
        act = chance.choice(acts)
        self.record.done[act.__name__.strip("_")] += 1
        act(chance)

    def _while(self, chance: random.Random) -> None:
        self._is_over.wait(chance.uniform(0.05, 0.8))

    def _downstream_fails(self, chance: random.Random) -> None:
        self._sink.fault_rate = chance.choice([0.2, 0.5, 1.0])
        self._while(chance)
        self._sink.fault_rate = chance.choice([0.0, 0.2])

    def _downstream_is_away(self, chance: random.Random) -> None:
        self._sink.down()
        self._while(chance)
        self._sink.up()

    def _dns_fails(self, chance: random.Random) -> None:
        self._names.mood = chance.choice([*DnsMood])
        self._while(chance)

    def _redis_hangs(self, chance: random.Random) -> None:
        with self._redis.frozen():
            self._while(chance)

    def _redis_dies(self, chance: random.Random) -> None:
        self._redis.kill()
        self._while(chance)
        self._redis.start()

    def _worker_dies(self, chance: random.Random) -> None:
        pids = self._gateway.worker_pids()
        if pids:
            with suppress(ProcessLookupError):  # an old one may end meanwhile
                os.kill(chance.choice(pids), signal.SIGKILL)

    def _reloads(self, chance: random.Random) -> None:
        self._gateway.process.send_signal(signal.SIGHUP)
        self._while(chance)

    def _repair(self) -> None:
        self._sink.fault_rate = 0.0
        self._names.mood = DnsMood.WELL

    # --- clients that keep to the rules ---------------------------------------------------------------

    def _honest(self, chance: random.Random, number: int) -> None:
        """A connection with one to three messages."""
        name = ""
        try:
            with self._gateway.connect(f"127.0.1.{number + 1}") as client:
                banner = client.read_reply()
                if banner.code != 220:
                    assert banner.code in (421, 451), banner
                    return
                assert client.command("EHLO client.example.net").code in (250, 421)
                for _ in range(chance.randint(1, 3)):
                    with self._lock:
                        name = f"chaos-{next(self._numbers)}"
                    if not self._told(name, self._bring(client, name, chance)):
                        return
                    name = ""
        except OSError:
            if name:
                self.record.broken.append(name)
            # a worker that was killed: its successor is a moment away
            self._is_over.wait(0.02)

    def _told(self, name: str, reply: Reply) -> bool:
        """Keep the answer; whether the connection goes on."""
        if reply.code < 300:
            self.record.accepted.append(name)
        elif reply.code < 500:
            self.record.deferred[f"{reply.code} {reply.enhanced}"] += 1
        else:
            self.record.refused[name] = str(reply)
        return reply.code != 421

    def _bring(self, client: Client, name: str, chance: random.Random) -> Reply:
        domain = chance.choice(DOMAINS)
        sender = f"sender@{domain}"
        rcpts = [f"user-{chance.randrange(5)}@example.org" for _ in range(chance.choice([1, 1, 1, 3]))]
        size = chance.choice([10, 2000, 30_000, 300_000])
        content = f"From: <{sender}>\r\nSubject: {name}\r\n\r\n".encode() + b".0123456789abcdef\r\n" * (
            size // 19
        )
        for reply in client.envelope(sender, rcpts):
            if reply.code != 250:
                self._reset(client, reply)
                return reply
        if chance.random() < 0.3:
            cut = chance.randrange(len(content))
            reply = client.bdat(content[:cut])
            return client.bdat(content[cut:], last=True) if reply.code == 250 else self._reset(client, reply)
        begin = client.command("DATA")
        if begin.code != 354:
            return self._reset(client, begin)
        wire = stuff(content) + b".\r\n"
        cut = chance.randrange(len(wire))
        client.send(wire[:cut])
        if chance.random() < 0.2:
            self._is_over.wait(chance.uniform(0, 0.3))
        client.send(wire[cut:])
        return client.read_reply()

    @staticmethod
    def _reset(client: Client, reply: Reply) -> Reply:
        if reply.code != 421:
            client.command("RSET")
        return reply

    # --- clients that do not --------------------------------------------------------------------------

    def _rude(self, chance: random.Random, number: int) -> None:
        """One connection that ends badly."""
        dialogue = (
            b"EHLO rude.example.net\r\nMAIL FROM:<rude@d1.example.net>\r\nRCPT TO:<user-1@example.org>\r\nDATA\r\n"
            b"From: <rude@d1.example.net>\r\nSubject: rude\r\n\r\n" + b"x" * 50 + b"\r\n.\r\nQUIT\r\n"
        )
        with ExitStack() as cleanup, suppress(OSError):
            client = cleanup.enter_context(self._gateway.connect(f"127.0.2.{number + 1}"))
            match chance.randrange(7):
                case 0:  # gone at any octet
                    client.send(dialogue[: chance.randrange(len(dialogue))])
                case 1:  # the same, without a good-bye
                    client.send(dialogue[: chance.randrange(len(dialogue))])
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                case 2:
                    client.send(chance.randbytes(chance.randrange(5000)))
                case 3:  # errors only
                    client.send(b"NONSENSE\r\n" * 200)
                    client.sock.recv(65536)
                case 4:  # never reads
                    client.send(b"NOOP\r\n" * 500)
                    self._is_over.wait(0.3)
                case 5:  # a look-alike of the end, and a second message behind it
                    client.hello()
                    client.envelope("rude@d1.example.net", ["user-1@example.org"])
                    client.command("DATA")
                    client.send(b"Subject: rude\r\n\r\n\n.\nMAIL FROM:<smuggled@d1.example.net>\r\n.\r\n")
                    client.read_reply()
                case _:  # says nothing
                    self._is_over.wait(chance.uniform(0, 0.5))


def arrived(messages: Sequence[object]) -> Counter[str]:
    """How often each message is there, by its name."""
    found = (_NAME.search(each.content) for each in messages)  # type: ignore[attr-defined]
    return Counter(match[1].decode() for match in found if match)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int) -> int:
    """How much of a process is in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_for_calm(gateway: Gateway, workers: int) -> None:
    """Everything that was under way has ended: no connection is open, the number of workers is right."""
    wait_until(lambda: len(gateway.worker_pids()) == workers, within_s=60, what="old workers have ended")
    wait_until(lambda: gateway.admin_status("/readyz") == 200, within_s=60, what="all workers are ready")
    wait_until(
        lambda: gateway.metric("mxgate_open_connections") == 0, within_s=60, what="every connection has ended"
    )
