"""STARTTLS towards the downstream: when it is used, what must be checked, and what is trouble."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.adapters.relay import (
    HostSettings,
    Identity,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
    TlsMode,
)
from gateway.adapters.relay.opening import Opener
from tests.adapters.relaykit import BLOCK, PREFIX, Generated, both_loops, relay_to, settings_for
from tests.adapters.sink import CLOSE, HANG, OK, Do, Sink, say

CA = trustme.CA()
NAME = "mta.example.org"


def server_context(ca: trustme.CA = CA, name: str = NAME) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    return context


def host(sink: Sink, tls: TlsMode, **changes: Any) -> HostSettings:
    return HostSettings("127.0.0.1", sink.port, tls, **changes)


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.mark.parametrize("tls", [TlsMode.OPPORTUNISTIC, TlsMode.ENCRYPT])
@both_loops
async def test_mail_goes_through_tls_where_it_is_offered(tls: TlsMode) -> None:
    async with Sink(tls=server_context()) as sink, relay_to(sink, host=host(sink, tls)) as bench:
        assert (await bench.deliver()).stored
        assert (await bench.deliver()).stored
        assert [peer.is_tls for peer in sink.peers] == [True]
        # RFC 3207 4.2: what was said before does not count
        assert sink.commands[:3] == [b"EHLO gw.example.org", b"STARTTLS", b"EHLO gw.example.org"]
        assert bench.relay.offer().smtputf8


@both_loops
async def test_tls_is_not_used_where_it_is_off() -> None:
    async with Sink(tls=server_context()) as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        assert [peer.is_tls for peer in sink.peers] == [False]


@both_loops
async def test_opportunistic_mail_goes_without_tls_where_it_is_not_offered() -> None:
    async with Sink() as sink, relay_to(sink, host=host(sink, TlsMode.OPPORTUNISTIC)) as bench:
        assert (await bench.deliver()).stored


@pytest.mark.parametrize("tls", [TlsMode.ENCRYPT, TlsMode.VERIFY])
@both_loops
async def test_no_mail_without_tls_where_it_must_be(tls: TlsMode) -> None:
    async with Sink() as sink, relay_to(sink, host=host(sink, tls)) as bench:
        delivery = await bench.deliver()
        assert (delivery.reply.code, delivery.error) == (451, "tls")
        assert not any(line.startswith(b"MAIL") for line in sink.commands)


@both_loops
async def test_a_valid_certificate_of_the_right_name_passes(ca_file: str) -> None:
    async with Sink(tls=server_context()) as sink:
        checked = host(sink, TlsMode.VERIFY, tls_name=NAME, tls_ca_file=ca_file)
        async with relay_to(sink, host=checked) as bench:
            assert (await bench.deliver()).stored


@both_loops
async def test_an_address_can_be_the_certificate_s_name(ca_file: str) -> None:
    async with Sink(tls=server_context(name="127.0.0.1")) as sink:
        checked = host(sink, TlsMode.VERIFY, tls_ca_file=ca_file)
        async with relay_to(sink, host=checked) as bench:
            assert (await bench.deliver()).stored


@pytest.mark.parametrize(
    ("ca", "name", "tls_name"),
    [(CA, "other.example.org", NAME), (trustme.CA(), NAME, NAME), (CA, NAME, "")],
    ids=["wrong name", "unknown authority", "a name for an address"],
)
@both_loops
async def test_a_certificate_that_does_not_verify_is_trouble(
    ca: trustme.CA, name: str, tls_name: str, ca_file: str
) -> None:
    async with Sink(tls=server_context(ca, name)) as sink:
        checked = host(sink, TlsMode.VERIFY, tls_name=tls_name, tls_ca_file=ca_file)
        async with relay_to(sink, host=checked) as bench:
            delivery = await bench.deliver()
            assert (delivery.reply.code, delivery.error) == (451, "tls")
            assert sink.messages == []
            assert "certificate" in bench.failures[0]["detail"].lower()


@pytest.mark.parametrize(
    "do",
    [
        say("454 4.7.0 Not now"),
        say("501 5.5.4 No"),
        Do(b"220 go\r\n250 2.0.0 injected\r\n", "hang"),
        Do(b"220 go\r\n250-inj", "hang"),
        Do(b"220 go\r\nplain text\r\n", "close"),
        Do(b"220 go\r\n", "close"),
        HANG,
        Do(b"220 go\r\n", "hang"),
    ],
)
@both_loops
async def test_trouble_with_starttls_is_4yz(do: Do) -> None:
    async with (
        Sink(tls=server_context(), starttls=do) as sink,
        relay_to(sink, host=host(sink, TlsMode.OPPORTUNISTIC), connect_timeout_s=0.2) as bench,
    ):
        delivery = await bench.deliver()
        assert (delivery.reply.code, delivery.error) == (451, "tls")
        assert not any(line.startswith(b"MAIL") for line in sink.commands)


@both_loops
async def test_large_content_goes_through_tls() -> None:
    async with (
        Sink(tls=server_context(), content_after=10**9) as sink,
        relay_to(sink, host=host(sink, TlsMode.ENCRYPT)) as bench,
    ):
        assert (await bench.deliver(content=Generated(64))).stored
        assert sink.messages[0].wire == PREFIX + BLOCK * 1024 * 64


def test_authorities_that_cannot_be_read_are_refused_at_start(tmp_path: Path) -> None:
    from gateway.adapters.relay import SmtpRelay
    from tests.fakes import FakeServices

    (tmp_path / "junk.pem").write_text("junk")
    for name in ("none.pem", "junk.pem"):
        checked = HostSettings("127.0.0.1", 25, TlsMode.VERIFY, tls_ca_file=str(tmp_path / name))
        services = FakeServices()
        with pytest.raises(RelaySettingsError, match=name):
            SmtpRelay(
                settings_for(Sink(), checked),
                clock=services.clock,
                log=services.log,
                metrics=services.metrics,
            )


# --- implicit TLS ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [TlsMode.ENCRYPT, TlsMode.VERIFY])
@pytest.mark.parametrize("identity", [Identity.NONE, Identity.PROXY_V2])
@both_loops
async def test_implicit_tls_begins_with_the_first_byte_behind_a_proxy_header(
    identity: Identity, tls: TlsMode, ca_file: str
) -> None:
    async with Sink(
        tls=server_context(), is_tls_implicit=True, has_proxy_header=identity is Identity.PROXY_V2
    ) as sink:
        sealed = host(sink, tls, tls_implicit=True, tls_name=NAME, tls_ca_file=ca_file)
        async with relay_to(sink, host=sealed, identity=identity) as bench:
            assert (await bench.deliver()).stored
            assert (await bench.deliver()).stored
            assert [peer.is_tls for peer in sink.peers] == [True]
            assert sink.commands[:2] == [
                b"EHLO gw.example.org",
                b"MAIL FROM:<a@example.net> SIZE=%d" % (len(PREFIX) + 20),
            ]


@both_loops
async def test_implicit_tls_checks_the_certificate(ca_file: str) -> None:
    async with Sink(tls=server_context(name="other.example.org"), is_tls_implicit=True) as sink:
        sealed = host(sink, TlsMode.VERIFY, tls_implicit=True, tls_name=NAME, tls_ca_file=ca_file)
        async with relay_to(sink, host=sealed) as bench:
            assert (await bench.deliver()).error == "tls"
            assert sink.messages == []


@pytest.mark.parametrize("banner", [OK, HANG, CLOSE])
@both_loops
async def test_a_downstream_without_implicit_tls_is_trouble_in_time(banner: Do) -> None:
    async with Sink(banner=banner) as sink:
        sealed = host(sink, TlsMode.ENCRYPT, tls_implicit=True)
        async with relay_to(sink, host=sealed, connect_timeout_s=0.3) as bench:
            assert (await bench.deliver()).error == "tls"
            assert bench.up == [False]


@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.OPPORTUNISTIC])
def test_implicit_tls_is_never_half_hearted(tls: TlsMode) -> None:
    with pytest.raises(RelaySettingsError, match="tls_implicit"):
        Opener(
            HostSettings("192.0.2.1", 465, tls, tls_implicit=True),
            RouteSettings("main", ("*",), ()),
            RelaySettings("gw.example.org", ()),
            lambda _: None,
        )
