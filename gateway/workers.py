"""The worker processes as the supervisor knows them: what each said last, and what all of them answer.

A generation is one configuration with the workers that were started for it. Those of the newest one serve; a worker
of an older one is retired: it accepts nothing more, and ends with its last session.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from gateway import blocked
from gateway.blocked import Culprit, Place, StackPipe
from gateway.channel import Channel, ChannelError, Drain, Json, State

# /livez: a worker says something each second; one that starts may first load slow policies.
_SILENCE_S = 10.0
START_S = 60.0


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process. `number` is its place, which the process that replaces it takes over."""

    generation: int
    number: int
    pid: int
    column: int  # of the counts that all workers share
    sock: socket.socket
    stack: StackPipe
    forked_at: float
    heard_at: float | None = None
    channel: Channel | None = None
    state: State | None = None
    places: tuple[Place, ...] = ()
    asked_at: float | None = None  # for its stack, since it was heard last
    culprit: Culprit | None = None  # likewise
    is_retired: bool = False
    patience_s: float = 0.0

    @property
    def is_listening(self) -> bool:
        """Whether it accepts connections, or is about to."""
        return self.state is None or self.state.listening

    def not_live(self) -> str:
        """Why nobody knows whether its loop turns; "" when it does."""
        now = time.monotonic()
        if self.heard_at is None:
            return f"nothing heard for {START_S:g} s" if now - self.forked_at > START_S else ""
        return f"nothing heard for {_SILENCE_S:g} s" if now - self.heard_at > _SILENCE_S else ""

    def not_ready(self) -> str:
        """Why it should get no mail; "" when it should."""
        if self.state is None or not self.state.policies_started:
            return "policies are not started"
        if self.state.draining:
            return "draining"
        return self.not_live() if self.state.listening else "not listening"

    def drain(self, patience_s: float = 0.0) -> None:
        """Tell it to accept nothing more, and for how long its sessions may go on."""
        self.patience_s = patience_s
        if self.channel is not None:  # otherwise as soon as there is one
            self.channel.send(Drain(patience_s))

    def heard(self, now: float) -> None:
        """It said something: its loop turns."""
        self.heard_at = now
        self.asked_at = self.culprit = None

    def ask_for_stack(self, now: float) -> None:
        """Make it write where it is."""
        self.stack.read()  # an answer that nobody waited for
        self.asked_at = now
        self.signal(blocked.SIGNAL)

    def read_stack(self) -> Culprit | None:
        """What keeps it busy, when it has answered and nobody was told yet."""
        if self.asked_at is None or self.culprit is not None or not (stack := self.stack.read()):
            return None
        self.culprit = blocked.culprit(stack, self.places)
        return self.culprit

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; it is not reaped yet, so its pid is its own."""
        os.kill(self.pid, number)

    async def ask(self, name: str, argument: Json, timeout_s: float) -> dict[str, Json]:
        """What it answers, by `name`, or an `error`."""
        answer: dict[str, Json] = {"worker": self.number, "pid": self.pid}
        if self.channel is None:
            return answer | {"error": "not connected"}
        try:
            return answer | {name: await self.channel.request(name, argument, timeout_s=timeout_s)}
        except ChannelError as exc:
            return answer | {"error": str(exc)}


class Workers:
    """All worker processes that live."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}  # by pid

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        """The older generations first; within one by number."""
        return iter(sorted(self._workers.values(), key=lambda worker: (worker.generation, worker.number)))

    def __contains__(self, worker: Worker) -> bool:
        return worker.pid in self._workers

    def add(self, worker: Worker) -> None:
        self._workers[worker.pid] = worker

    def remove(self, worker: Worker) -> None:
        del self._workers[worker.pid]

    def of(self, generation: int) -> dict[int, Worker]:
        """Those of a generation, by number."""
        return {worker.number: worker for worker in self if worker.generation == generation}

    def not_ready(self, generation: int, count: int) -> list[str]:
        """A reason for each of the `count` workers of a generation that is not there or not ready."""
        there = self.of(generation)
        return [
            f"worker {number}: {why}"
            for number in range(1, count + 1)
            if (why := there[number].not_ready() if number in there else "not running")
        ]

    def states(self, generation: int) -> list[dict[str, object]]:
        """What each worker of a generation said last."""
        return [
            {"worker": worker.number, "pid": worker.pid}
            | ({} if worker.state is None else asdict(worker.state))
            for worker in self.of(generation).values()
        ]

    async def ask_all(self, name: str, argument: Json, timeout_s: float) -> list[dict[str, Json]]:
        """What each worker answers, by `name`, or its `error`."""
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(worker.ask(name, argument, timeout_s)) for worker in self]
        return [task.result() for task in asked]
