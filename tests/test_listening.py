"""listening: which sockets a configuration is given, beside those of the one before."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway import listening
from gateway.config import Config, HostPort, load
from gateway.listening import EXIT_CONFIG, EXIT_FAILURE, Given, Listening, Sockets, StartError, listen
from gateway.session import Role
from tests.submission_keys import SUBMISSION


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "mxgate.toml"
    file.write_text(
        """
        [server]
        hostname = "mx.example.org"
        listen = ["127.0.0.1:0"]
        tls = { cert_file = "/etc/cert.pem", key_file = "/etc/key.pem" }
        [relay]
        domains = ["example.org"]
        [[relay.routes]]
        downstream = ["127.0.0.1:9"]
        """
    )
    return load(file, environ={})


@pytest.fixture
def both_roles(config: Config, tmp_path: Path) -> Config:
    file = tmp_path / "mxgate.toml"
    file.write_text(file.read_text() + SUBMISSION)
    return load(file, environ={})


@pytest.fixture
def bound() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def plain(found: Listening, number: int) -> tuple[socket.socket, ...]:
    return found.of_worker(number)[Role.MX].plain


def refusing(monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    def bind(address: HostPort, *, is_shared: bool = False) -> socket.socket:
        raise StartError(f"cannot listen on {address}", exit_code)

    monkeypatch.setattr(listening, "bind", bind)


def test_further_workers_without_a_socket_of_their_own_accept_from_those_of_the_others(
    config: Config, bound: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listen(config, 2)
    first, second = (bound.enter_context(sock) for sock, _ in before.without(None))
    refusing(monkeypatch, EXIT_FAILURE)

    more = listen(config, 4, before)
    assert [plain(more, number) for number in (1, 2, 3, 4)] == [
        (first,),
        (second,),
        (first, second),
        (first, second),
    ]
    assert [*more.without(before)] == []
    fewer = listen(config, 1, more)
    assert plain(fewer, 1) == (first, second)


def test_an_address_without_any_socket_is_an_error(
    config: Config, bound: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listen(config, 1)
    bound.enter_context(next(before.without(None))[0])
    refusing(monkeypatch, EXIT_CONFIG)
    with pytest.raises(StartError):
        listen(config, 2, before)
    refusing(monkeypatch, EXIT_FAILURE)
    with pytest.raises(StartError):
        listen(config, 1)


def test_sockets_of_a_service_manager_are_of_their_role_and_of_all_workers(
    config: Config, both_roles: Config, bound: ExitStack
) -> None:
    smtp, submission, submissions = (
        bound.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)
    )
    given = Given(plain=(smtp,), submission=(submission,), submissions=(submissions,))
    found = listen(both_roles, 2, given=given)
    for number in (1, 2):
        assert found.of_worker(number) == {
            Role.MX: Sockets((smtp,)),
            Role.SUBMISSION: Sockets((submission,), (submissions,)),
        }
    assert all(sock in given for sock, _ in found.without(None))
    with pytest.raises(StartError, match=r"'submission', which needs submission\.listen"):
        listen(config, 2, given=given)
