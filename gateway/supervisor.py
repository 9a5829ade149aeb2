"""The supervisor: a thin parent that owns the sockets, forks the workers and keeps them running, drains and ends them.

Order at start: sockets are bound (what cannot be bound is said before anything else happens), workers are forked while
this process has neither a loop nor a thread, then the loop and the admin port begin. A worker is forked later only
while the loop stands still, and the child never touches the loop.

SIGTERM and SIGINT drain: nothing more is accepted, workers end what is under way, exit code 0. A second one ends at
once, exit code 1. A worker ends when its channel does, so none outlives the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import platform
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

from gateway import __version__
from gateway.adapters.log import open_log, take_over_library_logs
from gateway.adapters.metrics import MergedMetrics
from gateway.app import run_worker
from gateway.channel import (
    Channel,
    ChannelError,
    Drain,
    Json,
    Message,
    MetricsPush,
    State,
    channel_sockets,
    open_channel,
)
from gateway.config import Config
from gateway.config.values import HostPort
from gateway.decision import merge_decisions, parse_query
from gateway.errors import GatewayError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 78  # sysexits.h EX_CONFIG

# SECURITY.md section 1, 9.
_BACKLOG = 511
# /livez: a worker says something each second; one that starts may first load slow policies.
_SILENCE_S = 10.0
_START_S = 60.0
# A worker that died is restarted at once, then after 0.5 s, doubling; one that lived for a minute was sound.
_RESTART_FIRST_S = 0.5
_RESTART_MAX_S = 30.0
_SOUND_S = 60.0
# Beyond server.drain_timeout_s, for a worker to stop its policies and exit.
_DRAIN_GRACE_S = 10.0
# After a second signal, for a worker to end by itself.
_GIVE_UP_S = 1.0
_STATUS_TIMEOUT_S = 2.0
# Many records are serialised between mail and mail.
_DECISIONS_TIMEOUT_S = 5.0
# The admin port waits for the first worker, so that loading aiohttp does not slow its start, but not for long.
_ADMIN_WAITS_S = 1.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class RunWorker(Protocol):
    """The body of a worker process; the result is its exit code."""

    def __call__(
        self,
        config: Config,
        listening: Sequence[socket.socket],
        listening_tls: Sequence[socket.socket],
        channel: socket.socket,
        /,
    ) -> int: ...


class StartError(GatewayError):
    """It cannot start; the text is for the operator."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(
    config: Config,
    *,
    config_path: str | None = None,
    overrides: Sequence[str] = (),  # noqa: ARG001  # for SIGHUP, which is to load the configuration again
    worker: RunWorker = run_worker,
) -> int:
    """Serve until a signal ends it; the exit code."""
    try:
        token = _read_token(config.admin.token_file)
        with contextlib.ExitStack() as bound:
            sockets = Sockets(
                tuple(bound.enter_context(_bind(address)) for address in config.server.listen),
                tuple(bound.enter_context(_bind(address)) for address in config.server.listen_tls),
                bound.enter_context(_bind(config.admin.listen)),
            )
            return Supervisor(config, sockets, worker, token=token, config_path=config_path).run()
    except StartError as exc:
        sys.stderr.write(f"mxgate: {exc}\n")
        return exc.exit_code


def _read_token(file: Path | None) -> bytes:
    if file is None:
        return b""
    try:
        token = file.read_bytes().strip()
    except OSError as exc:
        raise StartError(f"admin.token_file {file} cannot be read: {exc.strerror}", EXIT_CONFIG) from exc
    if not token:
        raise StartError(f"admin.token_file {file} is empty", EXIT_CONFIG)
    return token


