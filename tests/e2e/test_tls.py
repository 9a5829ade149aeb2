"""TLS towards clients: what is announced, what is taken, and that a broken handshake hurts nobody else."""

from __future__ import annotations

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.gateway import Gateway

pytestmark = [pytest.mark.e2e, pytest.mark.full]


def test_announces_starttls_until_it_is_used(gateway: Gateway, tls: Tls) -> None:
    with gateway.connect() as client:
        assert "STARTTLS" in client.hello().texts
        assert client.command("STARTTLS").code == 220
        client.start_tls(tls.trusting)
        assert "STARTTLS" not in client.command("EHLO client.example.net").texts


def test_does_not_announce_starttls_on_the_listener_of_implicit_tls(gateway: Gateway, tls: Tls) -> None:
    with Client(gateway.tls_address, tls=tls.trusting) as client:
        assert "STARTTLS" not in client.hello().texts
        reply = client.command("STARTTLS")
        assert (reply.code, reply.enhanced) == (503, "5.5.1")


def test_has_no_starttls_without_a_certificate(sink_gateway: Gateway) -> None:
    with sink_gateway.connect() as client:
        assert "STARTTLS" not in client.hello().texts
        reply = client.command("STARTTLS")
        assert (reply.code, reply.enhanced) == (502, "5.5.1")


def test_speaks_tls_1_2_at_least(gateway: Gateway, tls: Tls) -> None:
    with Client(gateway.tls_address, tls=tls.trusting) as client:
        assert getattr(client.sock, "version")() in {"TLSv1.2", "TLSv1.3"}  # noqa: B009 - of an SSL socket only


def test_closes_when_the_handshake_is_garbage(gateway: Gateway) -> None:
    with gateway.connect() as client:
        client.hello()
        assert client.command("STARTTLS").code == 220
        client.send(b"this is no ClientHello\r\n")
        # an alert of TLS may come before the end
        while not client.is_at_eof():
            client.discard()
    with gateway.connect() as client:
        assert client.hello().code == 250


def test_gives_no_banner_to_a_plain_client_of_implicit_tls(gateway: Gateway) -> None:
    with Client(gateway.tls_address) as client:
        client.send(b"EHLO client.example.net\r\n")
        while not client.is_at_eof():
            assert not client.discard().startswith(b"2")
