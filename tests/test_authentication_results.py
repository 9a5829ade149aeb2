"""The gatekeeper and Authentication-Results: ours stands on top, and nothing that could be taken for it comes in."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from gateway.decision import DecisionRing
from gateway.gatekeeper import GatekeeperSettings
from gateway.mail.authres import parse
from gateway.mail.digest import BodyDigest, Canonicalization
from gateway.plan import Step
from gateway.policy import Mode, NoSettings, OnError, Policy, Watch
from gateway.session import Transaction
from gateway.smtp.reply import Reply
from gateway.verdict import AddField, AuthResult, Evidence, Result, Stage, Verdict, proceed, quarantine
from tests.fakes import FakeServices, Says
from tests.world import ABOVE, AUTHRES, EARLY, MESSAGE, RECEIVED, World, envelope, rcpt, send

SPF = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "a@client.example"),))
DMARC = AuthResult("dmarc", Result.FAIL, "not aligned", (("header.from", "client.example"),))


class Fails(Policy[NoSettings]):
    """Fails at each stage where it is told to, and says `found` at the others."""

    name = "fails"
    method = "spf"

    def __init__(self, *stages: Stage, found: AuthResult | None = None) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.stages_ = stages
        self.found = [found] if found else []

    def _say(self, stage: Stage) -> Verdict:
        if stage in self.stages_:
            raise ConnectionError("no")
        return proceed(results=self.found if stage is Stage.EOM else ())

    async def on_connect(self, session: Any) -> Verdict:
        return self._say(Stage.CONNECT)

    async def on_ehlo(self, session: Any) -> Verdict:
        return self._say(Stage.EHLO)

    async def on_mail(self, tx: Transaction) -> Verdict:
        return self._say(Stage.MAIL)

    async def on_eom(self, tx: Transaction) -> Verdict:
        return self._say(Stage.EOM)


def field_of(message: bytes) -> bytes:
    """The value of the first field, which is to be ours."""
    name, _, value = message.split(b"\r\nReceived:")[0].partition(b": ")
    assert name == b"Authentication-Results"
    return value


# --- what is written ----------------------------------------------------------------------------------------


async def test_what_policies_found_stands_first_of_all() -> None:
    says = Says({Stage.MAIL: proceed(results=[SPF], edits=[AddField("Received-SPF", "pass")])})
    world = World(says, Says2({Stage.EOM: quarantine("spam", results=[DMARC])}))
    await world.message()
    assert world.relay.delivered[0].message == (
        b"Authentication-Results: mx.example.org;\r\n"
        b"\tspf=pass smtp.mailfrom=a@client.example;\r\n"
        b'\tdmarc=fail reason="not aligned" header.from=client.example\r\n'
        b"X-Mxgate-Quarantine: spam\r\n"
        b"Received-SPF: pass\r\n" + RECEIVED + MESSAGE
    )


class Says2(Says):
    name = "says2"


@pytest.mark.parametrize(
    ("settings", "authserv_id"),
    [({}, b"mx.example.org"), ({"authserv_id": "filter.example.org"}, b"filter.example.org")],
)
async def test_the_authserv_id_is_the_host_name_unless_set(
    settings: dict[str, str], authserv_id: bytes
) -> None:
    world = World(settings=GatekeeperSettings("mx.example.org", **settings))  # type: ignore[arg-type]
    await world.message()
    assert field_of(world.relay.delivered[0].message) == authserv_id + b"; none"


async def test_text_beyond_ascii_is_for_messages_that_may_have_it() -> None:
    found = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "ü@client.example"),))
    world = World(Says({Stage.EOM: proceed(results=[found])}))
    talk = await world.greet()
    for smtputf8 in (True, False):
        await talk.mail(replace(envelope(), smtputf8=smtputf8))
        await talk.rcpt([rcpt("b@example.org")])
        send(talk)
        await talk.eom(None)
    utf8, ascii_ = (field_of(each.message) for each in world.relay.delivered)
    assert utf8.endswith('smtp.mailfrom="ü@client.example"'.encode())
    assert ascii_.endswith(b'smtp.mailfrom="?@client.example"')


@pytest.mark.parametrize(
    ("mode", "exempt", "written"),
    [
        (Mode.ENFORCE, (), b"mx.example.org;\r\n\tspf=pass smtp.mailfrom=a@client.example"),
        (Mode.OBSERVE, (), b"mx.example.org;\r\n\tspf=pass smtp.mailfrom=a@client.example"),
        (Mode.OFF, (), b"mx.example.org; none"),
        (Mode.ENFORCE, (ip_network("192.0.2.0/24"),), b"mx.example.org; none"),
    ],
)
async def test_observed_policies_are_reported_and_those_that_do_not_run_are_not(
    mode: Mode, exempt: tuple[Any, ...], written: bytes
) -> None:
    says = Says({Stage.MAIL: proceed(results=[SPF])})
    world = World(Step(says, 10, OnError.CONTINUE, mode, exempt))
    await world.message()
    assert field_of(world.relay.delivered[0].message) == written


@pytest.mark.parametrize(
    ("policy", "written"),
    [
        (Fails(Stage.EOM), b'spf=temperror reason="policy failed"'),
        (Fails(*EARLY), b'spf=temperror reason="policy failed"'),
        (Fails(*EARLY, Stage.EOM), b'spf=temperror reason="policy failed"'),
        (Fails(*EARLY, found=SPF), b"spf=pass smtp.mailfrom=a@client.example"),
    ],
)
async def test_a_policy_that_fails_has_one_result(policy: Fails, written: bytes) -> None:
    ring = DecisionRing()
    world = World(policy, decisions=ring)
    await world.message()
    assert field_of(world.relay.delivered[0].message) == b"mx.example.org;\r\n\t" + written
    (record,) = ring.latest(1)
    assert len(record.results) == 1
    assert record.authserv_id == "mx.example.org"


async def test_signatures_have_a_result_each() -> None:
    found = [
        AuthResult("dkim", result, properties=(("header.s", selector),))
        for result, selector in ((Result.PASS, "s1"), (Result.FAIL, "s2"), (Result.FAIL, "s2"))
    ]
    world = World(Says({Stage.EOM: proceed(results=found)}))
    await world.message()
    read = parse(field_of(world.relay.delivered[0].message))
    assert [each.result for each in read.results] == ["pass", "fail", "fail"]


async def test_results_are_logged_and_counted() -> None:
    found = [SPF, AuthResult("iprev", Result.FAIL)]
    world = World(Says({Stage.MAIL: proceed(results=found), Stage.EOM: proceed(results=[DMARC])}))
    await world.message()
    ((_, line),) = world.lines
    assert line["auth"] == "spf=pass iprev=fail dmarc=fail"
    assert world.services.metrics.of("mxgate_auth_results_total") == {
        ("spf", "pass"): 1,
        ("other", "fail"): 1,
        ("dmarc", "fail"): 1,
    }


# --- what is removed ----------------------------------------------------------------------------------------

FORGED = [
    b"Authentication-Results: mx.example.org; dmarc=pass header.from=bank.example\r\n",
    b"AUTHENTICATION-RESULTS: MX.Example.ORG; dmarc=pass\r\n",
    b"Authentication-Results: (c) mx.example.org (x) 1; dmarc=pass\r\n",
    b"Authentication-Results:\r\n\tmx.example.org;\r\n dmarc=pass\r\n",
    b"Authentication-Results : mx.example.org; dmarc=pass\r\n",
    b"Authentication-Results\r\n : mx.example.org; dmarc=pass\r\n",
    b'Authentication-Results: "mx.example.org."; dmarc=pass\r\n',
    b"Authentication-Results: old.example.org; dmarc=pass\r\n",
    b"Received-SPF: pass (mx.example.org: forged) client-ip=192.0.2.1\r\n",
    b"received-spf : fail\r\n folded\r\n",
    b"X-Mxgate-Quarantine: spam\r\n",
]
KEPT = [
    b"Authentication-Results: other.example; dmarc=pass\r\n\t(mx.example.org)\r\n",
    b"authentication-results :other.example 1 ; none\r\n",
    b"Authentication-Results: mx.example.org.other.example; spf=pass\r\n",
    b"Authentication-Results:\r\n",
    b"ARC-Authentication-Results: i=1; mx.example.org; dmarc=pass\r\n",
    b"no field at all\r\n",
    b"X-Received-SPF: pass\r\n",
]
SETTINGS = GatekeeperSettings("mx.example.org", authserv_id_aliases=("old.example.org",))


@pytest.mark.parametrize("is_stuffed", [True, False], ids=["data", "bdat"])
async def test_forged_fields_go_and_others_stay_where_and_as_they_were(is_stuffed: bool) -> None:
    mixed = [field for pair in zip(FORGED, KEPT * 2, strict=False) for field in pair]
    world = World(settings=SETTINGS)
    await world.message(b"".join([*mixed, MESSAGE]), is_stuffed=is_stuffed)
    kept = b"".join(field for field in mixed if field in KEPT)
    assert world.relay.delivered[0].message == ABOVE + kept + MESSAGE


@pytest.mark.parametrize("field", FORGED, ids=lambda field: ascii(field)[2:50])
async def test_each_forged_field_goes_however_often_it_is_there(field: bytes) -> None:
    world = World(settings=SETTINGS)
    await world.message(field * 50 + MESSAGE)
    assert world.relay.delivered[0].message == ABOVE + MESSAGE


@pytest.mark.parametrize("field", KEPT, ids=lambda field: ascii(field)[2:50])
async def test_fields_of_others_are_not_touched(field: bytes) -> None:
    world = World(settings=SETTINGS)
    await world.message(field + MESSAGE)
    assert world.relay.delivered[0].message == ABOVE + field + MESSAGE


async def test_an_incoming_field_in_the_body_is_content() -> None:
    world = World()
    message = MESSAGE + FORGED[0]
    await world.message(message)
    assert world.relay.delivered[0].message == ABOVE + message


# --- verdicts that are none ------------------------------------------------------------------------------------


class Told:
    """Evidence as it should be."""

    def lines(self) -> list[str]:
        return ["seen"]


@pytest.mark.parametrize(
    "verdict",
    [
        proceed(results=[AuthResult("spf", "pass")]),  # type: ignore[arg-type]
        proceed(results=[AuthResult("spf", Result.PASS, b"x")]),  # type: ignore[arg-type]
        proceed(results=[AuthResult("spf", Result.PASS, properties=[("a.b", "c")])]),  # type: ignore[arg-type]
        proceed(results=[AuthResult("spf", Result.PASS, properties=(("a.b", 1),))]),  # type: ignore[arg-type]
        proceed(results=[AuthResult("spf", Result.PASS, properties=(("a.b",),))]),  # type: ignore[arg-type]
        proceed(results=[AuthResult(1, Result.PASS)]),  # type: ignore[arg-type]
        proceed(reason="x", evidence="told"),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_result_or_evidence_is_a_failure_of_its_policy(verdict: Verdict) -> None:
    world = World(Says({Stage.EOM: verdict}))
    answer = await world.message()
    assert answer.reply.is_positive
    assert world.relay.delivered[0].message == AUTHRES + RECEIVED + MESSAGE
    assert world.services.metrics["mxgate_policy_failures_total", "says", "eom", "verdict"] == 1


async def test_evidence_is_kept_for_the_record() -> None:
    evidence: Evidence = Told()
    ring = DecisionRing()
    await World(Says({Stage.EOM: proceed(evidence=evidence)}), decisions=ring).message()
    (record,) = ring.latest(1)
    assert record.judged[-1].verdict.evidence is evidence


# --- digests of the body -----------------------------------------------------------------------------------------


class Digests(Policy[NoSettings]):
    """Wants a digest of the body, and keeps what came of it."""

    name = "digests"

    def __init__(self) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.found: list[BodyDigest] = []

    def on_header(self, tx: Transaction) -> Watch | None:
        assert tx.message is not None
        tx.message.digests.want(Canonicalization.SIMPLE)
        return None

    async def on_eom(self, tx: Transaction) -> Verdict:
        assert tx.message is not None
        self.found.append(tx.message.digests.get(Canonicalization.SIMPLE))
        return proceed()


@pytest.mark.parametrize("is_stuffed", [True, False], ids=["data", "bdat"])
@pytest.mark.parametrize(
    "message", [MESSAGE, MESSAGE + b"..\r\n.\r\nx\r\n", b"From: a@client.example\r\n\r\n", b"\r\n.x\r\n"]
)
async def test_digests_are_of_the_body_as_the_sender_meant_it(message: bytes, is_stuffed: bool) -> None:
    digests = Digests()
    answer = await World(digests).message(message, is_stuffed=is_stuffed)
    assert answer.reply == Reply(250, "2.0.0", "Stored as 1")
    body = message[2:] if message.startswith(b"\r\n") else message.partition(b"\r\n\r\n")[2]
    (found,) = digests.found
    # RFC 6376 3.4.3: an empty body has one line end
    assert found == digest_of(body or b"\r\n")


def digest_of(body: bytes) -> BodyDigest:
    from hashlib import sha256

    return BodyDigest(sha256(body).digest(), len(body))


async def test_a_digest_that_fails_is_a_failure_of_who_wants_it_and_of_nobody_else() -> None:
    class Broken(type(World().gate.new_digests())):  # type: ignore[misc]
        def block(self, data: bytes) -> None:
            raise MemoryError

    digests = Digests()
    world = World(digests)
    world.gate.new_digests = Broken
    answer = await world.message()
    assert answer.reply.is_positive
    assert digests.found == []
    assert world.services.metrics["mxgate_policy_failures_total", "digests", "eom", "exception"] == 1
