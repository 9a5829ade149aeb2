"""The supervisor: a thin parent that owns the sockets, forks the workers and keeps them running, drains and ends them.

Order at start: sockets are bound (what cannot be bound is said before anything else happens), workers are forked while
this process has neither a loop nor a thread, then the loop and the admin port begin. A worker is forked later only
while the loop stands still, and the child never touches the loop.

SIGHUP loads the configuration again: workers of a new generation start on the same sockets, and when all of them are
ready the old ones accept nothing more and end with their sessions. Whatever goes wrong before that leaves the old
ones as they are. Requests that come meanwhile are one more reload.

SIGTERM and SIGINT drain: nothing more is accepted, workers end what is under way, exit code 0. A second one ends at
once, exit code 1. A worker ends when its channel does, so none outlives the supervisor; one that says nothing for
30 s is killed and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from gateway import __version__
from gateway.activation import activated
from gateway.adapters.log import take_over_library_logs
from gateway.app import log_of, run_worker
from gateway.blocked import Place, StackPipe
from gateway.changed_files import ChangedFiles
from gateway.channel import ChannelError, Message, MetricsPush, Places, State, open_channel
from gateway.config import Config, ConfigError, Problem, check_files, load
from gateway.connection_counts import ConnectionCounts, SharedCounts
from gateway.errors import GatewayError
from gateway.forking import SIGNALS, fork
from gateway.generation import Generation, worker_count
from gateway.listening import (
    EXIT_CONFIG,
    EXIT_FAILURE,
    Given,
    StartError,
    WorkerSockets,
    bind,
    close_politely,
    listen,
    name_of,
)
from gateway.notify import Notify
from gateway.overview import Overview
from gateway.privileges import become, forbid_core_dumps
from gateway.session import Role
from gateway.workers import START_S, Worker, Workers

EXIT_OK = 0

# At once: those of two generations, and old ones that still end their sessions.
_MIN_COLUMNS = 64
_COLUMNS_PER_WORKER = 4
# A worker that died is restarted at once, then after 0.5 s, doubling; one that lived for a minute was sound.
_RESTART_FIRST_S = 0.5
_RESTART_MAX_S = 30.0
_SOUND_S = 60.0
# A worker that says nothing for this long is replaced. Policies may keep it busy, but not for as long as that.
_STUCK_S = 30.0
# One that says nothing for this long is asked where it is.
_BLOCKED_S = 5.0
_TICK_S = 1.0
# Sessions of a retired worker go on for this long before they are told to come again, or until the next reload.
_PATIENCE_S = 30.0
# For workers to say that they accept nothing more.
_LET_GO_S = 1.0
# Beyond server.drain_timeout_s, for a worker to stop its policies and exit.
_DRAIN_GRACE_S = 10.0
# After a second signal, for a worker to end by itself.
_GIVE_UP_S = 1.0
# The admin port waits for the first worker, so that loading aiohttp does not slow its start, but not for long.
_ADMIN_WAITS_S = 1.0


class RunWorker(Protocol):
    """The body of a worker process; the result is its exit code."""

    def __call__(
        self,
        config: Config,
        sockets: WorkerSockets,
        channel: socket.socket,
        counts: Mapping[Role, ConnectionCounts],
        /,
    ) -> int: ...


class ReloadError(GatewayError):
    """The new workers cannot take over; the old ones go on."""


def run(
    config: Config,
    *,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    worker: RunWorker = run_worker,
) -> int:
    """Serve until a signal ends it; the exit code."""

    def load_again() -> Config:
        if config_path is None or not Path(config_path).is_file():
            raise ConfigError(
                [Problem("", f"{config_path or 'the configuration'} is no file to be read again")]
            )
        again = load(Path(config_path), environ=os.environ, overrides=overrides)
        check_files(again)
        return again

    try:
        token = _read_token(config.admin.token_file)
        workers = worker_count(config)
        with contextlib.ExitStack() as bound:
            sockets = activated(os.environ)
            listening = listen(config, workers, given=sockets.given)
            for sock, _ in listening.without(None):
                bound.enter_context(sock)
            admin = bound.enter_context(sockets.admin or bind(config.admin.listen))
            forbid_core_dumps()
            if config.server.user:
                become(config.server.user, config.server.group)
            first = Generation(1, config, listening, workers)
            supervisor = Supervisor(
                first, admin, worker, load_again, token=token, config_path=config_path, given=sockets.given
            )
            return supervisor.run()
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


class Supervisor:
    """The parent process, from the first fork to the end."""

    def __init__(
        self,
        first: Generation,
        admin: socket.socket,
        worker: RunWorker,
        load_again: Callable[[], Config],
        *,
        token: bytes,
        config_path: str | None,
        given: Given,
    ) -> None:
        self._current = first
        self._given = given
        self._next: Generation | None = None  # while its workers start
        self._last_number = first.number
        self._admin = admin
        self._run_worker = worker
        self._load = load_again
        self._token = token
        self._notify = Notify(os.environ)
        self._workers = Workers()
        self._overview = Overview(self._workers, first, config_path)
        self._log = log_of(first.config, on_loss=self._overview.lost_lines.inc)
        columns = max(_MIN_COLUMNS, _COLUMNS_PER_WORKER * first.workers)
        # apart, so that a flood of one role leaves room in the other; each worker has the same column in both
        self._counts = {role: SharedCounts(columns) for role in Role}
        self._open = dict(first.listening.without(None))  # every socket, and whether TLS comes first
        self._unconnected: list[Worker] = []
        self._connected: set[Worker] = set()
        self._has_forked = asyncio.Event()
        self._changed = asyncio.Event()  # a worker's state, or whether there is one
        self._is_ready = asyncio.Event()  # a worker has been ready once
        self._is_announced = False  # all were, and the service manager knows
        self._hung_up = asyncio.Event()
        self._config_path = config_path
        self._watched = ChangedFiles()
        self._watched.watch(self._files_of(first.config))
        self._start_failure = ""  # of a worker of the next generation
        self._deaths: dict[int, int] = {}  # in a row, by number
        self._to_fork: list[tuple[Generation, int]] = []
        self._exit_code: int | None = None  # None until it drains or gives up
        self._mask: set[signal.Signals] = set()

    def run(self) -> int:
        """Fork, serve, drain; the exit code."""
        # A signal waits until this process or the child has said what it means there.
        self._mask = set(map(signal.Signals, signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)))
        for number in range(1, self._current.workers + 1):
            self._fork(self._current, number)
        take_over_library_logs(self._log)
        self._loop = asyncio.new_event_loop()
        main = self._loop.create_task(self._main())
        main.add_done_callback(lambda _: self._loop.stop())
        while not main.done():
            self._loop.run_forever()
            self._fork_waiting()
        self._loop.close()
        return main.result()

    # --- processes: the loop stands still ------------------------------------------------------------------

    def _fork(self, generation: Generation, number: int) -> None:
        column = min(shared.take() for shared in self._counts.values())
        counts = {role: shared.of(column) for role, shared in self._counts.items()}
        sockets = generation.listening.of_worker(number)
        inherited = tuple(sock for own in sockets.values() for group in own for sock in group)

        stack = StackPipe()

        def body(channel: socket.socket) -> int:
            stack.offer()
            return self._run_worker(generation.config, sockets, channel, counts)

        try:
            pid, ours = fork(body, inherited=(*inherited, stack.theirs), mask=self._mask, log=self._log)
        except OSError:
            self._release(column)
            stack.close()
            raise
        finally:
            stack.theirs.close()
        worker = Worker(generation.number, number, pid, column, ours, stack, time.monotonic())
        self._workers.add(worker)
        self._overview.living.set(len(self._workers))
        self._unconnected.append(worker)
        self._has_forked.set()

    def _release(self, column: int) -> None:
        for shared in self._counts.values():
            shared.release(column)

    def _fork_waiting(self) -> None:
        # Garbage that owns descriptors must not live on in a child, where their numbers mean something else.
        gc.collect()
        while self._to_fork:
            generation, number = self._to_fork.pop(0)
            if generation not in (self._current, self._next):
                continue
            is_restart = generation is self._current
            try:
                self._fork(generation, number)
            except OSError as exc:
                self._log.error("worker.fork_failed", worker=number, error=exc)
                if is_restart:
                    self._restart_later(number)
                else:
                    self._fail_start(f"worker {number} cannot be forked: {exc.strerror}")
            else:
                if is_restart:
                    self._overview.restarts.inc()

    # --- the loop ------------------------------------------------------------------------------------------

    async def _main(self) -> int:
        loop = self._loop
        self._end: asyncio.Future[int] = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._on_stop, "SIGINT")
        loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        listening = self._current.listening
        self._log.info(
            "gateway.started",
            version=__version__,
            listen=listening.addresses(is_tls=False),
            listen_tls=listening.addresses(is_tls=True),
            submission=listening.addresses(Role.SUBMISSION, is_tls=False),
            submission_tls=listening.addresses(Role.SUBMISSION, is_tls=True),
            admin=str(name_of(self._admin)),
            workers=self._current.workers,
        )
        self._tick(time.monotonic())
        async with asyncio.TaskGroup() as self._group:
            self._reloading = self._group.create_task(self._serve_reloads())
            tasks = [self._group.create_task(self._connect()), self._group.create_task(self._serve_admin())]
            code = await self._end
            for task in (*tasks, self._reloading):
                task.cancel()
        self._close([*self._open])
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
                if worker.is_retired or self._exit_code is not None:
                    worker.drain(worker.patience_s)

    async def _serve_admin(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADMIN_WAITS_S):
                await self._is_ready.wait()
        # Slow to import, and workers must not carry it.
        from gateway.adapters.admin import serve_admin  # noqa: PLC0415

        close = await serve_admin(
            self._admin,
            self._overview,
            token=self._token,
            require_token=not self._current.config.admin.trust_loopback,
            log=self._log,
        )
        try:
            await self._end
        finally:
            await close()

    def _tick(self, expected: float) -> None:
        """Once a second: replace workers that say nothing any more, and look for changed files."""
        now = time.monotonic()
        # A supervisor that was stopped itself has heard nobody meanwhile.
        stopped_s = now - expected
        for worker in self._workers:
            if worker.heard_at is None:
                continue
            worker.heard_at += stopped_s
            silent_s = now - worker.heard_at
            if (culprit := worker.read_stack()) is not None:
                self._overview.blocked.labels(culprit.policy).inc()
                self._log.warning(
                    "worker.blocked",
                    worker=worker.number,
                    pid=worker.pid,
                    policy=culprit.policy,
                    stage=culprit.stage,
                    seconds=round(silent_s, 1),
                    frames=culprit.frames,
                )
            if silent_s > _STUCK_S:
                self._log.warning(
                    "worker.stuck",
                    worker=worker.number,
                    pid=worker.pid,
                    policy=worker.culprit.policy if worker.culprit else "",
                    seconds=round(silent_s, 1),
                )
                worker.heard_at = now
                worker.signal(signal.SIGKILL)
            elif silent_s > _BLOCKED_S and worker.asked_at is None:
                worker.ask_for_stack(now)
        if self._watched.have_changed():
            self._hung_up.set()
        self._notify.alive()
        self._loop.call_later(_TICK_S, self._tick, now + _TICK_S)

    # --- workers -------------------------------------------------------------------------------------------

    def _on_message(self, worker: Worker, message: Message) -> None:
        worker.heard(time.monotonic())
        match message:
            case State():
                worker.state = message
                self._changed.set()
                if not worker.not_ready():
                    self._is_ready.set()
                    self._announce()
            case Places():
                worker.places = tuple(Place(*each) for each in cast("list[Place]", message.places))
            case MetricsPush():
                self._overview.merged.update(worker.pid, message.families)
            case _:
                self._log.error("channel.misused", worker=worker.number, error=type(message).__name__)

    def _announce(self) -> None:
        if not self._is_announced and not self._overview.not_ready():
            self._is_announced = True
            self._notify.ready(self._summary())

    def _summary(self) -> str:
        return f"serving with generation {self._current.number} of {self._current.workers} workers"

    def _on_close(self, worker: Worker, error: ChannelError | None) -> None:
        # Not when the process is reaped: what it sent last may still be unread then.
        self._overview.merged.end(worker.pid)
        self._connected.discard(worker)
        if error is not None:
            self._log.error("channel.failed", worker=worker.number, pid=worker.pid, error=error)

    def _reap(self) -> None:
        for worker in self._workers:
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                self._workers.remove(worker)
                self._release(worker.column)
                worker.stack.close()
                self._overview.living.set(len(self._workers))
                self._changed.set()
                self._on_exit(worker, os.waitstatus_to_exitcode(status))

    def _on_exit(self, worker: Worker, code: int) -> None:
        if self._exit_code is not None:
            self._end_if_alone()
        elif code == EXIT_CONFIG and not self._is_ready.is_set():
            self._give_up(EXIT_CONFIG)  # the worker has said why
        elif self._next is not None and worker.generation == self._next.number:
            self._fail_start(f"worker {worker.number} ended with {code}; the lines before this one say why")
        elif worker.generation == self._current.number or code != EXIT_OK:
            self._log.error("worker.died", worker=worker.number, pid=worker.pid, code=code)
            if worker.generation == self._current.number:
                if time.monotonic() - worker.forked_at > _SOUND_S:
                    self._deaths.pop(worker.number, None)
                self._restart_later(worker.number)

    def _restart_later(self, number: int) -> None:
        deaths = self._deaths.get(number, 0)
        self._deaths[number] = deaths + 1
        self._loop.call_later(_restart_delay_s(deaths), self._restart, self._current, number)

    def _restart(self, generation: Generation, number: int) -> None:
        if self._exit_code is None and generation is self._current:
            self._to_fork.append((generation, number))
            self._loop.stop()  # run() forks, and goes on

    # --- reload --------------------------------------------------------------------------------------------

    async def _serve_reloads(self) -> None:
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            await self._reload()

    async def _reload(self) -> None:
        began = time.monotonic()
        self._log.info("reload.started")
        self._watched.note()
        self._notify.reloading()
        needs_restart: list[str] = []
        problems: list[str] = []
        try:
            config = self._load()
            needs_restart = self._needs_restart(config)
            await self._replace(config)
        except ConfigError as exc:
            problems = [*map(str, exc.problems)]
        except GatewayError as exc:
            problems = [str(exc)]
        except Exception:  # noqa: BLE001  # a defect of ours in a reload must not end the mail
            problems = [traceback.format_exc()]
        self._overview.last_reload = {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "ok": not problems,
            "problems": problems,
            "needs_restart": needs_restart,
        }
        status = self._summary()
        if problems:
            self._overview.reload_failed()
            self._log.error("reload.failed", problems=problems)
            # one line of what systemctl status shows
            status += f"; the last reload failed: {' '.join(problems[0].split())[:200]}"
        else:
            self._log.info(
                "reload.done",
                generation=self._current.number,
                workers=self._current.workers,
                needs_restart=needs_restart,
                duration_ms=round(1000 * (time.monotonic() - began), 1),
            )
        self._notify.ready(status)

    def _files_of(self, config: Config) -> Iterator[Path]:
        """What is looked at for `server.reload_on_change`."""
        if config.server.reload_on_change and self._config_path is not None:
            yield Path(self._config_path)
            sections = [*config.policy.values()]
            if config.submission.is_on:
                sections += config.submission.policy.values()
            yield from (each.file for each in sections if each.is_planned and each.file)

    def _needs_restart(self, config: Config) -> list[str]:
        """Keys that have changed and that only a restart brings into force. Raises StartError."""
        changed = {
            "admin.listen": config.admin.listen != self._current.config.admin.listen,
            "admin.trust_loopback": config.admin.trust_loopback != self._current.config.admin.trust_loopback,
            "admin.token_file": _read_token(config.admin.token_file) != self._token,
            "server.user": config.server.user != self._current.config.server.user,
            "server.group": config.server.group != self._current.config.server.group,
        }
        return [key for key, is_changed in changed.items() if is_changed]

    async def _replace(self, config: Config) -> None:
        """Workers with this configuration for those that serve. Raises GatewayError when there can be none."""
        current, workers = self._current, worker_count(config)
        if self._counts[Role.MX].free < workers:
            raise ReloadError("too many workers of earlier reloads still end their sessions; try again later")
        listening = listen(config, workers, current.listening, given=self._given)
        self._open.update(listening.without(current.listening))
        self._last_number += 1
        self._next = generation = Generation(self._last_number, config, listening, workers)
        self._start_failure = ""
        self._to_fork += [(generation, number) for number in range(1, workers + 1)]
        self._loop.stop()  # run() forks, and goes on
        try:
            await self._until_ready(generation)
        except ReloadError:
            self._next = None
            await self._retire(generation, in_favour_of=current)
            raise
        self._current, self._next = generation, None
        self._overview.in_force(generation)
        self._watched.watch(self._files_of(config))
        self._deaths.clear()
        if config.log != current.config.log or config.server.hostname != current.config.server.hostname:
            self._log = log_of(config, on_loss=self._overview.lost_lines.inc)
            take_over_library_logs(self._log)
        await self._retire(current, in_favour_of=generation)

    async def _until_ready(self, generation: Generation) -> None:
        try:
            async with asyncio.timeout(START_S):
                while self._workers.not_ready(generation.number, generation.workers):
                    if self._start_failure:
                        raise ReloadError(self._start_failure)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as exc:
            reasons = "; ".join(self._workers.not_ready(generation.number, generation.workers))
            raise ReloadError(f"the new workers are not ready after {START_S:g} s: {reasons}") from exc

    def _fail_start(self, reason: str) -> None:
        self._start_failure = reason
        self._changed.set()

    async def _retire(self, generation: Generation, *, in_favour_of: Generation) -> None:
        """Let its workers end with their sessions, and close its sockets that the other has not."""
        timeout_s = _PATIENCE_S + generation.config.server.drain_timeout_s + _DRAIN_GRACE_S
        retired = []
        for worker in self._workers:
            if worker.is_retired:
                worker.drain()  # so that there are never sessions of many generations
            elif worker.generation == generation.number:
                worker.is_retired = True
                retired.append(worker)
                worker.drain(_PATIENCE_S)
                if worker.state is None:  # it never began, and may never hear
                    self._kill([worker])
        self._loop.call_later(timeout_s, self._kill, retired)
        await self._let_go(
            [sock for sock, _ in generation.listening.without(in_favour_of.listening)], retired
        )

    async def _let_go(self, sockets: Iterable[socket.socket], workers: Iterable[Worker]) -> None:
        """Close sockets when the workers accept from them no more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LET_GO_S):
                while any(worker in self._workers and worker.is_listening for worker in workers):
                    self._changed.clear()
                    await self._changed.wait()
        self._close(sockets)

    def _close(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            if sock not in self._open:
                continue
            is_tls = self._open.pop(sock)
            if sock in self._given:
                sock.close()  # the service manager has it open, and its queue is for our successor
            else:
                close_politely(sock, is_tls=is_tls)

    # --- the end -------------------------------------------------------------------------------------------

    def _on_stop(self, name: str) -> None:
        if self._exit_code is not None:
            self._log.warning("drain.aborted", signal=name, workers=len(self._workers))
            self._give_up(EXIT_FAILURE)
            return
        self._log.info("drain.started", signal=name, workers=len(self._workers))
        self._notify.stopping()
        self._exit_code = EXIT_OK
        self._overview.is_draining = True
        self._to_fork.clear()
        self._reloading.cancel()
        workers = [*self._workers]
        for worker in workers:
            worker.drain()
        self._group.create_task(self._let_go([*self._open], workers))
        self._loop.call_later(
            self._current.config.server.drain_timeout_s + _DRAIN_GRACE_S, self._kill, workers
        )
        self._end_if_alone()

    def _give_up(self, code: int) -> None:
        self._exit_code = code
        self._overview.is_draining = True
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
            if worker.channel is not None:
                worker.channel.close()
        self._loop.call_later(_GIVE_UP_S, self._kill, [*self._workers])
        self._end_if_alone()

    def _kill(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            if worker in self._workers:
                self._log.warning("worker.killed", worker=worker.number, pid=worker.pid)
                worker.signal(signal.SIGKILL)

    def _end_if_alone(self) -> None:
        if not len(self._workers) and self._exit_code is not None and not self._end.done():
            self._end.set_result(self._exit_code)


def _restart_delay_s(deaths: int) -> float:
    """The pause after that many deaths in a row before this one."""
    if not deaths:
        return 0
    doubled = min(deaths - 1, 10)  # far beyond the maximum, and no overflow
    return min(_RESTART_FIRST_S * 2.0**doubled, _RESTART_MAX_S)
