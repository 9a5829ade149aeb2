"""rspamd, clamd and a small HTTP service as real partners of a running gateway; and what their outages do to mail."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clamd import EICAR, SIGNATURE, ClamdServer
from tests.e2e.client import Reply
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway
from tests.e2e.net import LOOPBACK, free_port, is_listening, wait_until
from tests.e2e.rspamd import RspamdServer

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
# https://spamassassin.apache.org/gtube/
GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*" + b"GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
DOCUMENT = Path(__file__).parents[2] / "docs" / "http-hook.md"


@pytest.fixture(scope="module")
def rspamd() -> Iterator[RspamdServer]:
    server = RspamdServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def clamd() -> Iterator[ClamdServer]:
    server = ClamdServer()
    yield server
    server.close()


def submit(gateway: Gateway, body: bytes, *rcpts: str, subject: bytes = b"x") -> Reply:
    content = b"From: <%b>\r\nSubject: %b\r\n\r\n%b\r\n" % (SENDER.encode(), subject, body)
    with gateway.connect() as client:
        client.hello()
        return client.submit(SENDER, rcpts or ["b@example.org"], content)


def large(line: bytes) -> bytes:
    """Three megabytes, which go through the spool file, and this line behind them."""
    return (b"y" * 70 + b"\r\n..z\r\n") * 38_000 + line


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_rspamd_judges_what_is_streamed_to_it(
    rspamd: RspamdServer, sink: Downstream, start_gateway: StartGateway, kind: str
) -> None:
    settings: Config = {"url": rspamd.url} if kind == "tcp" else {"socket": str(rspamd.socket)}
    gateway = start_gateway(sink.address, {"policy": {"rspamd": {"settings": dict(settings)}}})

    assert submit(gateway, b"Hello").code == 250
    (message,) = sink.messages
    assert re.search(
        rb"\nX-Mxgate-Rspamd: [a-z ]+; score=-?\d+\.\d\d; required=15\.00;\r\n\t\w+\(", message.content
    )

    refused = submit(gateway, GTUBE)
    assert (refused.code, refused.texts) == (550, ("5.7.1 Gtube pattern",))
    assert len(sink.messages) == 1
    assert submit(gateway, large(b"")).code == 250
    # all of it, without what the wire and we have added
    size = len(sink.messages[1].content.partition(b"\r\nFrom: ")[2]) + len("From: ")
    wait_until(lambda: f", len: {size}, " in rspamd.log(), within_s=10, what="rspamd's log has the size")
    log = rspamd.log()
    assert "ip: 127.0.0.1" in log
    assert f"from: <{SENDER}>" in log
    assert "rcpts: <b@example.org>" in log
    assert gateway.metric("mxgate_policy_failures_total", policy="rspamd") == 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_clamd_finds_what_its_database_has(
    clamd: ClamdServer, sink: Downstream, start_gateway: StartGateway, kind: str
) -> None:
    where = clamd.socket if kind == "unix" else f"{LOOPBACK}:{clamd.port}"
    settings: Config = {"clamd": where, "max_message_bytes": 50_000_000, "on_too_large": "quarantine"}
    gateway = start_gateway(sink.address, {"policy": {"clamav": {"settings": dict(settings)}}})

    assert submit(gateway, b"Hello").code == 250
    refused = submit(gateway, EICAR)
    assert (refused.code, refused.texts) == (550, (f"5.7.1 The message carries malware: {SIGNATURE}",))
    # clamd itself takes a megabyte only
    assert submit(gateway, large(EICAR)).code == 250
    assert [b"X-Mxgate-Quarantine: clamav_too_large" in each.content for each in sink.messages] == [
        False,
        True,
    ]


def test_partners_that_are_away_are_what_on_error_says(sink: Downstream, start_gateway: StartGateway) -> None:
    nobody = free_port()
    gateway = start_gateway(
        sink.address,
        {
            "policy": {
                "rspamd": {"settings": {"url": f"http://{LOOPBACK}:{nobody}"}},
                "clamav": {"on_error": "continue", "settings": {"clamd": f"{LOOPBACK}:{nobody}"}},
                "http_hook": {
                    "on_error": "continue",
                    "settings": {"url": f"http://{LOOPBACK}:{nobody}/", "stages": ["rcpt", "eom"]},
                },
            }
        },
    )
    assert submit(gateway, b"Hello").code == 250
    wait_until(
        lambda: gateway.metric("mxgate_http_requests_total", outcome="connect") == 3,
        within_s=10,
        what="three requests that failed",
    )
    deferring = start_gateway(
        sink.address, {"policy": {"clamav": {"settings": {"clamd": f"{LOOPBACK}:{nobody}"}}}}
    )
    assert submit(deferring, b"Hello").code == 451
    assert len(sink.messages) == 1


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The service of docs/http-hook.md, word for word but for its port."""
    (source,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    port = free_port()
    file = tmp_path / "hook.py"
    file.write_text(source.replace("8080", str(port)), "utf-8")
    with (tmp_path / "hook.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, str(file)], stdout=log, stderr=log)
    try:
        wait_until(lambda: is_listening((LOOPBACK, port)), within_s=15, what="the service listens")
        yield f"http://{LOOPBACK}:{port}/judge", process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def test_the_service_of_the_document_judges_mail(
    hook: tuple[str, subprocess.Popen[bytes]], sink: Downstream, start_gateway: StartGateway
) -> None:
    url, process = hook
    settings: Config = {"url": url, "stages": ["rcpt", "eom"], "send_content": True}
    gateway = start_gateway(
        sink.address, {"policy": {"http_hook": {"timeout_s": 2, "settings": dict(settings)}}}
    )
    moved = submit(gateway, b"Hello", "old@example.org")
    assert (moved.code, moved.texts) == (551, ("5.1.6 Moved, please write to new@example.org",))
    assert submit(gateway, large(b""), subject=b"Your invoice").code == 250
    assert submit(gateway, b"Hello").code == 250
    assert [b"\nX-Seen-By-Hook: invoice\r\n" in each.content for each in sink.messages] == [True, False]

    # it takes connections and says nothing
    process.send_signal(signal.SIGSTOP)
    assert submit(gateway, b"Hello").code == 451
    process.send_signal(signal.SIGCONT)
    assert submit(gateway, b"Hello").code == 250


def test_only_workers_that_need_it_load_the_client(sink: Downstream, start_gateway: StartGateway) -> None:
    gateway = start_gateway(sink.address)
    (worker,) = gateway.worker_pids()
    assert "_http_parser" not in Path(f"/proc/{worker}/maps").read_text()
    other = start_gateway(sink.address, {"policy": {"rspamd": {"mode": "observe"}}})
    (worker,) = other.worker_pids()
    assert "_http_parser" in Path(f"/proc/{worker}/maps").read_text()