def _bind(address: HostPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        if sock is not None:
            sock.close()
        # The configuration may be right and the port be taken, or the right to use it be missing.
        is_wrong = exc.errno not in {errno.EADDRINUSE, errno.EACCES}
        code = EXIT_CONFIG if is_wrong else EXIT_FAILURE
        raise StartError(f"cannot listen on {address}: {exc.strerror}", code) from exc
    sock.setblocking(False)
    return sock


@dataclass(frozen=True, slots=True)
class Sockets:
    """The sockets that the supervisor owns."""

    listening: tuple[socket.socket, ...]
    listening_tls: tuple[socket.socket, ...]
    admin: socket.socket


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker process. `number` is its place, which the process that replaces it takes over."""

    number: int
    pid: int
    sock: socket.socket
    forked_at: float
    heard_at: float | None = None
    channel: Channel | None = None
    state: State | None = None

    def not_live(self) -> str:
        now = time.monotonic()
        if self.heard_at is None:
            return f"nothing heard for {_START_S:g} s" if now - self.forked_at > _START_S else ""
        return f"nothing heard for {_SILENCE_S:g} s" if now - self.heard_at > _SILENCE_S else ""

    def not_ready(self) -> str:
        if self.state is None or not self.state.policies_started:
            return "policies are not started"
        if self.state.draining:
            return "draining"
        return self.not_live() if self.state.listening else "not listening"


class Supervisor:
    """The parent process, from the first fork to the end; also what the admin port asks (adapters/admin)."""

    def __init__(
        self, config: Config, sockets: Sockets, worker: RunWorker, *, token: bytes, config_path: str | None
    ) -> None:
        self._config = config
        self._sockets = sockets
        self._run_worker = worker
        self._token = token
        self._config_path = config_path
        self._merged = MergedMetrics()
        own = self._merged.own
        lost = own.counters("mxgate_log_lines_lost_total", "Log lines that could not be written").labels()
        self._log = open_log(config.log.format, on_loss=lost.inc)
        self._living = own.gauges("mxgate_workers", "Worker processes that run").labels()
        self._restarts = own.counters(
            "mxgate_worker_restarts_total", "Workers that died and were replaced"
        ).labels()
        build = own.gauges("mxgate_build_info", "What runs; always 1", ("version", "python"))
        build.labels(__version__, platform.python_version()).set(1)
        started = own.gauges(
            "mxgate_start_time_seconds", "When the supervisor started, since the epoch"
        ).labels()
        started.set(time.time())

        count = config.server.workers
        self._numbers = range(1, 1 + (len(os.sched_getaffinity(0)) if count == "auto" else count))
        self._workers: dict[int, _Worker] = {}  # by number
        self._unconnected: list[_Worker] = []
        self._connected: set[_Worker] = set()
        self._has_forked = asyncio.Event()
        self._is_ready = asyncio.Event()  # a worker has been ready once
        self._deaths = dict.fromkeys(self._numbers, 0)  # in a row
        self._to_restart: list[int] = []
        self._exit_code: int | None = None  # None until it drains or gives up
        self._mask: set[signal.Signals] = set()

    def run(self) -> int:
        """Fork, serve, drain; the exit code."""
        # A signal waits until this process or the child has said what it means there.
        self._mask = set(map(signal.Signals, signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)))
        for number in self._numbers:
            self._fork(number)
        take_over_library_logs(self._log)
        self._loop = asyncio.new_event_loop()
        main = self._loop.create_task(self._main())
        main.add_done_callback(lambda _: self._loop.stop())
        while not main.done():
            self._loop.run_forever()
            self._fork_again()
        self._loop.close()
        return main.result()

    # --- processes: the loop stands still ------------------------------------------------------------------

    def _fork(self, number: int) -> None:
        ours, theirs = channel_sockets()
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_worker(theirs)
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        worker = self._workers[number] = _Worker(number, pid, ours, time.monotonic())
        self._living.set(len(self._workers))
        self._unconnected.append(worker)
        self._has_forked.set()

    def _fork_again(self) -> None:
        while self._to_restart:
            number = self._to_restart.pop()
            # Garbage that owns descriptors must not live on in the child, where their numbers mean something else.
            gc.collect()
            try:
                self._fork(number)
            except OSError as exc:
                self._log.error("worker.fork_failed", worker=number, error=exc)
                self._restart_later(number)
            else:
                self._restarts.inc()

    def _be_worker(self, channel: socket.socket) -> NoReturn:
        """The child. Nothing of the parent is closed or finalised here: all of it stays referenced until _exit."""
        code = EXIT_FAILURE
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            # What a terminal sends to the whole group is the supervisor's to act on.
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            sockets = self._sockets
            _close_all_but(channel, *sockets.listening, *sockets.listening_tls)
            gc.freeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._run_worker(self._config, sockets.listening, sockets.listening_tls, channel)
        except BaseException:  # noqa: BLE001  # the child must never return into the parent's frames
            self._log.error("worker.failed", error=traceback.format_exc())
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    # --- the loop ------------------------------------------------------------------------------------------

    async def _main(self) -> int:
        loop = self._loop
        self._end: asyncio.Future[int] = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._on_stop, "SIGINT")
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        sockets = self._sockets
        self._log.info(
            "gateway.started",
            version=__version__,
            listen=_addresses(sockets.listening),
            listen_tls=_addresses(sockets.listening_tls),
            admin=_addresses([sockets.admin])[0],
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._connect()), group.create_task(self._serve_admin())]
            code = await self._end
            for task in tasks:
                task.cancel()
        for worker in self._connected:
            if worker.channel is not None:
                worker.channel.close()
        self._log.info("gateway.ended", code=code)
        return code

    async def _connect(self) -> None:
        """Open the channel of each worker that was forked."""
        while True:
            await self._has_forked.wait()
            self._has_forked.clear()
            while self._unconnected:
                worker = self._unconnected.pop()
                worker.channel = await open_channel(
                    worker.sock,
                    on_message=partial(self._on_message, worker),
                    on_close=partial(self._on_close, worker),
                )
                self._connected.add(worker)
                if self._exit_code is not None:
                    worker.channel.send(Drain())

    async def _serve_admin(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADMIN_WAITS_S):
                await self._is_ready.wait()
        # Slow to import, and workers must not carry it.
        from gateway.adapters.admin import serve_admin  # noqa: PLC0415

        close = await serve_admin(self._sockets.admin, self, token=self._token)
        try:
            await self._end
        finally:
            await close()

    # --- workers -------------------------------------------------------------------------------------------

    def _on_message(self, worker: _Worker, message: Message) -> None:
        worker.heard_at = time.monotonic()
        match message:
            case State():
                worker.state = message
                if not worker.not_ready():
                    self._is_ready.set()
            case MetricsPush():
                self._merged.update(worker.pid, message.families)
            case _:
                self._log.error("channel.misused", worker=worker.number, error=type(message).__name__)

    def _on_close(self, worker: _Worker, error: ChannelError | None) -> None:
        # Not when the process is reaped: what it sent last may still be unread then.
        self._merged.end(worker.pid)
        self._connected.discard(worker)
        if error is not None:
            self._log.error("channel.failed", worker=worker.number, pid=worker.pid, error=error)

    def _reap(self) -> None:
        for worker in tuple(self._workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                del self._workers[worker.number]
                self._living.set(len(self._workers))
                self._on_exit(worker, os.waitstatus_to_exitcode(status))

    def _on_exit(self, worker: _Worker, code: int) -> None:
        if self._exit_code is not None:
            self._end_if_alone()
        elif code == EXIT_CONFIG and not self._is_ready.is_set():
            self._give_up(EXIT_CONFIG)  # the worker has said why
        else:
            self._log.error("worker.died", worker=worker.number, pid=worker.pid, code=code)
            if time.monotonic() - worker.forked_at > _SOUND_S:
                self._deaths[worker.number] = 0
            self._restart_later(worker.number)

    def _restart_later(self, number: int) -> None:
        self._loop.call_later(_restart_delay_s(self._deaths[number]), self._restart, number)
        self._deaths[number] += 1

    def _restart(self, number: int) -> None:
        if self._exit_code is None:
            self._to_restart.append(number)
            self._loop.stop()  # run() forks, and goes on

    # --- the end -------------------------------------------------------------------------------------------

    def _on_stop(self, name: str) -> None:
        if self._exit_code is not None:
            self._log.warning("drain.aborted", signal=name, workers=len(self._workers))
            self._give_up(EXIT_FAILURE)
            return
        self._log.info("drain.started", signal=name, workers=len(self._workers))
        self._exit_code = EXIT_OK
        self._to_restart.clear()
        for sock in (*self._sockets.listening, *self._sockets.listening_tls):
            sock.close()
        for worker in self._workers.values():
            if worker.channel is not None:
                worker.channel.send(Drain())
        self._loop.call_later(self._config.server.drain_timeout_s + _DRAIN_GRACE_S, self._kill)
        self._end_if_alone()

    def _give_up(self, code: int) -> None:
        self._exit_code = code
        for worker in self._workers.values():
            os.kill(worker.pid, signal.SIGTERM)
            if worker.channel is not None:
                worker.channel.close()
        self._loop.call_later(_GIVE_UP_S, self._kill)
        self._end_if_alone()

    def _kill(self) -> None:
        for worker in self._workers.values():
            self._log.warning("worker.killed", worker=worker.number, pid=worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    def _end_if_alone(self) -> None:
        if not self._workers and self._exit_code is not None and not self._end.done():
            self._end.set_result(self._exit_code)

    def _on_hangup(self) -> None:
        self._log.warning("reload.unsupported")

    # --- what the admin port asks --------------------------------------------------------------------------

    def not_live(self) -> tuple[str, ...]:
        """A worker whose loop does not turn."""
        return tuple(f"worker {w.number}: {why}" for w in self._workers.values() if (why := w.not_live()))

    def not_ready(self) -> tuple[str, ...]:
        """Draining, or a worker that is not there or not ready."""
        reasons = [] if self._exit_code is None else ["draining"]
        for number in self._numbers:
            worker = self._workers.get(number)
            if why := worker.not_ready() if worker else "not running":
                reasons.append(f"worker {number}: {why}")
        return tuple(reasons)

    def state(self) -> Mapping[str, object]:
        """How each worker said it is."""
        workers = [self._workers[number] for number in self._numbers if number in self._workers]
        return {
            "listening": any(worker.state is not None and worker.state.listening for worker in workers),
            "draining": self._exit_code is not None,
            "workers": [
                {"worker": worker.number, "pid": worker.pid}
                | ({} if worker.state is None else asdict(worker.state))
                for worker in workers
            ],
        }

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Of all processes."""
        return self._merged.render(accept)

    async def status(self) -> Mapping[str, object]:
        """What each worker answers now."""
        return {
            "version": __version__,
            "config_file": self._config_path,
            "draining": self._exit_code is not None,
            "workers": await self._ask_all("status", None, _STATUS_TIMEOUT_S),
        }

    async def decisions(self, query: Mapping[str, str]) -> Mapping[str, object]:
        """The decision records of all workers, the newest first; a worker that did not answer stands in `errors`."""
        _, limit = parse_query(query)
        answers = await self._ask_all("decisions", dict(query), _DECISIONS_TIMEOUT_S)
        return merge_decisions(answers, limit)

    async def _ask_all(self, name: str, argument: Json, timeout_s: float) -> list[dict[str, Json]]:
        """What each worker answers, by `name`, or its `error`."""
        workers = [self._workers[number] for number in self._numbers if number in self._workers]
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(_ask(worker, name, argument, timeout_s)) for worker in workers]
        return [task.result() for task in asked]


async def _ask(worker: _Worker, name: str, argument: Json, timeout_s: float) -> dict[str, Json]:
    answer: dict[str, Json] = {"worker": worker.number, "pid": worker.pid}
    if worker.channel is None:
        return answer | {"error": "not connected"}
    try:
        return answer | {name: await worker.channel.request(name, argument, timeout_s=timeout_s)}
    except ChannelError as exc:
        return answer | {"error": str(exc)}


def _restart_delay_s(deaths: int) -> float:
    """The pause after that many deaths in a row before this one."""
    if not deaths:
        return 0
    doubled = min(deaths - 1, 10)  # far beyond the maximum, and no overflow
    return min(_RESTART_FIRST_S * 2.0**doubled, _RESTART_MAX_S)


def _addresses(sockets: Sequence[socket.socket]) -> list[str]:
    return [str(HostPort(*sock.getsockname()[:2])) for sock in sockets]


def _close_all_but(*sockets: socket.socket) -> None:
    kept = {0, 1, 2, *(sock.fileno() for sock in sockets)}
    for name in os.listdir("/dev/fd"):  # noqa: PTH208  # iterdir() may read on while descriptors are closed
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that read the directory
                os.close(int(name))
