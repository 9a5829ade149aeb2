"""admin_client: what listens at the admin port is asked, and is not trusted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from gateway.adapters import admin_client
from gateway.adapters.admin_client import AdminError, ask_admin


class Answering:
    """A port that says the same to everybody."""

    def __init__(self, sock: socket.socket, answer: bytes) -> None:
        self.sock = sock
        self.answer = answer
        self.port = sock.getsockname()[1]
        self.requests: list[bytes] = []

    def serve(self) -> None:
        connection, _ = self.sock.accept()
        with connection:
            self.requests.append(connection.recv(65_536))
            connection.sendall(self.answer)


@contextmanager
def answering(answer: bytes) -> Iterator[Answering]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(30)
        port = Answering(sock, answer)
        thread = Thread(target=port.serve)
        thread.start()
        try:
            yield port
        finally:
            thread.join()


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_gives_status_and_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not for what is on this machine
    with answering(http(b'{"a": 1}', "404 Not Found")) as port:
        given = ask_admin("0.0.0.0", port.port, "/x", {"rcpt": "a+b@example.org\r\nX: y"}, token=b"secret")
    assert given == (404, {"a": 1})
    (request,) = port.requests
    line, *headers = request.split(b"\r\n")
    assert line == b"GET /x?rcpt=a%2Bb%40example.org%0D%0AX%3A+y HTTP/1.1"
    assert b"Authorization: Bearer secret" in headers


def test_no_token_is_no_header() -> None:
    with answering(http(b"{}")) as port:
        ask_admin("127.0.0.1", port.port, "/x", {})
    assert b"Authorization" not in port.requests[0]


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mx.example.org ESMTP\r\n",
        b"\xff" * 100,
        b"",
        http(b"<html>"),
        http(b"[]"),
        http(b"[" * 100_000),
        http(b"\xff"),
        b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"a": 1',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_admin_port_is_told_on_one_line(answer: bytes) -> None:
    with answering(answer) as port, pytest.raises(AdminError) as refused:
        ask_admin("127.0.0.1", port.port, "/x", {})
    assert str(refused.value).isprintable()
    assert f"127.0.0.1:{port.port}" in str(refused.value)


def test_nobody_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(AdminError, match=rf"127.0.0.1:{port} does not answer: Connection refused; does the"):
        ask_admin("127.0.0.1", port, "/x", {})


def test_silence_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(AdminError, match="no answer in time"):
        ask_admin("127.0.0.1", sock.getsockname()[1], "/x", {})


def test_an_answer_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "MAX_ANSWER_BYTES", 10)
    with answering(http(b'{"a": "0123456789"}')) as port, pytest.raises(AdminError, match="larger than 10"):
        ask_admin("127.0.0.1", port.port, "/x", {})


def test_a_token_that_is_no_header_value_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(AdminError, match="no admin port"):
        ask_admin("127.0.0.1", sock.getsockname()[1], "/x", {}, token=b"a\r\nb")
