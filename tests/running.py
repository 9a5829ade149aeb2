"""A supervisor with fake workers (fake_worker.py) as a process of its own, for tests to start and to ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
WITHIN_S = 30


class Running:
    """A supervisor with fake workers."""

    def __init__(self, directory: Path, behaviour: str, workers: int, overrides: tuple[str, ...]) -> None:
        self._starts = directory / "starts"
        self._starts.mkdir()
        self.file = directory / "mxgate.toml"
        self._workers = workers
        self.configure()
        # Its own session, so that a signal to its group is not one to the tests.
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(FAKE_WORKER), behaviour, str(self.file), *overrides],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._events: list[dict[str, Any]] = []
        self.listen = self.admin = ""

    def configure(
        self,
        told: str = "mx",
        *,
        workers: int = 0,
        listen: tuple[str, ...] = ("127.0.0.1:0",),
        more: str = "",
    ) -> None:
        """Write its configuration; `told` is what workers that are started with it are to do (fake_worker.py)."""
        self.file.write_text(
            f"""
            {more}
            [server]
            hostname = "{told}.example.org"
            listen = {json.dumps(listen)}
            workers = {workers or self._workers}
            drain_timeout_s = 1
            spool_dir = "{self._starts}"
            [relay]
            domains = ["example.org"]
            routes = [{{ domains = ["*"], downstream = ["127.0.0.1:9"] }}]
            [admin]
            listen = "127.0.0.1:0"
            """
        )

    def reload(self) -> None:
        """SIGHUP, as a terminal or a service manager sends it."""
        self.process.send_signal(signal.SIGHUP)

    def wait_started(self) -> None:
        started = self.wait_log("gateway.started")
        (self.listen,) = started["listen"]
        self.admin = started["admin"]

    def wait_log(self, event: str) -> dict[str, Any]:
        """The first log line of this event that was not waited for yet."""
        assert self.process.stderr is not None
        while (found := self._pop(event)) is None:
            line = self.process.stderr.readline()
            assert line, f"no {event} in:\n{''.join(self.lines)}"
            self.lines.append(line)
            if line.startswith("{"):
                self._events.append(json.loads(line))
        return found

    def _pop(self, event: str) -> dict[str, Any] | None:
        for index, found in enumerate(self._events):
            if found["event"] == event:
                return self._events.pop(index)
        return None

    def wait_exit(self) -> int:
        """The exit code, when all its processes have gone: each holds standard error open."""
        assert self.process.stderr is not None
        self.lines += self.process.stderr
        assert not any("Exception ignored" in line for line in self.lines), "".join(self.lines)
        return self.process.wait(WITHIN_S)

    @contextmanager
    def connected(self) -> Iterator[tuple[socket.socket, int]]:
        """A connection to a worker, and its pid; 0 when it was turned away."""
        host, port = self.listen.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=WITHIN_S) as sock,
            sock.makefile("rb") as reader,
        ):
            greeting = reader.readline()
            yield sock, int(greeting) if greeting.strip().isdigit() else 0

    def greeted(self) -> int:
        """The pid of the worker that greeted a connection; 0 when none did."""
        try:
            with self.connected() as (_, pid):
                return pid
        except OSError:
            return 0

    def tell(self, word: bytes) -> int:
        """Give a worker its word; its pid."""
        with self.connected() as (sock, pid):
            sock.sendall(word + b"\n")
        return pid

    def ask(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a page; (0, None) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=WITHIN_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.load(exc)
        except OSError:
            return 0, None

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=WITHIN_S) as response:
            text = response.read().decode()
        return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}

    def wait_ready(self) -> dict[str, Any]:
        def is_ready() -> Any:
            status, body = self.ask("/readyz")
            return body if status == 200 else None

        body = wait_until(is_ready)
        assert isinstance(body, dict)
        return body


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


class Start:
    """The fixture `start`: starts supervisors, and leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.running: list[Running] = []

    def __call__(
        self, behaviour: str = "sound", *overrides: str, workers: int = 1, started: bool = True
    ) -> Running:
        running = Running(self._directory, behaviour, workers, overrides)
        self.running.append(running)
        if started:
            running.wait_started()
        return running


def starting(tmp_path: Path) -> Iterator[Start]:
    """The body of the fixture `start`."""
    start = Start(tmp_path)
    yield start
    for running in start.running:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        assert running.process.stderr is not None
        running.process.stderr.close()
