"""Fixtures of the end-to-end tests: the servers, and gateways in front of them.

What is expensive to start is shared by the session; what a test changes is put back before the next one. A gateway
that is shared is checked at the end of the session: exit code 0 after SIGTERM, no traceback in its log.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.certificates import Tls, issue
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import QUICK_RELAY, Config, Gateway, StartGateway, config_for, shared_gateway
from tests.e2e.net import Address
from tests.e2e.postfix import Postfix

# What Postfix refuses in all tests, with the reply that the client has to see.
REFUSED = "/^refused/ 550 5.1.1 No such user here"
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Start a gateway for this test: `start_gateway(downstream_address, overrides)`; ready when it returns."""
    started: list[Gateway] = []

    def start(downstream: Address, overrides: Config | None = None) -> Gateway:
        gateway = Gateway(config_for(downstream, overrides=overrides), tmp_path_factory.mktemp("gateway"))
        started.append(gateway)
        gateway.wait_ready()
        return gateway

    yield start
    for gateway in started:
        try:
            if gateway.process.returncode is None:
                gateway.stop()
            gateway.assert_clean_log()
        finally:
            gateway.kill()


@pytest.fixture(scope="session")
def postfix() -> Iterator[Postfix]:
    """The downstream MTA; it refuses the recipients of REFUSED."""
    server = Postfix(refused=REFUSED)
    yield server
    server.close()


@pytest.fixture(scope="session")
def gateway(postfix: Postfix, tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway in front of Postfix, with TLS; it has seen what Postfix announces."""
    overrides: Config = {"server": tls.server_section()}
    for running in shared_gateway(postfix.address, overrides, tmp_path_factory.mktemp("gateway")):
        running.wait_announces("SMTPUTF8")
        yield running


@pytest.fixture(scope="session")
def shared_sink() -> Iterator[Downstream]:
    sink = Downstream()
    yield sink
    sink.close()


@pytest.fixture
def sink(shared_sink: Downstream) -> Downstream:
    """The scriptable downstream, without faults and without records."""
    shared_sink.behave()
    return shared_sink


@pytest.fixture(scope="session")
def sink_gateway(shared_sink: Downstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway in front of the scriptable downstream, with short timeouts."""
    overrides: Config = {"relay": {**QUICK_RELAY}}
    yield from shared_gateway(shared_sink.address, overrides, tmp_path_factory.mktemp("gateway"))


@pytest.fixture
def new_rcpt() -> Callable[[], str]:
    """Makes recipients that were never used: nothing is cached about them, no other test's mail is theirs."""
    return lambda: f"user-{os.getpid()}-{next(_NUMBERS)}@example.org"


@pytest.fixture
def rcpt(new_rcpt: Callable[[], str]) -> str:
    """One new recipient."""
    return new_rcpt()
