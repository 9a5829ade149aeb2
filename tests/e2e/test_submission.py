"""Submission with real clients, a real Dovecot and a real Postfix: who may, what arrives, what is cut."""

from __future__ import annotations

import base64
import json
import re
import signal
import smtplib
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest
from cryptography.hazmat.primitives import serialization

from gateway.testing.mail import SigningKey
from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.gateway import Gateway, StartGateway, Value, config_for, to_toml
from tests.e2e.machine import require
from tests.e2e.net import is_listening, wait_until
from tests.e2e.postfix import Postfix
from tests.e2e.submission import (
    ANN,
    BOB,
    PASSWORDS,
    PasswordServer,
    submission_postfix,
    submission_sections,
)

pytestmark = pytest.mark.e2e

DOCS = Path(__file__).parents[2] / "docs" / "submission.md"
RCPT = "you@example.net"
MESSAGE = (
    b"From: Ann <ann@example.org>\r\nTo: you@example.net\r\nSubject: Hello\r\n\r\n.dot\r\nbody  \r\n\r\n"
)
KEYS = (SigningKey("example.org", "rsa1"), SigningKey("example.org", "ed1", bits=0))


@pytest.fixture(scope="module")
def passwords() -> Iterator[PasswordServer]:
    server = PasswordServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def store(passwords: PasswordServer, tls: Tls) -> Iterator[Postfix]:
    server = submission_postfix(passwords, tls)
    yield server
    server.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Value]:
    """The settings `keys` of dkim_sign."""
    directory = tmp_path_factory.mktemp("keys")
    tables: list[Value] = []
    for key in KEYS:
        file = directory / f"{key.selector}.pem"
        file.write_bytes(
            key.private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        tables.append({"domain": key.domain, "selector": key.selector, "key_file": str(file)})
    return tables


@pytest.fixture(scope="module")
def submission(
    passwords: PasswordServer,
    store: Postfix,
    tls: Tls,
    keys: list[Value],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    """A gateway that asks Dovecot, signs, and delivers as the user (XCLIENT LOGIN)."""
    sections = submission_sections(
        store,
        tls,
        {"backend": "dovecot", "address": f"unix:{passwords.socket}"},
        policy={"dkim_sign": {"settings": {"keys": keys}}},
    )
    gateway = Gateway(config_for(store.address, overrides=sections), tmp_path_factory.mktemp("submission"))
    try:
        gateway.wait_ready()
        yield gateway
        gateway.stop()
    finally:
        gateway.kill()


def plain(user: str, password: str, authzid: str = "") -> str:
    return base64.b64encode(f"{authzid}\0{user}\0{password}".encode()).decode()


def word(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def in_tls(gateway: Gateway, tls: Tls, source: str | None = None) -> Client:
    """A client of port 587 that has gone as far as EHLO inside TLS."""
    client = gateway.submit(source)
    client.hello()
    assert client.command("STARTTLS").code == 220
    client.start_tls(tls.trusting)
    assert client.command("EHLO client.example.net").code == 250
    return client


def logged_in(gateway: Gateway, tls: Tls, user: str = ANN, source: str | None = None) -> Client:
    client = in_tls(gateway, tls, source)
    assert client.command(f"AUTH PLAIN {plain(user, PASSWORDS[user])}").code == 235
    return client


# --- the dialogue -----------------------------------------------------------------------------------------


def test_the_dialogue_of_the_reference_texts(
    submission: Gateway, store: Postfix, tls: Tls, rcpt: str
) -> None:
    with submission.submit() as client:
        offered = client.hello().texts
        assert "STARTTLS" in offered
        assert not any(line.startswith("AUTH") for line in offered)
        assert client.command("STARTTLS").code == 220
        client.start_tls(tls.trusting)
        offered = client.command("EHLO client.example.net").texts
        assert "AUTH PLAIN LOGIN" in offered
        assert "STARTTLS" not in offered
        assert client.command("AUTH LOGIN").lines == ("334 VXNlcm5hbWU6",)
        assert client.command(word(ANN)).lines == ("334 UGFzc3dvcmQ6",)
        assert client.command(word(PASSWORDS[ANN])).lines == ("235 2.7.0 Authentication successful",)
        assert [reply.code for reply in client.envelope(ANN, [rcpt])] == [250, 250]
        reply = client.data(MESSAGE)
        # the downstream's own
        assert (reply.code, reply.enhanced) == (250, "2.0.0")
        assert "queued as" in str(reply)
        assert client.command("QUIT").code == 221

    stored = store.wait_stored(rcpt)
    head, _, body = stored.partition(b"\n\n")
    unfolded = b" ".join(head.split())
    assert b"with ESMTPSA id" in unfolded
    # XCLIENT LOGIN: Postfix knows who it was
    assert b"(Authenticated sender: ann@example.org)" in unfolded
    # what is ours only does not leave
    assert b"Authentication-Results" not in head
    assert b"Message-ID: <" in head
    assert b"\nDate: " in head
    assert body == b".dot\nbody  \n\n"


def test_implicit_tls_needs_no_starttls(submission: Gateway, tls: Tls, rcpt: str) -> None:
    with Client(submission.submission_tls, tls=tls.trusting) as client:
        assert "AUTH PLAIN LOGIN" in client.hello().texts
        assert client.envelope(ANN, [rcpt])[0].enhanced == "5.7.0"
        assert client.command("AUTH PLAIN").lines == ("334 ",)
        assert client.command(plain(ANN, PASSWORDS[ANN])).code == 235
        assert [reply.code for reply in client.envelope(ANN, [rcpt])] == [250, 250]


def test_an_mx_listener_never_offers_auth(submission: Gateway, tls: Tls) -> None:
    with submission.connect() as client:
        assert not any("AUTH" in line for line in client.hello().texts)
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 502
        assert client.command("STARTTLS").code == 220
        client.start_tls(tls.trusting)
        assert not any("AUTH" in line for line in client.command("EHLO client.example.net").texts)
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 502
        assert client.command("AUTH LOGIN").code == 502
        # and nobody relays there
        assert [reply.code for reply in client.envelope(ANN, [RCPT])] == [250, 550]


def test_passwords_are_utf8(submission: Gateway, tls: Tls) -> None:
    with logged_in(submission, tls, BOB):
        pass


# --- real clients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_swaks(submission: Gateway, store: Postfix, tls: Tls, rcpt: str, mechanism: str) -> None:
    require(program="swaks")
    host, port = submission.submission
    sent = subprocess.run(
        [
            *("swaks", "--server", host, "--port", str(port), "--helo", "client.example.net", "--tls"),
            *("--tls-verify", "--tls-ca-path", str(tls.ca_file)),
            *("--auth", mechanism, "--auth-user", ANN, "--auth-password", PASSWORDS[ANN]),
            *("--from", ANN, "--to", rcpt, "--h-From", ANN),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert b"ESMTPSA" in store.wait_stored(rcpt)


@pytest.mark.parametrize("is_implicit", [False, True])
def test_smtplib(submission: Gateway, store: Postfix, tls: Tls, rcpt: str, is_implicit: bool) -> None:
    context = ssl.create_default_context(cafile=tls.ca_file)
    if is_implicit:
        client: smtplib.SMTP = smtplib.SMTP_SSL(*submission.submission_tls, timeout=15, context=context)
    else:
        client = smtplib.SMTP(*submission.submission, timeout=15)
        client.starttls(context=context)
    with client:
        client.login(ANN, PASSWORDS[ANN])
        assert client.sendmail(ANN, [rcpt], MESSAGE) == {}
    assert b"ESMTPSA" in store.wait_stored(rcpt)


def test_msmtp(submission: Gateway, store: Postfix, tls: Tls, rcpt: str, tmp_path: Path) -> None:
    require(program="msmtp")
    host, port = submission.submission_tls
    config = tmp_path / "msmtprc"
    config.write_text(
        f"account default\nhost {host}\nport {port}\nfrom {ANN}\nauth plain\nuser {ANN}\n"
        f"password {PASSWORDS[ANN]}\ntls on\ntls_starttls off\ntls_trust_file {tls.ca_file}\n"
        "domain client.example.net\n",
        encoding="utf-8",
    )
    config.chmod(0o600)
    sent = subprocess.run(
        ["msmtp", "-C", str(config), rcpt],
        input=MESSAGE.replace(b"\r\n", b"\n"),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert sent.returncode == 0, sent.stderr
    assert b"ESMTPSA" in store.wait_stored(rcpt)


def test_openssl_s_client(submission: Gateway, tls: Tls) -> None:
    host, port = submission.submission
    shown = subprocess.run(
        [
            *("openssl", "s_client", "-starttls", "smtp", "-connect", f"{host}:{port}", "-quiet", "-crlf"),
            *("-verify_return_error", "-CAfile", str(tls.ca_file), "-verify_hostname", "mx.example.org"),
        ],
        input=b"EHLO client.example.net\nQUIT\n",
        capture_output=True,
        timeout=30,
        check=False,
    )
    # -quiet turns its own commands off; the two lines come in one write, which is a violation behind EHLO
    assert b"554 5.5.1" in shown.stdout or b"250-AUTH PLAIN LOGIN" in shown.stdout, shown


# --- signatures -------------------------------------------------------------------------------------------


def test_two_independent_verifiers_accept_the_signatures(
    submission: Gateway, store: Postfix, tls: Tls, rcpt: str, tmp_path: Path
) -> None:
    # over the 2 MiB that are kept in memory, with white space and dots that canonicalisation and stuffing meet
    line = b".  a\t b" + b"x" * 60 + b"  \r\n"
    body = line * (3 * 1024 * 1024 // len(line)) + b"\r\n\r\n"
    with logged_in(submission, tls) as client:
        client.envelope(ANN, [rcpt])
        assert client.data(MESSAGE + body).code == 250
    signed = store.wait_stored(rcpt).replace(b"\n", b"\r\n")
    records = {f"{key.name}.": key.record.encode() for key in KEYS}

    verifier = dkim.DKIM(signed)
    for number in range(len(KEYS)):
        assert verifier.verify(idx=number, dnsfunc=lambda name, **_: records.get(name.decode()))

    require(program="opendkim")
    (tmp_path / "keys").write_text("".join(f"{key.name} {key.record}\n" for key in KEYS))
    (tmp_path / "conf").write_text(
        f"Mode v\nTestPublicKeys {tmp_path}/keys\nSocket local:{tmp_path}/sock\nSyslog no\nUserID root\n"
    )
    (tmp_path / "mail").write_bytes(signed)
    told = subprocess.run(
        ["opendkim", "-x", str(tmp_path / "conf"), "-t", str(tmp_path / "mail"), "-vvv"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout.count("dkim=pass") == len(KEYS), told.stdout + told.stderr

    # and a change to what was signed is seen: neither of the two says yes to everything
    forged = dkim.DKIM(signed.replace(b"Subject: Hello", b"Subject: Hullo", 1))
    assert not forged.verify(idx=0, dnsfunc=lambda name, **_: records.get(name.decode()))


# --- who may write as whom --------------------------------------------------------------------------------


def test_nobody_writes_in_the_name_of_another(submission: Gateway, tls: Tls, rcpt: str) -> None:
    with logged_in(submission, tls) as client:
        assert [reply.enhanced for reply in client.envelope(BOB, [rcpt])] == ["2.1.0", "5.7.1"]
        assert client.command("RSET").code == 250
        client.envelope(ANN, [rcpt])
        refused = client.data(MESSAGE.replace(b"ann@", b"bob@"))
        assert (refused.code, refused.enhanced) == (550, "5.7.1")


# --- order and bad input ----------------------------------------------------------------------------------


def test_nothing_is_obeyed_before_tls(submission: Gateway) -> None:
    with submission.submit() as client:
        client.hello()
        for line in (f"MAIL FROM:<{ANN}>", f"RCPT TO:<{RCPT}>", "DATA", "VRFY ann", "RSET", "HELP"):
            refused = client.command(line)
            assert (refused.code, refused.enhanced) == (530, "5.7.0"), line
        assert client.command("NOOP").code == 250
        for line in (f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}", "AUTH LOGIN"):
            refused = client.command(line)
            assert (refused.code, refused.enhanced) == (538, "5.7.11")
        assert client.command("QUIT").code == 221


def test_plaintext_behind_starttls_ends_the_session(submission: Gateway, tls: Tls) -> None:
    with submission.submit() as client:
        client.hello()
        client.send(f"STARTTLS\r\nAUTH PLAIN {plain(ANN, PASSWORDS[ANN])}\r\n".encode())
        assert client.is_at_eof()


def test_authentication_is_required_once_and_before_mail(submission: Gateway, tls: Tls, rcpt: str) -> None:
    with in_tls(submission, tls) as client:
        assert client.envelope(ANN, [rcpt])[0].lines == ("530 5.7.0 Authentication required",)
        for line, code in (
            ("AUTH", 501),
            ("AUTH CRAM-MD5", 504),
            ("AUTH PLAIN !!!", 501),
            ("AUTH PLAIN =", 501),
            (f"AUTH PLAIN {word('no parts')}", 501),
        ):
            assert client.command(line).code == code, line
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 235
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 503
        client.envelope(ANN, [rcpt])
        assert client.command("AUTH LOGIN").code == 503
        assert client.data(MESSAGE).code == 250


def test_an_exchange_that_is_cancelled_leaves_nothing(submission: Gateway, tls: Tls) -> None:
    with in_tls(submission, tls) as client:
        assert client.command("AUTH LOGIN").code == 334
        assert client.command("*").code == 501
        assert client.command("AUTH LOGIN").code == 334
        assert client.command(word(ANN)).code == 334
        assert client.command("*").code == 501
        # the name that was said is forgotten
        assert client.command("AUTH LOGIN").lines == ("334 VXNlcm5hbWU6",)
        assert client.command(word(BOB)).code == 334
        assert client.command(word(PASSWORDS[BOB])).code == 235


def test_what_is_pipelined_behind_auth_ends_the_session(submission: Gateway, tls: Tls) -> None:
    with in_tls(submission, tls) as client:
        client.send(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}\r\nMAIL FROM:<{ANN}>\r\n".encode())
        assert client.read_reply().lines == ("554 5.5.1 Protocol violation: you spoke before your turn",)
        assert client.is_at_eof()


def test_a_response_may_have_12288_octets(submission: Gateway, tls: Tls) -> None:
    with in_tls(submission, tls) as client:
        assert client.command("AUTH PLAIN").code == 334
        assert client.command("A" * 12284).enhanced == "5.5.2"
        assert client.command("AUTH PLAIN").code == 334
        assert client.command("A" * 12288).enhanced == "5.5.6"
        # it is not taken for a command, neither the whole nor its rest
        assert client.command("NOOP").code == 250
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 235


@pytest.mark.parametrize(
    "user",
    [
        "nobody@example.org",
        "ann@example.org\n",
        "x" * 400,
        "a\tuser=ann@example.org",
        "{}%s$(id)",
        "\u202eann",
    ],
)
def test_all_who_are_refused_get_the_same_reply(submission: Gateway, tls: Tls, user: str) -> None:
    with in_tls(submission, tls) as client:
        wrong = client.command(f"AUTH PLAIN {plain(user, 'wrong')}")
        assert wrong.lines == ("535 5.7.8 Authentication credentials invalid",)
        assert client.command(f"AUTH PLAIN {plain(ANN, 'wrong')}") == wrong
        # somebody else's rights are nobody's
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN], BOB)}") == wrong
        assert client.read_reply().code == 421
        assert client.is_at_eof()


# --- guessing ---------------------------------------------------------------------------------------------


def guess(gateway: Gateway, tls: Tls, source: str) -> list[int]:
    """Guess Ann's password in session after session, until one is cut at its first attempt or in its middle."""
    replies: list[int] = []
    while True:
        with in_tls(gateway, tls, source) as client:
            codes: list[int] = []
            while codes[-1:] != [421]:
                if len(codes) == 3:
                    codes.append(client.read_reply().code)
                else:
                    codes.append(client.command(f"AUTH PLAIN {plain(ANN, f'guess{len(replies)}')}").code)
            assert client.is_at_eof()
        replies += codes
        if codes != [535, 535, 535, 421]:
            return replies


@pytest.mark.full
def test_who_guesses_is_slowed_and_cut_while_the_user_works_on(
    passwords: PasswordServer, store: Postfix, tls: Tls, start_gateway: StartGateway, rcpt: str
) -> None:
    gateway = start_gateway(
        store.address,
        submission_sections(
            store,
            tls,
            {
                "address": f"unix:{passwords.socket}",
                "failure_delay_s": 0.5,
                "max_failures_per_client": 5,
                "max_failures_per_user": 8,
            },
        ),
    )
    logged_in(gateway, tls, source="127.0.0.2").close()
    begun = time.monotonic()
    # cut by its own failures, then by those of the user's name; and by three in a session
    assert guess(gateway, tls, "127.0.0.66") == [535, 535, 535, 421, 535, 535, 421]
    assert guess(gateway, tls, "127.0.0.67") == [535, 535, 535, 421, 421]
    # each of the ten attempts took its time
    assert time.monotonic() - begun >= 10 * 0.5
    # nobody asks for the password any more, not even for the right one
    with in_tls(gateway, tls, "127.0.0.66") as client:
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 421
    # but the user, from where the user has been before
    with logged_in(gateway, tls, source="127.0.0.2") as client:
        client.envelope(ANN, [rcpt])
        assert client.data(MESSAGE).code == 250
    # and another user, from anywhere
    logged_in(gateway, tls, BOB, source="127.0.0.3").close()

    def counted() -> tuple[float, ...]:
        attempts = (
            gateway.metric("mxgate_auth_attempts_total", outcome=outcome)
            for outcome in ("refused", "limited")
        )
        return (*attempts, gateway.metric("mxgate_transactions_total", role="submission", action="accepted"))

    # workers push what they count each second
    wait_until(lambda: counted() == (8, 3, 1), within_s=10, what="the attempts in /metrics")
    # no secret in the log
    assert "guess1" not in gateway.log()
    assert PASSWORDS[ANN] not in gateway.log()
    assert plain(ANN, PASSWORDS[ANN]) not in gateway.log()


# --- back-ends --------------------------------------------------------------------------------------------


@pytest.mark.full
def test_an_outage_of_dovecot_is_454(tls: Tls, store: Postfix, start_gateway: StartGateway) -> None:
    passwords = PasswordServer()
    try:
        host, port = passwords.address
        gateway = start_gateway(store.address, submission_sections(store, tls, {"address": f"{host}:{port}"}))
        logged_in(gateway, tls).close()
        passwords.stop()
        with in_tls(gateway, tls) as client:
            for _ in range(5):
                assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").lines == (
                    "454 4.7.0 Temporary authentication failure",
                )
            passwords.start()
            assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 235
    finally:
        passwords.close()


def test_the_downstreams_submission_port_is_asked(
    tls: Tls, store: Postfix, start_gateway: StartGateway, rcpt: str
) -> None:
    host, port = store.address
    auth: dict[str, Value] = {
        "backend": "downstream",
        "address": f"{host}:{port}",
        "tls_ca_file": str(tls.ca_file),
        "tls_name": "mx.example.org",
    }
    gateway = start_gateway(store.address, submission_sections(store, tls, auth))
    with logged_in(gateway, tls) as client:
        client.envelope(ANN, [rcpt])
        assert client.data(MESSAGE).code == 250
    with in_tls(gateway, tls) as client:
        assert client.command(f"AUTH PLAIN {plain(ANN, 'wrong')}").code == 535


@pytest.mark.full
def test_the_postfix_of_the_docs(
    tls: Tls, passwords: PasswordServer, start_gateway: StartGateway, rcpt: str
) -> None:
    """docs/submission.md: a port without TLS that takes users from the gateway alone."""
    options = {
        name: value.replace("private/auth", str(passwords.socket))
        for name, value in re.findall(r"^  -o (\w+)=(.*)$", DOCS.read_text("utf-8"), re.MULTILINE)
        if name != "syslog_name"
    }
    assert len(options) == 7
    postfix = Postfix(options | {"virtual_mailbox_domains": "example.org example.net"})
    try:
        gateway = start_gateway(
            postfix.address, submission_sections(postfix, tls, {"address": f"unix:{passwords.socket}"})
        )
        with logged_in(gateway, tls) as client:
            assert [reply.code for reply in client.envelope(ANN, [rcpt])] == [250, 250]
            assert client.data(MESSAGE).code == 250
        postfix.wait_stored(rcpt)
        assert "sasl_username=ann@example.org" in postfix.log()
    finally:
        postfix.close()


@pytest.mark.full
@pytest.mark.parametrize("key", ["tls_ca_file", "tls_name"])
def test_a_password_goes_nowhere_without_a_valid_certificate(
    tls: Tls, store: Postfix, start_gateway: StartGateway, key: str
) -> None:
    host, port = store.address
    auth: dict[str, Value] = {
        "backend": "downstream",
        "address": f"{host}:{port}",
        "tls_ca_file": str(tls.ca_file),
        "tls_name": "mx.example.org",
    }
    auth[key] = "" if key == "tls_ca_file" else "other.example.org"
    gateway = start_gateway(store.address, submission_sections(store, tls, auth))
    with in_tls(gateway, tls) as client:
        assert client.command(f"AUTH PLAIN {plain(ANN, PASSWORDS[ANN])}").code == 454
    [line] = [line for line in gateway.log().splitlines() if "auth.unavailable" in line]
    assert "certificate verify failed" in json.loads(line)["error"]


# --- the process ------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_reload_begins_and_ends_submission(
    tls: Tls, store: Postfix, passwords: PasswordServer, start_gateway: StartGateway, rcpt: str
) -> None:
    sections = submission_sections(store, tls, {"address": f"unix:{passwords.socket}"})
    without = {key: value for key, value in sections.items() if key not in ("submission", "relay")}
    gateway = start_gateway(store.address, without)
    before = gateway.config_file.read_text(encoding="utf-8")
    admin = re.search(r'\[admin\]\nlisten = "([^"]+)"', before)
    server = re.search(r'^listen = (\["[^"]+"\])$', before, re.MULTILINE)
    assert admin
    assert server
    added = to_toml(config_for(store.address, overrides=sections))
    added = re.sub(r'\[admin\]\nlisten = "[^"]+"', admin[0], added)
    added = re.sub(r'(\[server\]\nhostname = "[^"]+"\nlisten = )\["[^"]+"\]', rf"\1{server[1]}", added)
    gateway.config_file.write_text(added, encoding="utf-8")
    own = sections["submission"]
    assert isinstance(own, dict)
    assert isinstance(own["listen"], list)
    host, _, port = str(own["listen"][0]).rpartition(":")
    gateway.submission = host, int(port)
    assert not is_listening(gateway.submission)

    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: is_listening(gateway.submission), within_s=15, what="submission listens")
    with logged_in(gateway, tls) as client:
        client.envelope(ANN, [rcpt])
        assert client.data(MESSAGE).code == 250

    gateway.config_file.write_text(before, encoding="utf-8")
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not is_listening(gateway.submission), within_s=15, what="submission is over")
    with gateway.connect() as client:
        client.hello()
