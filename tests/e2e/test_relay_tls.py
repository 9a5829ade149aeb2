"""TLS towards Postfix: STARTTLS and implicit TLS, with and without a look at the certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls, issue
from tests.e2e.client import Reply
from tests.e2e.gateway import Gateway, StartGateway, Value, route
from tests.e2e.net import wait_until
from tests.e2e.postfix import STORE_HOSTNAME, Postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: tls\r\n\r\nHello\r\n"


@pytest.fixture(scope="module")
def store_tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate for the downstream's names: its own, and that by which the system finds it."""
    return issue(tmp_path_factory.mktemp("store-tls"), STORE_HOSTNAME, "localhost")


@pytest.fixture(scope="module")
def starttls(store_tls: Tls) -> Iterator[Postfix]:
    yield from run({"smtpd_tls_security_level": "may"}, store_tls)


@pytest.fixture(scope="module")
def implicit(store_tls: Tls) -> Iterator[Postfix]:
    yield from run({"smtpd_tls_wrappermode": "yes", "smtpd_tls_security_level": "encrypt"}, store_tls)


def run(settings: dict[str, str], tls: Tls) -> Iterator[Postfix]:
    """The body of a fixture: a Postfix with this certificate."""
    with ExitStack() as stack:
        server = Postfix(tls.postfix_settings() | settings)
        stack.callback(server.close)
        yield server


def start(start_gateway: StartGateway, server: Postfix, **keys: Value) -> Gateway:
    """A gateway with these keys in its route."""
    return start_gateway(server.address, {"relay": {"routes": [route([server.address]) | keys]}})


def submit(gateway: Gateway, rcpt: str) -> Reply:
    with gateway.connect() as client:
        client.hello()
        return client.submit(SENDER, [rcpt], CONTENT)


def check_encrypted(gateway: Gateway, server: Postfix, rcpt: str, *, encrypted: bool = True) -> None:
    """Mail is taken, and Postfix says how it came."""
    assert submit(gateway, rcpt).code == 250
    assert server.wait_content(rcpt) == CONTENT
    assert (b"(using TLSv1.3 with cipher " in server.wait_stored(rcpt)) is encrypted


def check_deferred(gateway: Gateway, server: Postfix, rcpt: str) -> None:
    """Mail is not taken, and nothing of it went to the downstream."""
    reply = submit(gateway, rcpt)
    assert (reply.code, reply.enhanced) == (451, "4.4.1")
    wait_until(
        lambda: gateway.metric("mxgate_relay_errors_total", error="tls"),
        within_s=5,
        what="the error is counted",
    )
    assert rcpt not in server.log()


def test_verifies_the_certificate_of_starttls(
    start_gateway: StartGateway, starttls: Postfix, store_tls: Tls, rcpt: str
) -> None:
    gateway = start(
        start_gateway, starttls, tls="verify", tls_ca_file=str(store_tls.ca_file), tls_name=STORE_HOSTNAME
    )
    check_encrypted(gateway, starttls, rcpt)


@pytest.mark.full
def test_the_name_of_the_downstream_is_the_one_to_verify_where_no_other_is_given(
    start_gateway: StartGateway, starttls: Postfix, store_tls: Tls, rcpt: str
) -> None:
    by_name = route([("localhost", starttls.address[1])], tls="verify", tls_ca_file=str(store_tls.ca_file))
    gateway = start_gateway(starttls.address, {"relay": {"routes": [by_name]}})
    check_encrypted(gateway, starttls, rcpt)


def test_defers_mail_where_the_certificate_has_another_name(
    start_gateway: StartGateway, starttls: Postfix, store_tls: Tls, rcpt: str
) -> None:
    ca_file = str(store_tls.ca_file)
    gateway = start(start_gateway, starttls, tls="verify", tls_ca_file=ca_file, tls_name="other.example.org")
    check_deferred(gateway, starttls, rcpt)


@pytest.mark.full
def test_defers_mail_where_the_certificate_is_of_another_authority(
    start_gateway: StartGateway, starttls: Postfix, rcpt: str, tmp_path: Path
) -> None:
    ca_file = str(issue(tmp_path, STORE_HOSTNAME).ca_file)
    gateway = start(start_gateway, starttls, tls="verify", tls_ca_file=ca_file, tls_name=STORE_HOSTNAME)
    check_deferred(gateway, starttls, rcpt)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mode", "is_encrypted"), [("none", False), ("opportunistic", True), ("encrypt", True)]
)
def test_uses_starttls_as_the_mode_says(
    mode: str, is_encrypted: bool, start_gateway: StartGateway, starttls: Postfix, rcpt: str
) -> None:
    check_encrypted(start(start_gateway, starttls, tls=mode), starttls, rcpt, encrypted=is_encrypted)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["encrypt", "verify"])
def test_defers_mail_where_starttls_is_not_offered(
    mode: str, start_gateway: StartGateway, postfix: Postfix, rcpt: str
) -> None:
    check_deferred(start(start_gateway, postfix, tls=mode), postfix, rcpt)


def test_verifies_the_certificate_of_implicit_tls(
    start_gateway: StartGateway, implicit: Postfix, store_tls: Tls, new_rcpt: Callable[[], str]
) -> None:
    ca_file = str(store_tls.ca_file)
    gateway = start(
        start_gateway, implicit, tls="verify", tls_implicit=True, tls_ca_file=ca_file, tls_name=STORE_HOSTNAME
    )
    for rcpt in (new_rcpt(), new_rcpt()):
        check_encrypted(gateway, implicit, rcpt)


@pytest.mark.full
def test_defers_mail_where_the_certificate_of_implicit_tls_has_another_name(
    start_gateway: StartGateway, implicit: Postfix, store_tls: Tls, rcpt: str
) -> None:
    ca_file = str(store_tls.ca_file)
    gateway = start(
        start_gateway,
        implicit,
        tls="verify",
        tls_implicit=True,
        tls_ca_file=ca_file,
        tls_name="mx.example.org",
    )
    check_deferred(gateway, implicit, rcpt)


@pytest.mark.full
def test_encrypts_without_a_look_at_the_certificate(
    start_gateway: StartGateway, implicit: Postfix, rcpt: str
) -> None:
    check_encrypted(start(start_gateway, implicit, tls="encrypt", tls_implicit=True), implicit, rcpt)
