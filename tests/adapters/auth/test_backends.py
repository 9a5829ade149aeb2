"""Back-ends of submission that lie, hang, break off or speak another language: an outage each, never a refusal.

What a real Dovecot and a real Postfix say is in tests/e2e/test_submission.py.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.adapters.auth import (
    DovecotBackend,
    DownstreamBackend,
    DownstreamSettings,
    DownstreamSettingsError,
)
from gateway.authentication import AuthUnavailableError
from gateway.session import Session
from gateway.smtp.sasl import Credentials, Mechanism

ANN = Credentials(Mechanism.PLAIN, "ann@example.org", "s3cret\u00e4")
PLAIN = base64.b64encode("\0ann@example.org\0s3cret\u00e4".encode())
SESSION = Session("S", ip_address("192.0.2.7"), 40000)
HELLO = (
    b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tLOGIN\tplaintext\nSPID\t7\nCUID\t1\nCOOKIE\tabc\nDONE\n"
)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, int]]:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(closing, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await asyncio.sleep(0)


# --- Dovecot --------------------------------------------------------------------------------------------


async def dovecot(answer: bytes, *, hello: bytes = HELLO, asked: list[bytes] | None = None) -> str | None:
    """What the back-end makes of this answer to AUTH."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello)
        if hello is not HELLO:
            return
        for _ in range(3):
            line = await reader.readline()
            if asked is not None:
                asked.append(line)
        writer.write(answer)
        await writer.drain()
        writer.write_eof()
        await reader.read()

    async with serving(serve) as address:
        return await DovecotBackend(address).check(ANN, SESSION)


async def test_dovecot_is_asked_in_its_own_words() -> None:
    asked: list[bytes] = []
    assert await dovecot(b"OK\t1\tuser=Ann@example.org\tsomething=else\n", asked=asked) == "Ann@example.org"
    version, cpid, auth = asked
    assert version == b"VERSION\t1\t1\n"
    assert cpid.startswith(b"CPID\t")
    assert 0 < int(cpid[5:]) < 2**31
    assert auth == (
        b"AUTH\t1\tPLAIN\tservice=smtp\tnologin\tsecured\trip=192.0.2.7\trport=40000\tresp=" + PLAIN + b"\n"
    )


async def test_each_connection_has_an_id_of_its_own() -> None:
    asked: list[bytes] = []
    for _ in range(4):
        await dovecot(b"OK\t1\n", asked=asked)
    assert len({line for line in asked if line.startswith(b"CPID")}) == 4


@pytest.mark.parametrize(
    ("answer", "user"),
    [
        (b"OK\t1\n", "ann@example.org"),
        (b"OK\t1\tuser=\n", "ann@example.org"),
        (b"NOTFOR\t1\nOK\t2\tuser=other\nOK\t1\tuser=ann\n", "ann"),
        (b"OK\t1\tuser=a\0011b\n", None),
        (b"FAIL\t1\n", None),
        (b"FAIL\t1\tuser=ann@example.org\tauthz\n", None),
        (b"FAIL\t1\tuser=ann@example.org\tuser_disabled\n", None),
        (b"FAIL\t1\tuser=ann@example.org\tpass_expired\n", None),
        (b"FAIL\t1\tuser=temp\n", None),
    ],
)
async def test_answers_of_dovecot(answer: bytes, user: str | None) -> None:
    if b"\001" in answer:
        with pytest.raises(AuthUnavailableError, match="control characters"):
            await dovecot(answer)
    else:
        assert await dovecot(answer) == user


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"FAIL\t1\tuser=ann@example.org\ttemp\n",
        b"FAIL\t1\tcode=temp_fail\n",
        b"CONT\t1\t\n",
        b"OK\t1\tuser=ann",
        b"OK\t1\tuser=\xff\n",
        b"x" * 20_000,
        b"what\n" * 200,
        b"\n" * 200,
    ],
)
async def test_what_is_no_answer_of_dovecot_is_an_outage(answer: bytes) -> None:
    with pytest.raises(AuthUnavailableError) as caught:
        await dovecot(answer)
    assert "s3cret" not in repr(caught.value)


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"VERSION\t2\t0\nDONE\n",
        b"VERSION\t1\t2\nMECH\tCRAM-MD5\nDONE\n",
        b"VERSION\t1\t2\nDONE\n",
        b"220 mx ESMTP\r\n",
        b"MECH\tPLAIN\n" * 200,
    ],
)
async def test_a_greeting_that_will_not_do_is_an_outage(hello: bytes) -> None:
    with pytest.raises(AuthUnavailableError):
        await dovecot(b"OK\t1\n", hello=hello)


