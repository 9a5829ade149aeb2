"""The benchmarks' clients and downstream, against each other and against servers that lie."""

import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.systems import AIOSMTPD, Starter
from bench.traffic import CannotRun, CountsDiffer, Load, Sink, compile_programs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("programs")
    compile_programs(directory)
    return directory


@pytest.fixture
def sink(programs: Path) -> Iterator[Sink]:
    with Sink(programs) as running:
        yield running


@pytest.mark.parametrize("size_bytes", [1024, 2048, 20 * 1024, 1024 * 1024 + 1])
def test_what_is_sent_is_what_is_counted(programs: Path, sink: Sink, size_bytes: int) -> None:
    sent = Load(programs, sink.port, size_bytes, messages=30, connections=7, first=5).run()
    assert (sent.accepted, sent.refused, sent.failed) == (30, 0, 0)
    assert (sent.content_bytes, sent.number_sum) == (30 * size_bytes, sum(range(5, 35)))
    arrived = sink.check(sent)
    assert (arrived.messages, arrived.connections) == (30, 30)
    assert sink.read().messages == 0


def test_counts_without_what_a_server_prepends(programs: Path, sink: Sink, tmp_path: Path) -> None:
    starter = Starter(tmp_path, sink.port)
    with starter.start(AIOSMTPD) as forwarder:
        sent = Load(programs, forwarder.port, 20 * 1024, messages=20).run()
        assert sink.check(sent).messages == 20


def test_holds_before_the_final_dot(programs: Path, sink: Sink) -> None:
    with Load(programs, sink.port, 100_000, messages=5).hold() as held:
        while not held.is_written():
            pass
        assert sink.read().messages == 0
        sent = held.release()
    assert sink.check(sent).messages == 5


def test_a_lost_message_is_found(programs: Path, sink: Sink) -> None:
    sent = Load(programs, sink.port, 2048, messages=20).run()
    promised = replace(
        sent, accepted=21, number_sum=sent.number_sum + 20, content_bytes=sent.content_bytes + 2048
    )
    with pytest.raises(CountsDiffer, match="21 messages were accepted, 20 arrived"):
        sink.check(promised)


def test_a_changed_message_is_found(programs: Path, sink: Sink) -> None:
    sent = Load(programs, sink.port, 2048, messages=20).run()
    promised = replace(sent, content_bytes=sent.content_bytes + 1)
    with pytest.raises(CountsDiffer, match="bytes instead of"):
        sink.check(promised)


class Refusing(socketserver.StreamRequestHandler):
    """Refuses every recipient, without PIPELINING."""

    def handle(self) -> None:
        self.wfile.write(b"220 mx.example.org\r\n")
        replies = {
            b"EHLO": b"250 mx.example.org\r\n",
            b"RCPT": b"550 5.1.1 Nobody\r\n",
            b"QUIT": b"221 Bye\r\n",
        }
        for line in self.rfile:
            self.wfile.write(replies.get(line[:4].upper(), b"250 Ok\r\n"))


def test_refusals_are_no_success(programs: Path, sink: Sink) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refusing) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        sent = Load(programs, server.server_address[1], 2048, messages=10, connections=3).run()
        server.shutdown()
        serving.join()
    assert (sent.accepted, sent.refused, sent.failed) == (0, 10, 0)
    with pytest.raises(CountsDiffer, match="10 refused"):
        sink.check(sent)


def test_a_system_that_does_not_start_says_why(sink: Sink, tmp_path: Path) -> None:
    starter = Starter(tmp_path, sink.port, mxgate="sh -c 'echo no such setting; exit 78'")
    with pytest.raises(CannotRun, match=r"ended with 78.*no such setting"):
        starter.start("mxgate")


def test_the_command_line_names_the_systems() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "forward", "--systems", "qmail"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "mxgate, aiosmtpd, postfix-proxy" in done.stderr) == (2, True)
