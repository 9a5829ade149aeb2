"""An aiosmtpd server with our handler: real mail through it, the client's address, and what happens in trouble."""

from __future__ import annotations

import signal
import smtplib
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult

from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.embedded import Embedded
from tests.e2e.gateway import config_for, to_toml
from tests.e2e.net import LOOPBACK, free_port, is_listening, wait_until
from tests.e2e.postfix import Postfix
from tests.e2e.test_dialogues import server_context
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.e2e

SENDER, RCPT = "sender@client.example.net", "user@example.org"
ODD = (
    b"From: ann@client.example.net\r\nSubject: \xe4\xff  \t\r\n folded\r\n\r\n.dot\r\n..two\r\n"
    b"From the start\r\n \t \r\n" + b"x" * 900 + b"\r\n\x80\x00"[:-1] + b"\r\n\r\n"
)
LOCAL = [ip_network("127.0.0.0/8")]


@contextmanager
def embedded(downstream: Any, directory: Path, overrides: Any = None, **options: Any) -> Iterator[Embedded]:
    server = Embedded(downstream.address, directory, overrides, **options)
    try:
        yield server
    finally:
        server.close()


def lines(server: Embedded, event: str) -> list[dict[str, Any]]:
    return [line.keys for line in server.log.lines if line.event == event]


@pytest.mark.parametrize("content", [ODD, b"", b"From: a@b.example\r\n", b"\r\nno header\r\n", ODD * 200])
def test_the_octets_arrive_as_they_were_sent(content: bytes, sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path) as server, Client(server.address) as client:
        client.hello()
        assert client.submit(SENDER, [RCPT], content).code == 250
    (message,) = sink.messages
    assert message.content.endswith(content)
    assert message.content.startswith(b"Authentication-Results: mx.example.org")
    (line,) = lines(server, "message.accepted")
    assert (line["client"], line["rcpts"], line["size_bytes"]) == ("127.0.0.1", [RCPT], len(content))


def test_postfix_gets_mail_through_it(
    postfix: Postfix, tmp_path: Path, new_rcpt: Callable[[], str], tls: Tls
) -> None:
    rcpt = new_rcpt()
    with (
        embedded(postfix, tmp_path, tls_context=server_context(tls)) as server,
        smtplib.SMTP(*server.address, timeout=15) as client,
    ):
        client.starttls(context=tls.trusting)
        client.sendmail(SENDER, [rcpt], ODD)
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            client.sendmail(SENDER, ["who@foreign.example"], ODD)
    assert refused.value.recipients["who@foreign.example"][0] == 550
    assert ODD in postfix.wait_stored(rcpt).replace(b"\n", b"\r\n").replace(b"\r\r", b"\r")
    (line,) = lines(server, "message.accepted")
    assert line["tls"].startswith("TLSv1")


def test_the_program_of_the_documentation_runs(sink: Downstream, tmp_path: Path) -> None:
    (program,) = blocks((ROOT / "docs" / "aiosmtpd.md").read_text("utf-8"), "python")
    port = free_port()
    assert "8025" in program
    (tmp_path / "receive.py").write_text(program.replace("8025", str(port)))
    (tmp_path / "mxgate.toml").write_text(to_toml(config_for(sink.address)))
    running = subprocess.Popen(
        # where these tests run in the background SIGINT is ignored, and that is inherited
        ["env", "--default-signal=INT", sys.executable, "receive.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: is_listening((LOOPBACK, port)), within_s=20, what="the program")
        with Client((LOOPBACK, port)) as client:
            client.hello()
            assert client.submit(SENDER, [RCPT], ODD).code == 250
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=20)
    finally:
        running.kill()
        running.communicate()
    assert [message.content.endswith(ODD) for message in sink.messages] == [True]
    assert '"event": "message.accepted"' in said or '"event":"message.accepted"' in said, said


# --- the client's address ---------------------------------------------------------------------------------------


V2 = b"\r\n\r\n\x00\r\nQUIT\n"


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (b"PROXY TCP4 192.0.2.9 127.0.0.1 4711 25\r\n", "192.0.2.9"),
        (b"PROXY TCP6 2001:db8::9 ::1 4711 25\r\n", "2001:db8::9"),
        (
            V2 + struct.pack("!BBH4s4sHH", 0x21, 0x11, 12, b"\xc0\x00\x02\x09", b"\x7f\0\0\1", 1, 25),
            "192.0.2.9",
        ),
        (
            V2 + struct.pack("!BBH4s4sHH", 0x20, 0x11, 12, b"\xc0\x00\x02\x09", b"\x7f\0\0\1", 1, 25),
            "127.0.0.1",
        ),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    ],
    ids=["v1", "v1-ipv6", "v2", "v2-local", "unknown"],
)
def test_the_client_is_whom_a_listed_balancer_names(
    header: bytes, client: str, sink: Downstream, tmp_path: Path
) -> None:
    with (
        embedded(sink, tmp_path, proxy_protocol_from=LOCAL, proxy_protocol_timeout=5) as server,
        Client(server.address) as talker,
    ):
        talker.send(header)
        talker.hello()
        assert talker.submit(SENDER, [RCPT], ODD).code == 250
    (line,) = lines(server, "message.accepted")
    assert line["client"] == client
    is_hidden = header.startswith(b"PROXY UNKNOWN")
    assert (b"hidden by a balancer" in sink.messages[0].content) is is_hidden


def test_nobody_else_is_believed(sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path, proxy_protocol_timeout=5) as server, Client(server.address) as talker:
        talker.send(b"PROXY TCP4 192.0.2.9 127.0.0.1 4711 25\r\n")
        assert talker.is_at_eof()
    assert lines(server, "proxy.refused") == [{"peer": "127.0.0.1", "error": "unlisted"}]


