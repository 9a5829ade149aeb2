"""A gateway of one supervisor and fake workers, as a program: `python fake_worker.py BEHAVIOUR FILE [KEY=VALUE...]`.

A fake worker greets each connection with its pid and obeys one word, `die`, `refuse`, `garble`, `sleep`,
`refuse-mail` or `lose-downstream`, or waits for the client to go. It drains as a worker should: it accepts nothing
more, and ends after its last connection.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from gateway import overview, supervisor, workers
from gateway.adapters.metrics import ProcessMetrics
from gateway.channel import (
    ChannelError,
    Drain,
    Message,
    MetricsPush,
    Request,
    Response,
    State,
    open_channel,
)
from gateway.config import Config, load
from gateway.connection_counts import ConnectionCounts
from gateway.decision import Decision, DecisionRing, DecisionsAnswer
from gateway.listening import WorkerSockets
from gateway.session import Envelope, Role, Session
from gateway.smtp import reply
from gateway.smtp.address import Domain, Mailbox
from gateway.verdict import Stage

Sockets = Sequence[socket.socket]


class FakeWorker:
    """One worker process; `behaviour` says what is wrong with it."""

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour
        # Before a loop of ours adds its own.
        self._facts = {
            "descriptors": len(list(Path("/dev/fd").iterdir()))
            - 1,  # without the one that reads the directory
            "ignored": [int(signal.getsignal(number) is signal.SIG_IGN) for number in (1, 2)],
            "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "has_aiohttp": "aiohttp" in sys.modules,
        }

    async def run(self, listening: Sockets, channel: socket.socket) -> int:
        self._listening = listening
        self._connections = 0
        self._ended = asyncio.Event()
        self._channel = await open_channel(channel, on_message=self._on_message, on_close=self._on_close)
        self._servers = [await asyncio.start_server(self._serve, sock=sock) for sock in listening]
        metrics = self._metrics = ProcessMetrics()
        metrics.counters("mxgate_fakes_total", "Fake workers that started").labels().inc()
        metrics.gauges("mxgate_fakes", "Fake workers").labels().set(1)
        self._is_downstream_up = True
        self._decided = DecisionRing()
        self._say_how_it_is()
        self._push()
        await self._ended.wait()
        return 0

    def _say_how_it_is(self) -> None:
        self._say(
            State(
                listening=True,
                draining=False,
                policies_started=self._behaviour != "never-ready",
                detail={"relay": {"is_up": self._is_downstream_up}},
            )
        )

    def _push(self) -> None:
        self._channel.send(MetricsPush(self._metrics.snapshot()))
        if self._behaviour != "falls-silent":
            asyncio.get_running_loop().call_later(1, self._push)

    def _say(self, state: State) -> None:
        self._channel.send(state)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        writer.write(f"{os.getpid()}\n".encode())
        match await reader.readline():
            case b"die\n":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"sleep\n":
                signal.pause()
            case b"refuse\n":
                os._exit(78)
            case b"lose-downstream\n":
                self._is_downstream_up = False
                self._say_how_it_is()
            case b"refuse-mail\n":
                self._decided.add(_refused())
            case b"garble\n":
                transport = self._channel._transport
                assert transport is not None
                transport.write(b"\xff\xff\xff\xff")
            case _:
                pass
        writer.close()
        self._connections -= 1
        if not self._servers:
            self._end_if_idle()

    def _on_message(self, message: Message) -> None:
        match message:
            case Drain() if self._behaviour != "never-drains":
                self._drain()
            case Request(name="status") if self._behaviour != "never-answers":
                self._channel.send(Response(message.id, dict(self._facts)))  # type: ignore[arg-type]  # JSON
            case Request(name="decisions", argument=dict(query)) if self._behaviour != "never-answers":
                answer = DecisionsAnswer(self._decided, query)
                while not answer.step():
                    pass
                self._channel.send(Response(message.id, answer.result))
            case _:
                pass

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        # asyncio forgets a connection that it accepted in the turn in which its server is closed: one turn more.
        for sock in self._listening:
            loop.remove_reader(sock)
        loop.call_soon(loop.call_soon, self._close_servers)

    def _close_servers(self) -> None:
        for server in self._servers:
            server.close()
        self._servers = []
        self._say(State(listening=False, draining=True, policies_started=True))
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._connections:
            self._ended.set()

    def _on_close(self, error: ChannelError | None) -> None:
        self._ended.set()


def run_worker(
    behaviour: str,
    config: Config,
    sockets: WorkerSockets,
    channel: socket.socket,
    counts: Mapping[Role, ConnectionCounts],
) -> int:
    earlier = _earlier_starts(config)
    # a configuration that was loaded again may ask for another behaviour
    told = config.server.hostname.removesuffix(".example.org")
    behaviour = behaviour if told == "mx" else told
    match behaviour:
        case "refuses":
            return 78
        case "raises-once" if earlier < 1:
            raise RuntimeError("as it was told")
        case "dies-twice" if earlier < 2:
            return 3
        case "ignores-all":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        case _:
            return asyncio.run(FakeWorker(behaviour).run(sockets[Role.MX].plain, channel))


def _refused() -> Decision:
    """A record whose number is its time in milliseconds."""
    now = time.time()
    session = Session(f"s{os.getpid()}", ip_address("192.0.2.7"), 1)
    mail_from = Mailbox("you", Domain("example.net"))
    return Decision(
        id=f"s{os.getpid()}-{now * 1000:.0f}",
        time=now,
        session=session,
        envelope=Envelope(mail_from),
        rcpts=(),
        action="rejected",
        stage=Stage.EOM,
        reply=reply.TOO_MANY_HOPS,
        policy="",
        reason="hops",
        duration_s=0.01,
    )


def _earlier_starts(config: Config) -> int:
    assert config.server.spool_dir is not None
    count = len(list(config.server.spool_dir.iterdir()))
    (config.server.spool_dir / str(count)).touch()
    return count


if __name__ == "__main__":
    behaviour, file, *overrides = sys.argv[1:]
    config = load(Path(file), environ={}, overrides=overrides)
    supervisor._DRAIN_GRACE_S = 0.2
    overview._DECISIONS_TIMEOUT_S = 0.5 if behaviour == "never-answers" else 60
    if behaviour == "falls-silent":
        workers._SILENCE_S = 0.5
    if behaviour == "impatient":
        supervisor.START_S = 0.5  # type: ignore[attr-defined]  # it is workers'
        supervisor._STUCK_S = 2
    sys.exit(
        supervisor.run(
            config,
            config_path=file,
            overrides=overrides,
            worker=lambda *given: run_worker(behaviour, *given),
        )
    )
