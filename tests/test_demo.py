"""`mxgate demo`: what it prints is true, mail goes through it unchanged, and nothing of it is left behind."""

from __future__ import annotations

import json
import mailbox
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiosmtpd.smtp import Envelope

from gateway import demo
from gateway.config import check_files, load
from gateway.demo import mta
from tests.e2e.gateway import COMMAND, is_running, run_mxgate
from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, free_port, wait_until

SENDER = "sender@client.example.net"
# With what a server might be tempted to change: dots, a long line, 8-bit text, blanks at the end of a line.
CONTENT = (
    b"From: sender@client.example.net\r\nSubject: demo\r\n\r\n.\r\n..\r\nlong "
    + b"x" * 5000
    + b"\r\n"
    + "Grüße \r\n".encode()
)
START = "import sys; from pathlib import Path; from gateway import demo; "
START_S = 15
STOP_S = 15


# --- the MTA -----------------------------------------------------------------------------------------


@pytest.fixture
def maildir(tmp_path: Path) -> Path:
    for name in ("tmp", "new", "cur"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_stores_every_octet_where_a_mail_reader_finds_it(maildir: Path) -> None:
    names = [mta.store(maildir, CONTENT), mta.store(maildir, b"Subject: other\r\n\r\n")]
    assert (maildir / "new" / names[0]).read_bytes() == CONTENT
    assert sorted(str(message["subject"]) for message in mailbox.Maildir(maildir)) == ["demo", "other"]
    assert not [*(maildir / "tmp").iterdir()]


def test_a_message_that_is_not_on_the_disk_is_not_there(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        mta.store(maildir, CONTENT)
    assert not [*(maildir / "new").iterdir(), *(maildir / "tmp").iterdir()]


async def answer_rcpt(address: str) -> str:
    """What the MTA says, and that it does what it says."""
    envelope = Envelope()
    reply = await mta.Downstream(Path()).handle_RCPT(None, None, envelope, address, [])
    assert envelope.rcpt_tos == ([address] if reply.startswith("250") else [])
    return reply


@pytest.mark.parametrize("address", ["ann@demo.test", "ANN@Demo.Test", "postmaster@demo.test", "postmaster"])
async def test_the_mta_takes_everybody_of_its_domain(address: str) -> None:
    assert (await answer_rcpt(address)).startswith("250 ")


@pytest.mark.parametrize(
    ("address", "reply"),
    [("nobody@demo.test", "550 5.1.1 "), ("Nobody@DEMO.test", "550 5.1.1 "), ("a@example.org", "550 5.7.1 ")],
)
async def test_the_mta_refuses_who_does_not_exist_and_what_is_not_its_own(address: str, reply: str) -> None:
    assert (await answer_rcpt(address)).startswith(reply)


async def test_the_mta_defers_what_it_cannot_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    envelope = Envelope()
    envelope.content = CONTENT
    reply = await mta.Downstream(tmp_path / "missing").handle_DATA(None, None, envelope)
    assert reply.startswith("452 4.3.1 ")
    assert "missing" in capsys.readouterr().err


async def test_the_mta_never_refuses_for_good_because_of_its_own_trouble() -> None:
    assert (await mta.Downstream(Path()).handle_exception(ValueError("x"))).startswith("451 ")


# --- the whole ---------------------------------------------------------------------------------------


class Running:
    """A demo on free ports, in a session of its own: a signal to its group is what a terminal does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = demo.Ports(*(free_port() for _ in range(4)))
        self._output = directory.with_suffix(".out")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"{START}sys.exit(demo.run(Path({str(directory)!r}), demo.{self.ports}))",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pids: list[int] = []

    def wait_ready(self) -> None:
        wait_until(self._is_ready, within_s=START_S, what="the demo is ready")
        ready = json.loads(self.page("/readyz"))
        self.pids = [self.process.pid, self.mta, *(worker["pid"] for worker in ready["workers"])]
        assert all(map(is_running, self.pids))

    def greylist(self, *arguments: str) -> str:
        """What `mxgate greylist` says on the demo's store."""
        done = run_mxgate("--config", str(self.directory / "mxgate.toml"), "greylist", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.output()
        try:
            return json.loads(self.page("/readyz"))["ready"] is True
        except OSError:
            return False

    @property
    def mta(self) -> int:
        """The pid that it printed."""
        (pid,) = re.findall(r"process (\d+);", self.output())
        return int(pid)

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.ports.admin}{path}", timeout=5) as response:
            return str(response.read(), "utf-8")

    def output(self) -> str:
        return self._output.read_text("utf-8", "replace")

    def stored(self) -> list[bytes]:
        return [file.read_bytes() for file in sorted((self.directory / "Maildir" / "new").iterdir())]

    def submit(self, *rcpts: str) -> tuple[int, bytes]:
        """The reply to the content, or the first refusal."""
        with smtplib.SMTP(LOOPBACK, self.ports.gateway) as client:
            client.ehlo()
            replies = [client.mail(SENDER, ["BODY=8BITMIME"]), *(client.rcpt(rcpt) for rcpt in rcpts)]
            for reply in replies:
                if reply[0] != 250:
                    return reply
            return client.data(CONTENT)

    def signal(self, number: int) -> int:
        """Send a signal to all of it, as a terminal does; the exit code. Nothing of it is left then."""
        os.killpg(self.process.pid, number)
        code = self.process.wait(STOP_S)
        self.wait_gone()
        return code

    def wait_gone(self) -> None:
        wait_until(lambda: not any(map(is_running, self.pids)), within_s=STOP_S, what="all of it has ended")

    def kill(self) -> None:
        self.process.poll()
        for pid in self.pids or [self.process.pid]:
            if is_running(pid) and (pid != self.process.pid or self.process.returncode is None):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    started = Running(tmp_path / "mxgate-demo")
    try:
        started.wait_ready()
        # no test but one has the time to be a stranger
        started.greylist("allow", LOOPBACK)
        yield started
    finally:
        started.kill()


@pytest.mark.e2e
def test_a_message_is_stored_as_it_was_sent_behind_two_fields_of_ours(running: Running) -> None:
    code, text = running.submit("ann@demo.test")
    assert code == 250, text
    (stored,) = running.stored()
    ours, content = stored[: -len(CONTENT)], stored[-len(CONTENT) :]
    assert content == CONTENT
    assert re.fullmatch(
        rb"Authentication-Results: mx\.demo\.test;[^\r\n]*(\r\n\t[^\r\n]+)*\r\n"
        rb"Received: from [^\r\n]+(\r\n\t[^\r\n]+)+\r\n",
        ours,
    ), ours
    assert text.decode().rpartition("/")[2] in {
        file.name for file in (running.directory / "Maildir/new").iterdir()
    }
    wait_until(lambda: "message.accepted" in running.output(), within_s=5, what="the line of the log")
    assert running.signal(signal.SIGINT) == 0
    assert "Traceback" not in running.output()


@pytest.mark.e2e
def test_a_stranger_is_greylisted_for_ten_seconds(running: Running) -> None:
    running.greylist("forget", LOOPBACK)
    code, text = running.submit("ann@demo.test")
    assert (code, text[:6]) == (451, b"4.7.1 ")
    assert b" in 10 seconds" in text
    assert "1 triplets wait" in running.greylist("stats")


@pytest.mark.e2e
def test_who_is_foreign_or_unknown_is_refused_and_nothing_is_stored(running: Running) -> None:
    assert running.submit("ann@example.org")[0] == 550
    code, text = running.submit("nobody@demo.test")
    assert (code, text[:6]) == (550, b"5.1.1 ")
    assert running.submit("ann@demo.test", "nobody@demo.test")[0] == 550
    assert running.stored() == []
    wait_until(
        lambda: running.output().count("transaction.refused") == 3, within_s=5, what="the lines of the log"
    )


@pytest.mark.e2e
def test_it_is_configured_by_the_file_that_it_shows(running: Running) -> None:
    file = running.directory / "mxgate.toml"
    assert str(file) in running.output()
    config = load(file, environ={})
    check_files(config)
    assert config.server.listen[0].port == running.ports.gateway
    # no path of this machine but where the state is: it can be copied
    text, _, state = file.read_text("utf-8").partition("[state]\n")
    assert str(running.directory) not in text
    assert state == f'url = "sqlite://{running.directory}/state.db"\n'


@pytest.mark.e2e
@pytest.mark.parametrize("has_swaks", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_commands_that_it_prints_do_what_it_says(running: Running, has_swaks: bool) -> None:
    for program in ("curl", "swaks") if has_swaks else ("curl",):
        require(program=program)
    text = demo.introduction(
        running.directory, running.ports, running.mta, has_swaks=has_swaks, program=COMMAND
    )
    before, *steps = re.split(r"^\d\. ", text, flags=re.MULTILINE)
    assert len(steps) == 9
    (allow,) = re.findall(r"^ {4}(.*)", before, flags=re.MULTILINE)
    running.greylist("forget", LOOPBACK)
    shell(allow)
    for step in steps:
        commands = re.findall(r"^ {4}(.*)", step, flags=re.MULTILINE)
        assert commands
        said = "".join(map(shell, commands))
        # what the text above the commands promises
        for code, enhanced in re.findall(r"(\d{3}) (\d\.\d\.\d)", step.partition("\n")[0]):
            assert re.search(rf"{code}\D+{re.escape(enhanced)}", said), (commands, said)
        if "/readyz" in step:
            assert '"ready": true' in said
            assert "mxgate_transactions_total{" in said
        # and what is found
        for result in re.findall(r"\b\w+=pass", step.partition("    ")[0]):
            assert result in newest(running), (commands, said)
        if " explain " in step:
            assert "[dmarc dmarc_fail]" in said
            assert "dmarc=pass header.from=example.org" in said
        if "Received field" in step:
            assert "Received: from" in said
            assert "for <ann@demo.test>" in said
    assert len(running.stored()) == (3 if has_swaks else 2)


def newest(running: Running) -> str:
    """The last message that was stored."""
    new = running.directory / "Maildir" / "new"
    return max(new.iterdir(), key=lambda file: file.stat().st_mtime_ns).read_text("utf-8")


def shell(command: str) -> str:
    done = subprocess.run(
        command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.e2e
def test_it_ends_with_its_terminal(running: Running) -> None:
    assert running.signal(signal.SIGHUP) == 0


@pytest.mark.e2e
def test_it_ends_when_only_the_parent_is_asked_to(running: Running) -> None:
    running.process.terminate()
    assert running.process.wait(STOP_S) == 0
    running.wait_gone()


@pytest.mark.e2e
def test_nothing_is_left_when_the_parent_is_killed(running: Running) -> None:
    running.process.kill()
    running.process.wait(STOP_S)
    running.wait_gone()


@pytest.mark.parametrize("which", ["gateway", "downstream", "admin", "dns"])
def test_a_port_in_use_is_named(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM if which == "dns" else socket.SOCK_STREAM) as taken:
        taken.bind((LOOPBACK, 0))
        if which != "dns":
            taken.listen()
        port = taken.getsockname()[1]
        numbers = {name: free_port() for name in ("gateway", "downstream", "admin", "dns")} | {which: port}
        assert demo.run(tmp_path / "demo", demo.Ports(**numbers)) == 1
    said = capsys.readouterr()
    assert f"port {port} of {LOOPBACK} is in use" in said.err
    assert said.out == ""
    assert not (tmp_path / "demo").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").write_text("a file is in the way", "utf-8")
    assert demo.run(tmp_path / "demo", demo.Ports(*(free_port() for _ in range(4)))) == 1
    assert str(tmp_path / "demo") in capsys.readouterr().err