async def test_no_dovecot_is_an_outage(tmp_path: Path) -> None:
    for address in (str(tmp_path / "none"), ("127.0.0.1", 1)):
        with pytest.raises(AuthUnavailableError):
            await DovecotBackend(address).check(ANN, SESSION)


# --- a mail server --------------------------------------------------------------------------------------


class Smtp:
    """A mail server with one word for each command; `starttls` is its reply to that one."""

    def __init__(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        self.ca_file = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("mta.example.org").configure_cert(self.context)
        self.banner = b"220 mta\r\n"
        self.hello = b"250-mta\r\n250-STARTTLS\r\n250 HELP\r\n"
        self.hello_in_tls = b"250-mta\r\n250 AUTH LOGIN PLAIN\r\n"
        self.starttls = b"220 go\r\n"
        self.answers = [b"235 2.7.0 ok\r\n"]
        self.said: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_in_tls = writer.get_extra_info("ssl_object") is not None
        writer.write(self.banner)
        answers = iter(self.answers)
        while line := await reader.readline():
            self.said.append(line)
            if line.startswith(b"EHLO"):
                writer.write(self.hello_in_tls if is_in_tls else self.hello)
            elif line == b"STARTTLS\r\n":
                writer.write(self.starttls)
                await writer.drain()
                await writer.start_tls(self.context)
                is_in_tls = True
            elif line == b"QUIT\r\n":
                return
            else:
                writer.write(next(answers))

    async def check(self, *, tls_implicit: bool = False, tls_name: str = "mta.example.org") -> str | None:
        async with serving(self.serve, self.context if tls_implicit else None) as (host, port):
            settings = DownstreamSettings(
                host,
                port,
                "mx.example.org",
                tls_implicit=tls_implicit,
                tls_ca_file=str(self.ca_file),
                tls_name=tls_name,
            )
            async with asyncio.timeout(10):
                return await DownstreamBackend(settings).check(ANN, SESSION)


@pytest.fixture
def smtp(tmp_path: Path) -> Smtp:
    return Smtp(tmp_path)


async def test_the_password_goes_in_tls_only(smtp: Smtp) -> None:
    assert await smtp.check() == "ann@example.org"
    assert smtp.said[:4] == [
        b"EHLO mx.example.org\r\n",
        b"STARTTLS\r\n",
        b"EHLO mx.example.org\r\n",
        b"AUTH PLAIN " + PLAIN + b"\r\n",
    ]


async def test_implicit_tls(smtp: Smtp) -> None:
    assert await smtp.check(tls_implicit=True) == "ann@example.org"
    assert smtp.said[:2] == [b"EHLO mx.example.org\r\n", b"AUTH PLAIN " + PLAIN + b"\r\n"]


async def test_login_where_there_is_no_plain(smtp: Smtp) -> None:
    smtp.hello_in_tls = b"250-mta\r\n250 AUTH=LOGIN\r\n"
    smtp.answers = [b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", b"535 5.7.8 no\r\n"]
    assert await smtp.check() is None
    assert smtp.said[3:6] == [
        b"AUTH LOGIN\r\n",
        base64.b64encode(b"ann@example.org") + b"\r\n",
        base64.b64encode("s3cret\u00e4".encode()) + b"\r\n",
    ]


@pytest.mark.parametrize(
    "answer", [b"535 5.7.8 no\r\n", b"535 no\r\n", b"535-a\r\n535 b\r\n", b"550 5.7.8 no\r\n"]
)
async def test_refusals(smtp: Smtp, answer: bytes) -> None:
    smtp.answers = [answer]
    assert await smtp.check() is None


@pytest.mark.parametrize(
    "answer",
    [
        b"454 4.7.0 later\r\n",
        b"421 bye\r\n",
        b"250 ok\r\n",
        b"235\r\n235 ok\r\n",
        b"334 \r\n",
        b"500 what\r\n",
        b"502 5.5.1 no\r\n",
        b"530 5.7.0 TLS\r\n",
        b"534 5.7.9 too weak\r\n",
        b"538 5.7.11 TLS\r\n",
        b"550 5.7.1 no\r\n",
        b"nonsense\r\n",
        b"235-ok\r\n",
        b"",
    ],
)
async def test_all_else_is_an_outage(smtp: Smtp, answer: bytes) -> None:
    async def serve_then_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        smtp.answers = []
        while line := await reader.readline():
            if line.startswith(b"AUTH"):
                writer.write(answer)
                await writer.drain()
                return
            writer.write(smtp.hello_in_tls)

    async def greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(smtp.banner)
        await serve_then_close(reader, writer)

    async with serving(greeting, smtp.context) as (host, port):
        settings = DownstreamSettings(
            host,
            port,
            "mx.example.org",
            tls_implicit=True,
            tls_ca_file=str(smtp.ca_file),
            tls_name="mta.example.org",
        )
        with pytest.raises(AuthUnavailableError) as caught:
            await DownstreamBackend(settings).check(ANN, SESSION)
    assert "s3cret" not in repr(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("banner", b"554 no\r\n"),
        ("banner", b"220 mta\r\n250 early\r\n"),
        ("hello", b"500 what\r\n"),
        ("hello", b"250-mta\r\n250 AUTH PLAIN\r\n"),  # stripped of STARTTLS
        ("starttls", b"454 not now\r\n"),
        ("starttls", b"220 go\r\n250 mta AUTH PLAIN\r\n"),  # text put in front of TLS
        ("hello_in_tls", b"250 mta\r\n"),
        ("hello_in_tls", b"250-mta\r\n250 AUTH CRAM-MD5\r\n"),
        ("hello_in_tls", b"421 bye\r\n"),
    ],
)
async def test_before_auth_nothing_of_the_password_is_said(smtp: Smtp, name: str, value: bytes) -> None:
    setattr(smtp, name, value)
    with pytest.raises(AuthUnavailableError):
        await smtp.check()
    assert not any(line.startswith(b"AUTH") for line in smtp.said)


async def test_replies_put_in_front_of_tls_do_not_wait_behind_it(smtp: Smtp) -> None:
    # each as long as what is read at once might be, so that one after the other is left in the buffer
    def reply(code: bytes, size_bytes: int, last: bytes) -> bytes:
        last = code + b" " + last + b"\r\n"
        line = code + b"-" + b"x" * 58 + b"\r\n"
        return line * (size_bytes // 64 - 1) + last.replace(b"\r\n", b" " * (64 - len(last)) + b"\r\n")

    smtp.starttls = b"".join(
        [reply(b"220", 16_384, b"go"), reply(b"250", 16_384, b"AUTH PLAIN"), b"235 2.7.0 ok\r\n"]
    )
    smtp.answers = [b"535 5.7.8 no\r\n"]
    with pytest.raises(AuthUnavailableError, match="more than it was asked for"):
        await smtp.check()
    assert not any(line.startswith(b"AUTH") for line in smtp.said)


@pytest.mark.parametrize("tls_implicit", [False, True])
async def test_a_certificate_for_another_name_is_an_outage(smtp: Smtp, tls_implicit: bool) -> None:
    with pytest.raises(AuthUnavailableError, match="certificate verify failed"):
        await smtp.check(tls_implicit=tls_implicit, tls_name="other.example.org")
    assert not any(line.startswith(b"AUTH") for line in smtp.said)


@pytest.mark.parametrize("name", [".example.org", "a" * 64 + ".example.org", "a\0b"])
def test_a_name_that_no_certificate_has_is_told(name: str) -> None:
    with pytest.raises(DownstreamSettingsError, match="tls_name"):
        DownstreamBackend(DownstreamSettings("127.0.0.1", 587, "mx.example.org", tls_name=name))


def test_a_ca_file_that_is_none_is_told(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(DownstreamSettingsError, match=str(file)):
        DownstreamBackend(DownstreamSettings("127.0.0.1", 587, "mx.example.org", tls_ca_file=str(file)))
