"""The clients and the downstream of a measurement: the C programs load.c and sink.c, compiled when needed.

They are in C so that they are never what limits a fast system; both are the same for every system, and run on the
cores of whoever starts them.  `Sink.check` compares what the clients were told was accepted with what arrived.
"""

import json
import select
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

SOURCES = Path(__file__).parent


class CannotRun(Exception):  # noqa: N818 - a finding, told to people
    """Something that a measurement needs is missing or does not work; the text is for people."""


class CountsDiffer(CannotRun):
    """The downstream has not what the clients were promised."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What one load did, as its clients saw it.

    Latencies are from connecting to the reply to the dot; dot_*: from the dot to its reply.
    """

    accepted: int
    refused: int
    failed: int
    number_sum: int
    content_bytes: int
    wall_s: float
    cpu_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    dot_p50_ms: float
    dot_p95_ms: float
    dot_p99_ms: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """What the sink got since it was last asked; `content_bytes` without what the system prepended."""

    connections: int
    commands: int
    messages: int
    damaged: int
    number_sum: int
    content_bytes: int
    cpu_s: float


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compile_programs(directory: Path) -> None:
    """Make `load` and `sink` in `directory`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CannotRun("the load generator needs a C compiler: apt-get install gcc libc6-dev")
    for name in ("load", "sink"):
        command = [compiler, "-O2", "-o", str(directory / name), str(SOURCES / f"{name}.c"), "-lm"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise CannotRun(f"{name}.c does not compile: {built.stderr.strip()}")


class Sink:
    """The downstream.  A context manager.

    log: gets a line with the number of each message, and is complete when the sink was stopped.
    """

    def __init__(self, programs: Path, log: Path | None = None, port: int = 0) -> None:
        self.port = port or free_port()
        self._process = subprocess.Popen(
            [str(programs / "sink"), str(self.port), *([str(log)] if log else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if _stream(self._process.stdout).readline() != "ready\n":
            self.stop()
            raise CannotRun("the sink does not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def read(self) -> Arrived:
        """What arrived since the last call."""
        requests = _stream(self._process.stdin)
        requests.write("\n")
        requests.flush()
        return Arrived(**json.loads(_stream(self._process.stdout).readline()))

    def check(self, sent: Sent) -> Arrived:
        """`read()`; raises CountsDiffer unless all were accepted and just these arrived, each once and whole."""
        arrived = self.read()
        if sent.refused or sent.failed:
            raise CountsDiffer(
                f"{sent.accepted} messages were accepted, {sent.refused} refused, {sent.failed} failed"
            )
        if arrived.damaged or arrived.messages != sent.accepted:
            raise CountsDiffer(
                f"{sent.accepted} messages were accepted, {arrived.messages} arrived, {arrived.damaged} of them damaged"
            )
        if (arrived.number_sum, arrived.content_bytes) != (sent.number_sum, sent.content_bytes):
            raise CountsDiffer(
                f"the {sent.accepted} messages that arrived are not those that were accepted:"
                f" {arrived.content_bytes} bytes instead of {sent.content_bytes},"
                f" sum of numbers {arrived.number_sum} instead of {sent.number_sum}"
            )
        return arrived

    def stop(self) -> None:
        """The end of its input ends it."""
        _stream(self._process.stdin).close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _stream(self._process.stdout).close()


@dataclass(frozen=True, slots=True)
class CorpusFiles:
    """Messages as they go over the wire, and where each begins and whose it is; load.c says how that is written."""

    index: Path
    data: Path


@dataclass(frozen=True, slots=True)
class Load:
    """`messages` messages of `size_bytes`, one per connection, to `port`.

    recipients: how many addresses they go to in turn; 0: each to an address of its own.
    first: the number of the first message; never use a number twice where recipients must be new.
    corpus: messages to send in turn instead of those that are made up; size and recipients are theirs.
    address: of the server.
    rate: messages a second that begin on average; 0: as many as the connections carry.
    log: gets a line for each attempt, as load.c says.
    is_persistent: who is not accepted comes again until he is.
    """

    programs: Path
    port: int
    size_bytes: int
    messages: int
    connections: int = 20
    first: int = 0
    recipients: int = 100
    corpus: CorpusFiles | None = None
    address: str = "127.0.0.1"
    rate: float = 0.0
    log: Path | None = None
    is_persistent: bool = False

    def run(self) -> Sent:
        with self.start() as process:
            return sent_by(process)

    def hold(self) -> "Held":
        """All connections at once send all but the final dot, and wait; `connections` does not matter."""
        return Held(self.start("-H"), self.messages)

    def start(self, *more: str) -> subprocess.Popen[str]:
        """The running load; `sent_by` waits for its end.  `more`: what load.c understands besides."""
        options: dict[str, object] = {
            "-a": self.address,
            "-p": self.port,
            "-s": self.size_bytes,
            "-c": min(self.connections, self.messages),
            "-n": self.messages,
            "-f": self.first,
            "-r": self.recipients,
        }
        if self.corpus:
            options |= {"-i": self.corpus.index, "-d": self.corpus.data}
        if self.rate:
            options["-R"] = self.rate
        if self.log:
            options["-l"] = self.log
        words = [word for option, value in options.items() for word in (option, str(value))]
        return subprocess.Popen(
            [str(self.programs / "load"), *words, *(["-A"] if self.is_persistent else []), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


class Held:
    """Clients that wait before their final dot.  A context manager; leaving it ends them."""

    def __init__(self, process: subprocess.Popen[str], expected: int) -> None:
        self._process = process
        self._expected = expected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()  # nothing, once it has ended
        self._process.wait()

    def is_written(self, wait_s: float = 0.05) -> bool:
        """Whether every client has handed over all but its dot; waits a little.  CannotRun when some could not."""
        output = _stream(self._process.stdout)
        if not select.select([output], [], [], wait_s)[0]:
            return False
        line = output.readline()
        if line != f"held {self._expected}\n":
            raise CannotRun(
                f"asked to hold {self._expected} messages, the load says: {line.strip() or 'nothing'}"
            )
        return True

    def release(self) -> Sent:
        """Send the dots, and wait for the replies."""
        return sent_by(self._process, "\n")


def sent_by(process: subprocess.Popen[str], words: str = "") -> Sent:
    """What a load did, when it has ended; `words` go to its standard input."""
    output, _ = process.communicate(words)
    if process.returncode:
        raise CannotRun(f"the load ended with {process.returncode}")
    return Sent(**json.loads(output))


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
