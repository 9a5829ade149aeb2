"""Submission in the gatekeeper, the pipeline and the configuration: what is different for who has authenticated."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.auth import DovecotBackend, DownstreamBackend
from gateway.app import (
    auth_backend,
    authentication_settings,
    gatekeeper_settings,
    listener_settings,
    relay_settings,
    server_settings,
    views,
)
from gateway.authentication import AuthenticationSettings, Authenticator
from gateway.config import ConfigError, load
from gateway.gatekeeper import Answer, Conversation, GatekeeperSettings
from gateway.mail.message import Header
from gateway.plan import Override, Step
from gateway.plugins import plan
from gateway.policy import Mode, NoSettings, OnError, Policy
from gateway.session import Role, Session, Transaction, Trust
from gateway.smtp import reply
from gateway.smtp.sasl import Credentials, Mechanism
from gateway.store import Keyspace
from gateway.testing.store import FakeStore
from gateway.verdict import AddField, Stage, Verdict, defer, proceed, quarantine, reject
from policies.dkim_sign import DkimSignSettings
from policies.sender_login import SenderLoginSettings
from tests.fakes import FakeServices, Says
from tests.world import LATER, NEVER, TLS, World, envelope, rcpt, send

SETTINGS = GatekeeperSettings("mx.example.org", role=Role.SUBMISSION, adds_missing_fields=True)
RIGHT = Credentials(Mechanism.PLAIN, "ann", "right")
WRONG = Credentials(Mechanism.PLAIN, "ann", "wrong")


class Backend:
    async def check(self, credentials: Credentials, session: Session) -> str | None:
        return "ann@example.org" if credentials.password == "right" else None


def world_of(*policies: Policy[Any] | Step, settings: GatekeeperSettings = SETTINGS) -> World:
    world = World(*policies, settings=settings)
    services = world.services
    world.gate.authenticator = Authenticator(
        AuthenticationSettings(failure_delay_s=0),
        Backend(),
        Keyspace(FakeStore(services.clock), ""),
        services,
    )
    return world


async def logged_in(world: World) -> Conversation:
    talk = await world.greet()
    talk.tls_started(TLS)
    await talk.ehlo("client.example", esmtp=True)
    assert await talk.authenticate(RIGHT) == Answer(reply.AUTH_OK)
    return talk


async def left(world: World, message: bytes) -> bytes:
    """The message as the downstream gets it."""
    talk = await logged_in(world)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.net")])
    send(talk, message)
    assert (await talk.eom(None)).reply.code == 250
    return world.relay.delivered[0].message


# --- who it is --------------------------------------------------------------------------------------------


async def test_who_authenticates_is_that_user_from_then_on() -> None:
    world = world_of()
    talk = await world.greet()
    assert (talk.session.trust, talk.session.user, talk.session.role) == (
        Trust.UNTRUSTED,
        None,
        Role.SUBMISSION,
    )
    assert await talk.authenticate(WRONG) == Answer(reply.AUTH_REFUSED)
    assert (talk.session.trust, talk.session.user) == (Trust.UNTRUSTED, None)
    assert await talk.authenticate(RIGHT) == Answer(reply.AUTH_OK)
    await talk.ehlo("again.example", esmtp=True)
    assert (talk.session.trust, talk.session.user, talk.session.helo) == (
        Trust.AUTHENTICATED,
        "ann@example.org",
        "again.example",
    )


async def test_the_log_and_the_metrics_tell_the_role_and_the_user() -> None:
    world = world_of()
    await left(world, b"From: a@example.org\r\n\r\n")
    line = world.lines[-1][1]
    assert (line["role"], line["user"]) == ("submission", "ann@example.org")
    assert world.services.metrics["mxgate_transactions_total", "accepted", "", "", "submission"] == 1


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.EHLO])
async def test_what_was_held_against_a_stranger_is_dropped_where_users_are_exempt(stage: Stage) -> None:
    says = Says({stage: reject("listed", NEVER)})
    exempt = Step(says, 10, OnError.DEFER, exempt=(Trust.AUTHENTICATED,))
    for policy, answer in ((exempt, reply.RECIPIENT_OK), (says, NEVER)):
        world = world_of(policy)
        talk = await world.greet()
        await talk.authenticate(RIGHT)
        await talk.mail(envelope())
        assert (await talk.rcpt([rcpt("b@example.net")])).replies == (answer,)


# --- what leaves ------------------------------------------------------------------------------------------


async def test_a_message_gets_what_it_lacks_and_no_results() -> None:
    assert await left(world_of(), b"Subject: x\r\n\r\nbody\r\n") == (
        b"Received: from client.example ([192.0.2.1])\r\n"
        b"\tby mx.example.org with ESMTPSA id T1-1\r\n"
        b"\t(TLSv1.3 TLS_AES_128_GCM_SHA256)\r\n"
        b"\tfor <b@example.net>;\r\n"
        b"\tTue, 14 Nov 2023 22:13:20 +0000\r\n"
        b"Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n"
        b"Message-ID: <T1-1@mx.example.org>\r\n"
        b"Subject: x\r\n\r\nbody\r\n"
    )


async def test_a_message_that_lacks_nothing_is_left_alone() -> None:
    message = b"DATE: x\r\nMessage-Id: y\r\n\r\n.\r\n"
    left_as = await left(world_of(), message)
    assert left_as.endswith(b"+0000\r\n" + message)
    assert left_as.count(b"Received:") == 1


async def test_fields_are_added_only_where_the_operator_lets_us() -> None:
    settings = replace(SETTINGS, adds_missing_fields=False)
    assert b"Message-ID" not in await left(world_of(settings=settings), b"Subject: x\r\n\r\n")


async def test_forged_results_of_ours_are_removed_here_too() -> None:
    message = b"Authentication-Results: mx.example.org; spf=pass\r\nReceived-SPF: pass\r\nSubject: x\r\n\r\n"
    assert b"spf" not in (await left(world_of(), message)).lower()


# --- on_send ----------------------------------------------------------------------------------------------


class Signs(Policy[NoSettings]):
    """Keeps the header that it is given; says what it is told to say."""

    name = "signs"

    def __init__(self, verdict: Verdict | Exception | None = None) -> None:
        super().__init__(NoSettings(), FakeServices())
        field = AddField("DKIM-Signature", "v=1;\r\n\tb=x")
        self.verdict = verdict or proceed(edits=[field], reason="signed")
        self.header = b""

    async def on_send(self, tx: Transaction, header: Header) -> Verdict:
        self.header = header.octets
        for _ in range(5):
            await asyncio.sleep(0)  # as one whose key is elsewhere
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@pytest.mark.parametrize("is_stuffed", [False, True])
async def test_who_signs_sees_the_header_as_it_leaves(is_stuffed: bool) -> None:
    signs = Signs()
    adds = Says({Stage.EOM: proceed(edits=[AddField("X-A", "1")])})
    world = world_of(signs, adds)
    talk = await logged_in(world)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.net")])
    send(talk, b"Received-SPF: pass\r\n.odd: dot\r\nSubject: x\r\n\r\n.body\r\n", is_stuffed=is_stuffed)
    await talk.eom(None)
    message = world.relay.delivered[0].message
    assert message == b"DKIM-Signature: v=1;\r\n\tb=x\r\n" + signs.header + b"\r\n.body\r\n"
    assert signs.header.startswith(b"X-A: 1\r\nReceived: from")
    assert signs.header.endswith(b".odd: dot\r\nSubject: x\r\n")


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [
        (RuntimeError("no key"), reply.INTERNAL),
        (proceed(edits=[AddField("X-A", "1")]), reply.INTERNAL),
        (proceed(edits=[AddField("From", "a@b.c")]), reply.INTERNAL),
        (quarantine("odd"), reply.INTERNAL),
        (defer("later", LATER), LATER),
        (reject("never", NEVER), NEVER),
    ],
)
async def test_a_message_that_cannot_be_signed_does_not_leave(
    verdict: Verdict | Exception, answer: reply.Reply
) -> None:
    world = world_of(Step(Signs(verdict), 10, OnError.DEFER))
    talk = await logged_in(world)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.net")])
    send(talk)
    assert (await talk.eom(None)).reply == answer
    assert world.relay.delivered == []


async def test_a_signature_is_added_in_on_send_only() -> None:
    world = world_of(Says({Stage.EOM: proceed(edits=[AddField("DKIM-Signature", "x")])}))
    talk = await logged_in(world)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.net")])
    send(talk)
    await talk.eom(None)
    assert [line.event for line in world.services.log.of("error")] == ["policy.failed"]


async def test_a_policy_that_is_observed_or_exempt_or_off_adds_nothing() -> None:
    for step in (
        Step(Signs(), 10, OnError.DEFER, Mode.OBSERVE),
        Step(Signs(), 10, OnError.DEFER, exempt=(Trust.AUTHENTICATED,)),
        Step(Signs(), 10, OnError.DEFER, overrides=(Override("example.net", Mode.OFF),)),
    ):
        assert b"DKIM" not in await left(world_of(step), b"Subject: x\r\n\r\n")


# --- configuration ----------------------------------------------------------------------------------------

CONFIG = """\
server.hostname = "mx.example.org"
server.tls.cert_file = "/etc/mxgate/cert.pem"
server.tls.key_file = "/etc/mxgate/key.pem"
server.max_recipients = 200
relay.domains = ["example.org"]
relay.trusted_networks = ["10.0.0.0/8"]

