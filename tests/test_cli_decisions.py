"""`mxgate decisions` against an admin port that says what the test wants."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli import cli
from gateway.decision import to_json
from tests.decision.records import DENIED, decision

REFUSED = to_json(decision(1, action="rejected", answer=DENIED, policy="relay_guard"))


class FakeAdmin(HTTPServer):
    """An admin port on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.body: Any = {"decisions": [], "truncated": False, "errors": []}
        self.requests: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    server: FakeAdmin

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Authorization", "")))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.body).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # theirs
        pass


@pytest.fixture
def admin() -> Iterator[FakeAdmin]:
    with FakeAdmin() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(port: int, tmp_path: Path, *arguments: str) -> Result:
    file = tmp_path / "mxgate.toml"
    file.write_text(
        f"""
        [server]
        hostname = "mx.example.org"
        listen = ["127.0.0.1:0"]
        [relay]
        domains = ["example.org"]
        routes = [{{ domains = ["*"], downstream = ["127.0.0.1:9"] }}]
        [admin]
        listen = "127.0.0.1:{port}"
        """
    )
    return CliRunner().invoke(cli, ["decisions", "--config", str(file), *arguments])


def test_says_why_a_mail_was_refused(admin: FakeAdmin, tmp_path: Path) -> None:
    admin.body |= {"decisions": [REFUSED]}
    done = run(admin.server_port, tmp_path, "--rcpt", "ann@example.org", "--limit", "5")
    assert (done.exit_code, done.stderr) == (0, "")
    assert admin.requests == [("/api/v1/decisions?rcpt=ann%40example.org&limit=5", "")]
    lines = done.stdout.splitlines()
    assert lines[0] == "2001-09-09T01:46:41.000Z rejected 1m80vxzckjnp001-1"
    assert "  answered 550 5.7.1 Relaying denied at eom [relay_guard]" in lines


def test_json_is_what_the_port_said(admin: FakeAdmin, tmp_path: Path) -> None:
    admin.body |= {"decisions": [REFUSED | {"helo": "\x1b[2J\u202e"}]}
    done = run(admin.server_port, tmp_path, "--json")
    assert json.loads(done.stdout) == admin.body
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_what_is_missing_is_told_apart_from_what_was_asked_for(admin: FakeAdmin, tmp_path: Path) -> None:
    admin.body |= {"decisions": [REFUSED], "truncated": True, "errors": [{"worker": 2, "error": "\x1b"}]}
    done = run(admin.server_port, tmp_path)
    assert done.exit_code == 1
    assert "a worker's decisions are missing" in done.stderr
    assert "there are more" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--tx", "1m80vxzckjnp001-1"], 1)])
def test_nothing_found_is_a_finding_only_where_one_was_named(
    admin: FakeAdmin, tmp_path: Path, arguments: list[str], code: int
) -> None:
    done = run(admin.server_port, tmp_path, *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert "no decision of this kind is kept" in done.stderr


def test_the_token_of_the_configuration_is_shown(admin: FakeAdmin, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    run(admin.server_port, tmp_path, "--set", f'admin.token_file="{token}"')
    assert admin.requests == [("/api/v1/decisions", "Bearer secret")]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, {"error": "Unauthorized"}, "wants the token of admin.token_file"),
        (404, {"error": "Not\x1bFound"}, "answered 404 'Not\\x1bFound'"),
        (200, {"decisions": 1}, "answered 200 None"),
        (200, [], "is no admin port"),
    ],
)
def test_another_answer_is_told(
    admin: FakeAdmin, tmp_path: Path, status: int, body: object, error: str
) -> None:
    admin.status, admin.body = status, body
    done = run(admin.server_port, tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert error in done.stderr


def test_a_gateway_that_does_not_run_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    done = run(port, tmp_path)
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: the admin port 127.0.0.1:{port} does not answer: Connection refused; does the gateway run?\n"
    )


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--action", "lost"], ["--client", "mail"]])
def test_a_wrong_option_is_usage(admin: FakeAdmin, tmp_path: Path, arguments: list[str]) -> None:
    done = run(admin.server_port, tmp_path, *arguments)
    assert done.exit_code == 64
    assert admin.requests == []


def test_records_that_are_none_harm_nobody(admin: FakeAdmin, tmp_path: Path) -> None:
    admin.body |= {
        "decisions": [None, 1, {"rcpts": 1, "verdicts": [None, {}], "client": "\x1b[31m\r\n\udc80"}]
    }
    done = run(admin.server_port, tmp_path)
    assert done.exit_code == 0
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert r"client \x1b[31m\r\n\udc80" in done.stdout