def test_policies_know_who_has_authenticated(sink: Downstream, tmp_path: Path) -> None:
    def authenticator(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=data.password == b"secret", auth_data=data)

    options = {"authenticator": authenticator, "auth_require_tls": False}
    with embedded(sink, tmp_path, **options) as server, smtplib.SMTP(*server.address) as client:
        client.login("ann", "secret")
        client.sendmail(SENDER, [RCPT], ODD)
    (line,) = lines(server, "message.accepted")
    assert (line["trust"], line["user"]) == ("authenticated", "ann")


# --- trouble ----------------------------------------------------------------------------------------------------


def test_trouble_of_the_downstream_is_no_refusal_for_good(sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path) as server, Client(server.address) as client:
        client.hello()
        for fault in (Fault.CLOSE, Fault.GARBAGE):
            sink.behave({Step.EOD: fault})
            assert client.submit(SENDER, [RCPT], ODD).code == 451
        sink.behave()
        assert client.submit(SENDER, [RCPT], ODD).code == 250
    assert len(sink.messages) == 1


@pytest.mark.parametrize("method", ["mail", "rcpt", "eom", "ehlo", "connect"])
def test_a_defect_of_ours_is_4xx_and_the_next_session_goes_on(
    method: str, sink: Downstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.gatekeeper import Conversation

    async def breaks(*args: object, **keys: object) -> None:
        raise ZeroDivisionError

    with embedded(sink, tmp_path) as server:
        with monkeypatch.context() as patched, Client(server.address) as client:
            patched.setattr(Conversation, method, breaks)
            client.read_reply()
            codes = [client.command("EHLO client.example.net").code]
            if codes == [250]:
                codes += [reply.code for reply in client.envelope(SENDER, [RCPT])]
            if codes == [250, 250, 250]:
                codes.append(client.command("DATA").code)
                codes.append(client.command("Subject: x\r\n\r\nx\r\n.").code)
            # without a transaction RCPT is out of sequence, which is the client's fault
            assert codes[-1] == 451 or codes[-2:] == [451, 503], codes
        with Client(server.address) as client:
            client.hello()
            assert client.submit(SENDER, [RCPT], ODD).code == 250
    assert "ZeroDivisionError" in lines(server, "session.failed")[0]["error"]


def test_a_failing_policy_is_what_its_on_error_says(sink: Downstream, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "from gateway.api import Policy, NoSettings\n"
        "class Broken(Policy[NoSettings]):\n    name = 'broken'\n"
        "    async def on_eom(self, tx):\n        raise ConnectionError('gone')\n"
    )
    for on_error, code in (("continue", 250), ("defer", 451)):
        overrides: Any = {"policy": {"broken": {"file": str(file), "on_error": on_error}}}
        with embedded(sink, tmp_path, overrides) as server, Client(server.address) as client:
            client.hello()
            assert client.submit(SENDER, [RCPT], ODD).code == code
        assert lines(server, "policy.failed")[0]["policy"] == "broken"


def test_a_client_that_goes_away_leaves_a_line_and_nothing_else(sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path) as server:
        client = Client(server.address)
        client.hello()
        client.envelope(SENDER, [RCPT])
        client.command("DATA")
        client.send(b"Subject: x\r\n")
        client.close()
        wait_until(lambda: lines(server, "transaction.aborted"), within_s=10, what="the line")
    assert sink.messages == []


def test_policies_are_told_of_the_outcome_and_refusals_of_connect_are_heard(
    sink: Downstream, tmp_path: Path
) -> None:
    file = tmp_path / "picky.py"
    file.write_text(
        "from gateway.api import *\n"
        "class Picky(Policy[NoSettings]):\n    name = 'picky'\n"
        "    async def on_connect(self, session):\n"
        "        no = Reply(554, '5.7.1', 'Not you')\n"
        "        return reject('no', no, close=True) if str(session.client) == '127.0.0.9' else proceed()\n"
        "    async def on_outcome(self, tx, outcome):\n"
        "        self.services.log.info('picky.told', delivered=outcome.delivered)\n"
    )
    overrides: Any = {"policy": {"picky": {"file": str(file)}}}
    with embedded(sink, tmp_path, overrides) as server:
        with Client(server.address, source="127.0.0.9") as client:
            client.read_reply()
            assert client.command("EHLO client.example.net").code == 554
            assert client.is_at_eof()
        with Client(server.address) as client:
            client.hello()
            assert client.submit(SENDER, [RCPT], ODD).code == 250
    (told,) = lines(server, "picky.told")
    assert told["delivered"] is True


def test_smuggling_ends_the_session(sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path) as server, Client(server.address) as client:
        client.hello()
        client.envelope(SENDER, [RCPT])
        client.command("DATA")
        reply = client.command("Subject: x\r\n\r\nx\n.\nMAIL FROM:<a@b.example>\r\n.")
        assert (reply.code, client.is_at_eof()) == (550, True)
    assert sink.messages == []


def test_one_handler_serves_many_sessions_at_once(sink: Downstream, tmp_path: Path) -> None:
    with embedded(sink, tmp_path) as server:
        clients = [Client(server.address) for _ in range(20)]
        for client in clients:
            client.hello()
        for number, client in enumerate(clients):
            assert [r.code for r in client.envelope(f"s{number}@client.example.net", [RCPT])] == [250, 250]
            client.command("DATA")
        for number, client in enumerate(clients):
            client.send(b"Subject: %d\r\n\r\nx\r\n.\r\n" % number)
        assert [client.read_reply().code for client in clients] == [250] * 20
        for client in clients:
            client.close()
    assert sorted(m.mail_from.partition(" ")[0] for m in sink.messages) == sorted(
        f"<s{n}@client.example.net>" for n in range(20)
    )
