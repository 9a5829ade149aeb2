"""clamav: what clamd gets over the wire, what its answers mean, and what a clamd that misbehaves does to mail."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import Stage
from gateway.testing import Harness, Played, PolicyContract
from gateway.testing.mail import compose
from policies.clamav import (
    Clamav,
    ClamavSettings,
    ClamdError,
    OnFound,
    OnTooLarge,
    TooLargeError,
    signature_of,
)

OK = b"stream: OK\0"
FOUND = b"stream: Eicar-Signature FOUND\0"


class FakeClamd:
    """Takes streams and gives one answer to each; `streams` is what came. It runs in a thread of its own."""

    def __init__(self, answer: bytes = OK, *, early: bool = False) -> None:
        self.answer = answer
        self.early = early
        self.streams: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        # the thread that accepts would go on with a socket that is only closed
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._play, args=(connection,), daemon=True).start()

    def _play(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error), connection, connection.makefile("rb") as file:
            if file.read(10) != b"zINSTREAM\0":
                return
            octets = b""
            while not self.early and (size := struct.unpack(">I", file.read(4))[0]):
                octets += file.read(size)
            self.streams.append(octets)
            connection.sendall(self.answer)


@contextmanager
def clamd(answer: bytes = OK, *, early: bool = False) -> Iterator[FakeClamd]:
    fake = FakeClamd(answer, early=early)
    try:
        yield fake
    finally:
        fake.close()


SERVICE = FakeClamd()


class TestContract(PolicyContract):
    policy = Clamav
    settings = ClamavSettings(SERVICE.address)


def played(answer: bytes, *, message: bytes | None = None, early: bool = False, **settings: Any) -> Played:
    with (
        clamd(answer, early=early) as fake,
        Harness(Clamav, ClamavSettings(fake.address, **settings), may_fail=True) as harness,
    ):
        return harness.deliver(message)


def test_it_gets_the_octets_as_the_sender_meant_them() -> None:
    content = compose(body="a\r\n.dot\r\n" + "x" * 200_000 + "\r\n")
    with clamd() as fake, Harness(Clamav, ClamavSettings(fake.address)) as harness:
        assert harness.deliver(content).reply.code == 250
        assert fake.streams == [content]
        assert harness.metrics["mxgate_clamav_scans_total", "clean"] == 1


@pytest.mark.parametrize(
    ("on_found", "code"),
    [(OnFound.CONTINUE, 250), (OnFound.QUARANTINE, 250), (OnFound.DEFER, 451), (OnFound.REJECT, 550)],
)
def test_what_follows_is_the_operators_choice(on_found: OnFound, code: int) -> None:
    one = played(FOUND, on_found=on_found)
    assert one.reply.code == code
    assert one.verdict(Stage.EOM).reason == "clamav_found"
    assert (b"X-Mxgate-Quarantine" in (one.message or b"")) == (on_found is OnFound.QUARANTINE)
    evidence = one.verdict(Stage.EOM).evidence
    assert evidence is not None
    assert [*evidence.lines()] == ["clamd found Eicar-Signature"]


def test_by_default_it_is_refused_with_the_name_of_the_signature() -> None:
    assert str(played(FOUND).reply) == "550 5.7.1 The message carries malware: Eicar-Signature"
    assert str(played(b"stream: a\xff b FOUND\0").reply) == "550 5.7.1 The message carries malware: a_b"


def test_signatures_may_be_left_out_of_account() -> None:
    one = played(b"stream: Heuristics.Phishing.Email FOUND\0", ignore=("PUA.*", "Heuristics.*"))
    assert (one.reply.code, one.verdict(Stage.EOM).reason) == (250, "clamav_ignored")
    assert played(FOUND, ignore=("Heuristics.*",)).reply.code == 550


@pytest.mark.parametrize("on_too_large", OnTooLarge)
def test_a_message_that_is_too_large_for_it_or_for_clamd(on_too_large: OnTooLarge) -> None:
    said = b"INSTREAM size limit exceeded. ERROR\0"
    for one in (
        played(FOUND, max_message_bytes=10, on_too_large=on_too_large),
        played(said, on_too_large=on_too_large),
    ):
        assert one.reply.code == 250
        assert one.verdict(Stage.EOM).reason == "clamav_too_large"
        assert (b"X-Mxgate-Quarantine" in (one.message or b"")) == (on_too_large is OnTooLarge.QUARANTINE)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"stream: ",
        b"stream: OK and more\0",
        b"UNKNOWN COMMAND\0",
        b"stream: a\r\n250 2.0.0 Ok FOUND\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"stream: Can't open file ERROR\0",
        b"\xff" * 100_000,
        b"x" * 5_000_000,
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_what_is_no_answer_is_a_failure_and_the_mail_is_deferred(answer: bytes, early: bool) -> None:
    one = played(answer, early=early, message=compose(body="x" * 3_000_000 + "\r\n") if early else None)
    assert str(one.reply) == "451 4.3.0 Temporary trouble here, try again later"
    assert len(one.failures) == 1


def test_an_answer_before_the_end_of_the_message_counts() -> None:
    """Clamd may have seen enough; it answers, and reads on for a while or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def play() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(FOUND)
                while connection.recv(65_536):
                    pass

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        settings = ClamavSettings(f"127.0.0.1:{listening.getsockname()[1]}")
        with Harness(Clamav, settings) as harness:
            assert harness.deliver(compose(body="x" * 3_000_000 + "\r\n")).reply.code == 550
        thread.join(10)
        assert not thread.is_alive()