[[relay.routes]]
downstream = ["192.0.2.5:25"]

[[relay.routes]]
name = "out"
domains = []
downstream = ["192.0.2.5:587"]
identity = "xclient"

[submission]
listen = ["0.0.0.0:587"]
listen_tls = ["0.0.0.0:465"]
route = "out"
max_recipients = 50
auth.address = "unix:/run/dovecot/auth-client"
"""


def loaded(tmp_path: Path, *changes: tuple[str, str], more: str = "") -> Any:
    text = CONFIG + more
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "mxgate.toml"
    file.write_text(text)
    return load(file, environ={})


def test_each_role_has_its_limits_route_and_policies(tmp_path: Path) -> None:
    mx, submission = views(loaded(tmp_path))
    assert [route.name for route in relay_settings(mx).routes] == ["route1"]
    [route] = relay_settings(submission).routes
    assert (route.name, route.domains, str(route.groups[0][0])) == ("out", ("*",), "192.0.2.5:587")
    assert (server_settings(mx).max_recipients, server_settings(submission).max_recipients) == (200, 50)
    assert (server_settings(mx).is_submission, server_settings(submission).is_submission) == (False, True)
    assert not server_settings(submission).has_recipient_groups
    assert listener_settings(submission).max_connections_per_client == 20
    assert gatekeeper_settings(mx).role is Role.MX
    settings = gatekeeper_settings(submission)
    assert (settings.role, settings.adds_missing_fields, settings.trusted_networks) == (
        Role.SUBMISSION,
        True,
        (),
    )
    assert not gatekeeper_settings(mx).adds_missing_fields
    assert "spf" in [each.name for each in plan(mx)]
    assert [each.name for each in plan(submission)] == ["relay_guard", "sender_login"]
    assert authentication_settings(submission) == AuthenticationSettings()


def test_without_addresses_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(CONFIG[: CONFIG.index("[[relay.routes]]\nname")])
    assert [view.role for view in views(load(file, environ={}))] == [Role.MX]


def test_policies_of_submission_are_told_where_they_are_written(tmp_path: Path) -> None:
    config = loaded(tmp_path, more="[submission.policy.dkim_sign.settings]\nkeys = []\n")
    with pytest.raises(ConfigError) as caught:
        plan(config.for_submission())
    [problem] = caught.value.problems
    assert "submission.policy.dkim_sign" in str(problem)
    assert "keys is empty" in str(problem)


@pytest.mark.parametrize(
    ("change", "key", "why"),
    [
        (('route = "out"', ""), "submission.route", "says where the mail goes"),
        (('route = "out"', 'route = "ot"'), "submission.route", "did you mean"),
        (("domains = []", 'domains = ["example.net"]'), "submission.route", "one of its own"),
        (('"0.0.0.0:465"', '"0.0.0.0:25"'), "submission.listen_tls", "listened on already"),
        (('"0.0.0.0:465"', '"0.0.0.0:587"'), "submission.listen_tls", "listened on already"),
        (
            ('"0.0.0.0:465"', '"192.0.2.1:25"'),
            "submission.listen_tls",
            "192.0.2.1:25 is listened on already by 0.0.0.0:25",
        ),
        (("server.tls.cert_file", "#"), "server.tls.key_file", "cert_file"),
        (
            ('auth.address = "unix:/run/dovecot/auth-client"', ""),
            "submission.auth.address",
            "where the back-end",
        ),
        (("unix:/run", "unix:run"), "submission.auth.address", "absolute path"),
        (("unix:/run/dovecot/auth-client", "nowhere"), "submission.auth.address", "no port"),
        (
            ("auth.address", 'auth.backend = "downstream"\nauth.address'),
            "submission.auth.address",
            "host:port",
        ),
        (("auth.address", "auth.tls_implicit = true\nauth.address"), "submission.auth.tls_implicit", "only"),
        (("auth.address", 'auth.backend = "ldap"\nauth.address'), "submission.auth.backend", "dovecot"),
        (
            ("auth.address", "auth.max_failures = 1\nauth.address"),
            "submission.auth.max_failures",
            "did you mean",
        ),
        (
            ("auth.address", 'policy.relay_guard.mode = "off"\nauth.address'),
            "submission.policy.relay_guard.mode",
            "open relay",
        ),
        (('listen = ["0.0.0.0:587"]\nlisten_tls = ["0.0.0.0:465"]', ""), "submission", "no effect"),
        (("relay.domains", 'quarantine.route = "out"\nrelay.domains'), "submission.route", "quarantine"),
        (("domains = []", 'domains = []\nprotocol = "lmtp"'), "submission.route", "LMTP"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    tmp_path: Path, change: tuple[str, str], key: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, change)
    told = [str(problem) for problem in caught.value.problems]
    assert any(key in each and why in each for each in told), told


def test_the_configurations_of_the_docs_are_accepted(tmp_path: Path) -> None:
    """docs/submission.md, with keys in the place of those that it names."""
    text = (Path(__file__).parents[1] / "docs" / "submission.md").read_text("utf-8")
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    first, downstream, *policies = blocks
    file = tmp_path / "mxgate.toml"
    common = (
        'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'
        '[[relay.routes]]\ndownstream = ["192.0.2.5:25"]\n'
    )
    file.write_text(common + first + "".join(policies))
    planned = {each.name: each.settings for each in plan(load(file, environ={}).for_submission())}
    assert list(planned) == ["relay_guard", "sender_login", "rate_limit", "dkim_sign"]
    assert isinstance(planned["dkim_sign"], DkimSignSettings)
    assert [each.selector for each in planned["dkim_sign"].keys] == ["2026a", "2026e"]
    file.write_text(common + first[: first.index("[submission.auth]")] + downstream)
    assert load(file, environ={}).submission.auth.backend == "downstream"


@pytest.mark.parametrize(
    ("policy", "settings"), [("sender_login", SenderLoginSettings), ("dkim_sign", DkimSignSettings)]
)
def test_each_setting_is_explained_in_the_words_of_the_policy(policy: str, settings: type) -> None:
    text = (Path(__file__).parents[1] / "docs" / "submission.md").read_text("utf-8")
    section = text[text.index(f"## {policy}") :].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", section, re.MULTILINE)
    assert rows == [(each.name, each.metadata["doc"]) for each in fields(settings)]


def test_submission_without_a_certificate_is_refused(tmp_path: Path) -> None:
    text = "\n".join(line for line in CONFIG.splitlines() if not line.startswith("server.tls"))
    file = tmp_path / "mxgate.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"submission\.listen: needs server\.tls\.cert_file"):
        load(file, environ={})


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ('"unix:/run/dovecot/auth-client"', DovecotBackend),
        ('"192.0.2.1:12345"', DovecotBackend),
        ('"mta.example.org:587"\nauth.backend = "downstream"', DownstreamBackend),
    ],
)
def test_the_backend_is_the_one_that_is_named(tmp_path: Path, address: str, kind: type) -> None:
    config = loaded(tmp_path, ('"unix:/run/dovecot/auth-client"', address))
    assert isinstance(auth_backend(config.for_submission()), kind)
