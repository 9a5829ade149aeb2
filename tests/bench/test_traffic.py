"""The benchmarks' clients and downstream, against each other and against servers that lie."""

import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest

from bench.corpus import make_corpus
from bench.systems import AIOSMTPD, Starter
from bench.traffic import CannotRun, CorpusFiles, CountsDiffer, Load, Sink, compile_programs, sent_by

pytestmark = pytest.mark.e2e


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


def test_a_corpus_is_sent_in_turn_and_written_down_on_both_sides(programs: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, domains=2, messages=3, size_bytes=2048)
    with Sink(programs, tmp_path / "stored") as sink:
        load = Load(
            programs, sink.port, 0, 7, 3, 10, corpus=corpus.files, rate=500.0, log=tmp_path / "attempts"
        )
        assert sink.check(load.run()).messages == 7
    attempts = [line.split()[:2] for line in (tmp_path / "attempts").read_text().splitlines()]
    assert sorted(attempts) == [[str(number), "250"] for number in range(10, 17)]
    assert sorted((tmp_path / "stored").read_text().split()) == [number for number, _ in sorted(attempts)]


def test_the_messages_of_a_corpus_are_signed(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, domains=2, messages=3, size_bytes=2048)
    records = dict(line.split(" ", 1) for line in corpus.zone.splitlines())
    data = corpus.files.data.read_bytes()
    for line in corpus.files.index.read_text().splitlines():
        offset, length = map(int, line.split()[:2])
        wire = data[offset : offset + length]
        assert wire.endswith(b"\r\n.\r\n")
        assert 1900 < length < 2500
        message = wire.removesuffix(b".\r\n").replace(b"\r\n..", b"\r\n.")
        assert dkim.verify(message, dnsfunc=lambda name, **_: text_of(records[name.decode()]))


def text_of(record: str) -> bytes:
    """The strings of a TXT record, joined."""
    return "".join(record.split('"')[1::2]).encode()


def test_a_corpus_that_cannot_be_read_is_named(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_text("0 100 mx.example.org a@example.org b@example.org 127.0.1.1\n")
    (tmp_path / "x.dat").write_bytes(b"short")
    load = Load(programs, 1, 0, 1, corpus=CorpusFiles(tmp_path / "x.idx", tmp_path / "x.dat"))
    with pytest.raises(CannotRun, match="ended with 1"):
        load.run()


class Deferring(socketserver.StreamRequestHandler):
    """Defers every second connection, with all that comes on it."""

    connections = 0

    def handle(self) -> None:
        Deferring.connections += 1
        is_deferring = Deferring.connections % 2
        self.wfile.write(b"220 mx.example.org\r\n")
        for line in self.rfile:
            match line[:4].upper():
                case b"MAIL" if is_deferring:
                    self.wfile.write(b"451 4.3.0 Later\r\n")
                case b"DATA":
                    self.wfile.write(b"354 Go\r\n")
                    while self.rfile.readline() != b".\r\n":
                        pass
                    self.wfile.write(b"250 Ok\r\n")
                case b"QUIT":
                    self.wfile.write(b"221 Bye\r\n")
                case _:
                    self.wfile.write(b"250 Ok\r\n")


def test_who_is_deferred_comes_again(programs: Path, tmp_path: Path) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Deferring) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        log = tmp_path / "attempts"
        port = int(server.server_address[1])
        sent = Load(programs, port, 2048, messages=4, connections=1, log=log, is_persistent=True).run()
        server.shutdown()
        serving.join()
    assert (sent.accepted, sent.refused) == (4, 4)
    ends = [line.split()[:2] for line in log.read_text().splitlines()]
    assert dict(ends) == dict.fromkeys("0123", "250")  # the last of each
    assert sum(word == "451" for _, word in ends) == 4


def test_a_paced_load_waits_for_a_free_connection_without_spinning(programs: Path, sink: Sink) -> None:
    """One connection that takes its time, and messages due all the while: the clients' CPU stays small."""

    class Slow(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            go.wait(20)  # nobody is greeted before

    go = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        port = int(server.server_address[1])
        with Load(programs, port, 2048, messages=20, connections=1, rate=1000.0).start() as process:
            threading.Timer(1.0, go.set).start()
            sent = sent_by(process)
        server.shutdown()
        serving.join()
    assert (sent.accepted, sent.failed) == (0, 20)
    assert sent.cpu_s < 0.3