def test_each_address_of_a_name_is_tried() -> None:
    """Where localhost is ::1 too, nobody listens there."""
    with (
        clamd() as fake,
        Harness(Clamav, ClamavSettings(f"localhost:{fake.address.split(':')[1]}")) as harness,
    ):
        assert harness.deliver().verdict(Stage.EOM).reason == "clamav_clean"


def test_what_clamd_said_before_it_took_no_more_is_heard(tmp_path: Path) -> None:
    """It says that a stream is too large and closes, while we are still writing: no later attempt would pass either."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def play() -> None:
            for _ in range(20):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100_000)
                    connection.sendall(b"INSTREAM size limit exceeded. ERROR\0")

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        with Harness(Clamav, ClamavSettings(path)) as harness:
            content = compose(body="x" * 3_000_000 + "\r\n")
            reasons = {harness.deliver(content).verdict(Stage.EOM).reason for _ in range(20)}
        thread.join(10)
    assert reasons == {"clamav_too_large"}


def test_nobody_there_is_a_failure(tmp_path: Path) -> None:
    with clamd() as fake:
        gone = fake.address
    for where in (str(tmp_path / "none"), gone):
        with Harness(Clamav, ClamavSettings(where), may_fail=True) as harness:
            assert harness.deliver().reply.code == 451


def test_a_clamd_that_hangs_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clamav, "timeout_s", 0.2)

    async def check() -> None:
        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            left.set()
            writer.close()

        left = asyncio.Event()
        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        async with server:
            settings = ClamavSettings(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
            harness = Harness(Clamav, settings, may_fail=True)
            assert (await harness.play()).reply.code == 451
            async with asyncio.timeout(10):
                await left.wait()

    asyncio.run(check())


@given(st.binary(max_size=100) | st.binary(max_size=50).map(lambda name: b"stream: " + name + b" FOUND"))
def test_any_octets_are_a_signature_or_the_one_error(octets: bytes) -> None:
    try:
        found = signature_of(octets)
    except ClamdError:
        return
    assert found.isascii()
    assert found == "" or (found.isprintable() and " " not in found)


def test_its_errors() -> None:
    assert signature_of(b"stream: OK") == ""
    with pytest.raises(TooLargeError):
        signature_of(b"INSTREAM size limit exceeded. ERROR")
    for wrong in ("", "clamd.ctl", "host:", ":3310", "host:99999", "host:x"):
        with pytest.raises(ValueError, match="clamd"):
            ClamavSettings(wrong)
