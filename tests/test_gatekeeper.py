"""gatekeeper: one session with a fake downstream, from the greeting to the reply that ends a message."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from io import FileIO
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from gateway.adapters.metrics import ProcessMetrics
from gateway.decision import Decision, DecisionRing, RcptAnswer
from gateway.gatekeeper import Answer, GatekeeperSettings, RcptAnswers, _ByReason
from gateway.mail.body import Spool
from gateway.policy import Outcome
from gateway.relaying import Delivery, Offer
from gateway.session import Envelope, Role, Trust
from gateway.smtp import reply
from gateway.smtp.command import Extension
from gateway.smtp.content import Fault, stuff
from gateway.smtp.reply import Reply
from gateway.verdict import (
    AddField,
    AuthResult,
    RemoveFields,
    Result,
    Stage,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)
from tests.fakes import STORED, Says, SaysBehind
from tests.world import (
    ABOVE,
    AUTHRES,
    CLIENT,
    EARLY,
    LATER,
    MESSAGE,
    NEVER,
    RECEIVED,
    TLS,
    UNKNOWN,
    World,
    envelope,
    rcpt,
    send,
    started,
)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- a message --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stuffed", [True, False], ids=["data", "bdat"])
async def test_a_message_is_accepted_with_the_downstreams_own_reply(is_stuffed: bool) -> None:
    world = World()

    assert await world.message(is_stuffed=is_stuffed) == Answer(STORED)

    (delivered,) = world.relay.delivered
    assert delivered.message == ABOVE + MESSAGE
    assert delivered.is_stuffed is is_stuffed
    assert [str(r.mailbox) for r in delivered.tx.envelope.rcpts] == ["b@example.org"]
    assert world.count("transactions") == {"accepted": 1}
    assert world.count("recipients") == {"accepted": 1}
    assert world.services.metrics["mxgate_content_bytes_total"] == len(
        stuff(MESSAGE) if is_stuffed else MESSAGE
    )
    assert world.spool.used_bytes == 0


@pytest.mark.parametrize("answer", [Reply(451, "4.3.0", "Later"), Reply(554, "5.7.1", "Spam")], ids=str)
async def test_what_the_downstream_refuses_is_refused_with_its_reply(answer: Reply) -> None:
    world = World()
    world.relay.delivery = Delivery(answer, stored=False, error="refused")

    assert await world.message() == Answer(answer)

    action = "deferred" if answer.is_transient else "rejected"
    assert world.count("transactions") == {action: 1}
    assert world.services.metrics["mxgate_content_bytes_total"] == 0
    ((event, keys),) = world.lines
    assert (event, keys["reason"], keys["code"]) == (f"message.{action}", "refused", answer.code)


async def test_who_decided_and_why_is_counted_with_the_action() -> None:
    world = World(Says({Stage.RCPT: reject("taste", NEVER)}))
    talk = await world.greet()
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.org")])
    talk.reset()
    metrics = world.services.metrics
    assert metrics.of("mxgate_recipients_total") == {("rejected", "says", "taste", "mx"): 1}
    assert metrics.of("mxgate_transactions_total") == {("rejected", "says", "taste", "mx"): 1}


def test_a_policy_that_makes_reasons_up_fills_no_memory() -> None:
    metrics = ProcessMetrics()
    counted = _ByReason(
        metrics.counters("mxgate_x_total", "X", ("action", "policy", "reason", "role")), Role.MX
    )
    for number in range(2000):
        counted["rejected", "odd", f"made_up_{number}"].inc()
    (family,) = metrics.families()
    children = family.children()
    assert len(children) == 501
    assert children["rejected", "odd", "other", "mx"] == [1500]


@pytest.mark.parametrize("answer", [STORED, Reply(354, "", "Go on")], ids=str)
async def test_nothing_is_accepted_that_was_not_stored(answer: Reply) -> None:
    world = World()
    world.relay.delivery = Delivery(answer, stored=False, error="protocol")

    assert await world.message() == Answer(reply.INTERNAL)
    assert world.count("transactions") == {"deferred": 1}


async def test_a_session_may_have_several_messages_each_with_its_own_id() -> None:
    world = World()
    talk = await world.greet()
    for _ in range(3):
        await talk.mail(envelope())
        await talk.rcpt([rcpt("b@example.org")])
        send(talk)
        assert await talk.eom(None) == Answer(STORED)

    assert [d.tx.id for d in world.relay.delivered] == ["T1-1", "T1-2", "T1-3"]
    assert [d.tx.session.id for d in world.relay.delivered] == ["T1"] * 3


async def test_a_message_too_large_for_memory_is_delivered_from_the_file() -> None:
    world = World()
    message = MESSAGE + b"x" * 70 + b"\r\n" + b"y" * 200_000 + b"\r\n"

    await world.message(message)

    assert world.relay.delivered[0].message == ABOVE + message
    assert world.spool.used_bytes == 0


@pytest.mark.parametrize(
    "message", [b"", b"\r\n", b"\r\nbody\r\n", b"A: 1\r\n", b"A: 1\r\n\r\n", b"no header\r\n"]
)
@pytest.mark.parametrize("is_stuffed", [True, False], ids=["data", "bdat"])
async def test_odd_messages_are_delivered_as_they_are(message: bytes, is_stuffed: bool) -> None:
    world = World()

    assert await world.message(message, is_stuffed=is_stuffed) == Answer(STORED)
    assert world.relay.delivered[0].message == ABOVE + message


async def test_received_tells_of_tls_and_of_several_recipients_nothing() -> None:
    world = World()
    talk = await world.greet()
    talk.tls_started(TLS)
    await talk.ehlo("client.example", esmtp=True)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.org"), rcpt("c@example.org")])
    send(talk)
    await talk.eom(None)

    prefix = world.relay.delivered[0].prefix
    assert b"with ESMTPS id T1-1\r\n\t(TLSv1.3 TLS_AES_128_GCM_SHA256);" in prefix
    assert b"example.org>" not in prefix


# --- sessions ---------------------------------------------------------------------------------------------


def test_trust_comes_from_the_address() -> None:
    world = World(
        settings=GatekeeperSettings(
            "mx.example.org", trusted_networks=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
        )
    )
    for address, trust in [
        ("192.0.2.9", Trust.TRUSTED),
        ("::ffff:192.0.2.9", Trust.TRUSTED),
        ("2001:db8::1", Trust.TRUSTED),
    ]:
        assert world.gate.open(ip_address(address), 1).session.trust is trust


def test_nobody_is_trusted_without_being_named() -> None:
    session = World().gate.open(ip_address("::ffff:127.0.0.1"), 1, TLS).session

    assert session.trust is Trust.UNTRUSTED
    assert session.client == ip_address("127.0.0.1")
    assert session.tls == TLS


async def test_what_was_said_before_tls_is_forgotten() -> None:
    world = World()
    talk = await world.greet()
    assert (talk.session.helo, talk.session.esmtp) == ("client.example", True)

    talk.tls_started(TLS)

    assert (talk.session.helo, talk.session.esmtp, talk.session.tls) == ("", False, TLS)


@pytest.mark.parametrize(
    ("offer", "size", "keywords"),
    [
        (
            Offer(eightbitmime=True, smtputf8=True, dsn=True, size=0),
            500,
            set(Extension) - {Extension.SIZE, Extension.AUTH},
        ),
        (Offer(eightbitmime=False, smtputf8=False, dsn=False, size=100), 100, set()),
        (Offer(eightbitmime=True, smtputf8=False, dsn=False, size=900), 500, {Extension.EIGHT_BIT_MIME}),
    ],
)
def test_ehlo_announces_what_all_downstreams_take(offer: Offer, size: int, keywords: set[Extension]) -> None:
    world = World(settings=GatekeeperSettings("mx.example.org", max_message_bytes=500))
    world.relay.offered = offer

    extensions = world.gate.extensions()

    assert extensions.size == size
    assert extensions.keywords == keywords | {Extension.SIZE}
    assert world.gate.extensions() == extensions
    world.relay.offered = replace(offer, dsn=not offer.dsn)
    assert (Extension.DSN in world.gate.extensions().keywords) is not offer.dsn, "what changed is announced"


# --- refusals of early stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EARLY)
@pytest.mark.parametrize("verdict", [defer("grey", LATER), reject("listed", NEVER)], ids=["defer", "reject"])
async def test_an_early_refusal_is_held_and_given_at_each_rcpt(stage: Stage, verdict: Verdict) -> None:
    says = Says({stage: verdict})
    world = World(says)
    talk = await world.mail()

    answers = [
        await talk.rcpt([rcpt("b@example.org"), rcpt("c@example.org")]),
        await talk.rcpt([rcpt("d@x.example")]),
    ]

    assert verdict.reply is not None
    assert answers == [RcptAnswers((verdict.reply,) * 2), RcptAnswers((verdict.reply,))]
    assert world.relay.asked == []
    assert [s for s, _ in says.transactions] == [Stage.MAIL], "no policy is asked about a refused recipient"
    talk.reset()
    ((event, keys),) = world.lines
    assert event == "transaction.refused"
    assert keys["rcpts"] == ["b@example.org", "c@example.org", "d@x.example"]
    assert (keys["policy"], keys["reason"], keys["code"]) == ("says", verdict.reason, verdict.reply.code)
    assert (keys["stage"], keys["rcpt_count"], keys["refused_count"]) == ("rcpt", 0, 3)


@pytest.mark.parametrize("stage", EARLY)
@pytest.mark.parametrize("closes", [True, False])
async def test_an_early_refusal_is_given_at_once_if_it_closes_or_is_not_to_wait(
    stage: Stage, closes: bool
) -> None:
    settings = GatekeeperSettings("mx.example.org", delay_reject=closes)
    world = World(Says({stage: reject("listed", NEVER, close=closes)}), settings=settings)
    talk = world.gate.open(CLIENT, 1234)
    answers = [
        await talk.connect(),
        await talk.ehlo("client.example", esmtp=True),
        await talk.mail(envelope()),
    ]

    assert answers[EARLY.index(stage)] == Answer(NEVER, close=closes)


async def test_a_refusal_at_mail_ends_the_transaction_at_once_when_it_does_not_wait() -> None:
    says = Says({Stage.MAIL: reject("listed", NEVER)})
    world = World(says, settings=GatekeeperSettings("mx.example.org", delay_reject=False))
    talk = await world.greet()

    assert await talk.mail(envelope()) == Answer(NEVER)

    ((event, keys),) = world.lines
    assert (event, keys["stage"], keys["policy"], keys["reason"]) == (
        "message.rejected",
        "mail",
        "says",
        "listed",
    )
    assert world.count("transactions") == {"rejected": 1}
    talk.reset()
    assert world.count("transactions") == {"rejected": 1}
    del says.verdicts[Stage.MAIL]
    assert await talk.mail(envelope()) == Answer(reply.SENDER_OK), "the session goes on"


async def test_the_strictest_of_held_refusals_is_given() -> None:
    world = World(Says({Stage.CONNECT: defer("grey", LATER), Stage.EHLO: reject("listed", NEVER)}))
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (NEVER,)


async def test_a_held_refusal_ends_with_what_it_was_about() -> None:
    says = Says({Stage.EHLO: reject("listed", NEVER)})
    world = World(says)
    talk = await world.mail()

    says.verdicts = {Stage.MAIL: defer("grey", LATER)}
    await talk.ehlo("other.example", esmtp=True)
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (LATER,), "another HELO, another sender"

    says.verdicts = {}
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (reply.RECIPIENT_OK,)


async def test_tls_ends_a_refusal_of_ehlo_and_none_of_connect() -> None:
    says = Says({Stage.EHLO: reject("listed", NEVER)})
    world = World(says)
    talk = await world.greet()
    talk.tls_started(TLS)
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (reply.RECIPIENT_OK,)

    world = World(Says({Stage.CONNECT: reject("listed", NEVER)}))
    talk = await world.greet()
    talk.tls_started(TLS)
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (NEVER,)


# --- recipients -------------------------------------------------------------------------------------------


async def test_each_recipient_gets_its_own_answer_in_order() -> None:
    says = Says({"p@example.org": reject("listed", NEVER)})
    behind = SaysBehind({"g@example.org": defer("grey", LATER)})
    world = World(says, behind)
    downstream = Reply(250, "2.1.5", "Welcome")
    world.relay.words = {"u@example.org": UNKNOWN, "b@example.org": downstream}
    talk = await world.mail()
    names = ["b@example.org", "p@example.org", "u@example.org", "g@example.org", "c@example.org"]

    answers = await talk.rcpt([rcpt(name) for name in names])

    assert answers == RcptAnswers((downstream, NEVER, UNKNOWN, LATER, reply.RECIPIENT_OK), unknown=1)
    assert world.relay.asked == [("b@example.org", "u@example.org", "g@example.org", "c@example.org")]
    assert len([s for s, _ in behind.transactions if s is Stage.RCPT]) == 3, "u does not exist"
    assert world.count("recipients") == {"accepted": 2, "rejected": 2, "deferred": 1}
    send(talk)
    await talk.eom(None)
    assert [str(r.mailbox) for r in world.relay.delivered[0].tx.envelope.rcpts] == [
        "b@example.org",
        "c@example.org",
    ]
    ((_, keys),) = world.lines
    assert (keys["rcpt_count"], keys["refused_count"]) == (2, 3)


@pytest.mark.parametrize("says", [Says, SaysBehind])
async def test_a_policy_may_close_the_session_at_rcpt(says: type[Says]) -> None:
    world = World(says({"b@example.org": reject("listed", NEVER, close=True)}))
    talk = await world.mail()

    answers = await talk.rcpt([rcpt("b@example.org"), rcpt("c@example.org")])

    assert answers == RcptAnswers((NEVER, reply.RECIPIENT_OK), close=True)


@pytest.mark.parametrize("enhanced", ["5.1.1", "5.1.6", "5.1.10"])
async def test_recipients_that_do_not_exist_are_counted_for_the_protocol(enhanced: str) -> None:
    world = World()
    world.relay.words = {
        "u@example.org": Reply(550, enhanced, "No"),
        "f@example.org": Reply(550, "5.2.2", "Full"),
    }
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("u@example.org"), rcpt("f@example.org")])).unknown == 1


async def test_policies_see_the_recipients_accepted_so_far() -> None:
    says = Says()
    world = World(says)
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.mail()
    for name in ("b@example.org", "u@example.org", "c@example.org"):
        await talk.rcpt([rcpt(name)])
    send(talk)
    await talk.eom(None)

    seen = [tuple(str(r.mailbox) for r in tx.envelope.rcpts) for _, tx in says.transactions]
    assert seen == [
        (),  # MAIL
        (),
        ("b@example.org",),
        ("b@example.org",),
        ("b@example.org", "c@example.org"),  # EOM
    ]


async def test_a_recipient_of_another_route_comes_again_in_its_own_transaction() -> None:
    world = World()
    world.relay.routes = {"other.example": "other"}
    talk = await world.rcpt("b@example.org", "c@other.example")

    assert (await talk.rcpt([rcpt("d@other.example"), rcpt("e@example.org")])).replies == (
        reply.TOO_MANY_RECIPIENTS,
        reply.RECIPIENT_OK,
    )
    assert world.relay.asked == [("b@example.org",), ("e@example.org",)]
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("c@other.example")])).replies == (reply.RECIPIENT_OK,)


async def test_a_route_has_no_more_recipients_in_a_transaction_than_it_takes() -> None:
    world = World()
    world.relay.most = 2
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.rcpt("b@example.org", "u@example.org")

    # who was refused takes no place, and who is asked about takes one
    assert (await talk.rcpt([rcpt("c@example.org"), rcpt("d@example.org")])).replies == (
        reply.RECIPIENT_OK,
        reply.TOO_MANY_RECIPIENTS,
    )
    assert world.relay.asked[-1] == ("c@example.org",)
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("d@example.org")])).replies == (reply.RECIPIENT_OK,)


async def test_a_refused_recipient_does_not_bind_the_others_to_its_route() -> None:
    world = World()
    world.relay.routes = {"other.example": "other"}
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("u@example.org")])).replies == (UNKNOWN,)

    assert (await talk.rcpt([rcpt("c@other.example")])).replies == (reply.RECIPIENT_OK,)


async def test_a_recipient_without_a_route_is_deferred() -> None:
    world = World()
    world.relay.routes = {"lost.example": None}
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("b@lost.example"), rcpt("c@example.org")])).replies == (
        reply.INTERNAL,
        reply.RECIPIENT_OK,
    )
    assert world.relay.asked == [("c@example.org",)]


async def test_what_a_route_is_known_not_to_take_is_refused_without_asking() -> None:
    world = World()
    world.relay.refusals = {"main": reply.ROUTE_TOO_BIG}
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (reply.ROUTE_TOO_BIG,)
    assert world.relay.asked == []
    talk.reset()
    ((_, keys),) = world.lines
    assert keys["reason"] == "route"


# --- content that is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", Fault)
async def test_a_fault_of_the_content_is_answered_before_anybody_judges(fault: Fault) -> None:
    says = Says()
    world = World(says)
    talk = await world.content()

    assert await talk.eom(fault) == Answer(fault.reply, close=fault is Fault.LINE_END)

    assert world.relay.delivered == []
    assert Stage.EOM not in [s for s, _ in says.transactions]
    assert world.count("transactions") == {"rejected": 1}
    ((_, keys),) = world.lines
    assert keys["reason"] == fault.name.lower()
    assert world.spool.used_bytes == 0


BAD_HEADERS = [
    pytest.param(b"X: " + b"x" * 300 + b"\r\n", "too large", id="large"),
    pytest.param(b"X: 1\r\n" * 6, "too many fields", id="fields"),
    pytest.param(b" X: 1\r\n", "continuation", id="continuation"),
    pytest.param(b"X" * 78 + b": 1\r\n", "name is too long", id="name"),
]


@pytest.mark.parametrize("body", [b"\r\nbody\r\n", b""], ids=["body", "header-only"])
@pytest.mark.parametrize(("header", "error"), BAD_HEADERS)
async def test_a_bad_header_is_refused_at_the_end_of_the_content(
    header: bytes, body: bytes, error: str
) -> None:
    settings = GatekeeperSettings("mx.example.org", max_header_bytes=200, max_header_fields=5)
    world = World(settings=settings)
    talk = await world.content(header + body)
    if body:
        assert world.spool.used_bytes == 0, "it is dropped as soon as it is known to be refused"
        talk.content(b"more\r\n")

    assert await talk.eom(None) == Answer(reply.BAD_HEADER)

    assert world.relay.delivered == []
    assert world.spool.used_bytes == 0
    ((event, keys),) = world.lines
    assert (event, keys["reason"]) == ("message.rejected", "header")
    assert error in keys["error"]


@pytest.mark.parametrize(("hops", "answer"), [(3, STORED), (4, reply.TOO_MANY_HOPS)])
@pytest.mark.parametrize("body", [b"\r\n", b""], ids=["body", "header-only"])
async def test_a_message_that_goes_in_a_circle_is_refused(hops: int, answer: Reply, body: bytes) -> None:
    world = World(settings=GatekeeperSettings("mx.example.org", max_received=3))

    assert await world.message(b"RECEIVED : by x\r\n" * hops + b"Subject: x\r\n" + body) == Answer(answer)

    assert len(world.relay.delivered) == (answer is STORED)
    assert world.spool.used_bytes == 0
    assert world.lines[0][1]["reason"] == ("" if answer is STORED else "hops")


async def test_a_full_disk_is_a_452() -> None:
    class Full(Spool):
        def open_file(self) -> FileIO:
            return FileIO("/dev/full", "w+")

    world = World(spool=Full(memory_bytes=30))
    talk = await world.content()
    assert world.spool.used_bytes == 0
    talk.content(b"more\r\n")

    assert await talk.eom(None) == Answer(reply.NO_SPACE)

    assert world.relay.delivered == []
    assert world.spool.used_bytes == 0
    assert world.lines[0][0] == "message.deferred"
    (line,) = world.services.log.of("error")
    assert (line.event, line.keys["tx"]) == ("spool.failed", "T1-1")
    assert "No space left" in line.keys["error"]


async def test_content_that_cannot_be_read_back_is_a_451() -> None:
    world = World()
    talk = await world.content(MESSAGE + b"x" * 2000 + b"\r\n")
    assert talk._open is not None
    body = talk._open.body
    assert body is not None
    assert body._file is not None
    body._file.close()
    body._file = FileIO("/dev/null", "w")

    assert await talk.eom(None) == Answer(reply.INTERNAL)

    assert world.lines[0][1]["reason"] == "spool"
    assert world.spool.used_bytes == 0


# --- verdicts of EOM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verdict", [defer("grey", LATER), reject("spam", NEVER, close=True)], ids=["defer", "reject"]
)
async def test_a_message_that_a_policy_refuses_is_not_delivered(verdict: Verdict) -> None:
    world = World(Says({Stage.EOM: verdict}))

    assert verdict.reply is not None
    assert await world.message() == Answer(verdict.reply, close=verdict.close)

    assert world.relay.delivered == []
    assert world.spool.used_bytes == 0
    ((_, keys),) = world.lines
    assert (keys["stage"], keys["policy"], keys["reason"]) == ("eom", "says", verdict.reason)


async def test_policies_judge_the_whole_message() -> None:
    says = Says()
    await World(says).message()

    stage, tx = says.transactions[-1]
    assert stage is Stage.EOM
    assert tx.message is not None
    assert [field.name for field in tx.message.header.fields] == [b"from", b"subject"]
    assert tx.message.size_bytes == len(stuff(MESSAGE))


async def test_a_quarantined_message_is_delivered_with_our_field_and_no_forged_one() -> None:
    world = World(Says({Stage.EOM: quarantine("spam")}))
    forged = b"X-MXGATE-Quarantine\r\n : no\r\n"

    assert await world.message(forged + MESSAGE) == Answer(STORED)

    assert world.relay.delivered[0].message == AUTHRES + b"X-Mxgate-Quarantine: spam\r\n" + RECEIVED + MESSAGE
    assert world.count("transactions") == {"quarantined": 1}
    ((event, keys),) = world.lines
    assert (event, keys["action"], keys["policy"]) == ("message.quarantined", "quarantined", "says")


async def test_a_quarantined_message_that_is_not_stored_is_not_accepted() -> None:
    world = World(Says({Stage.EOM: quarantine("spam")}))
    world.relay.delivery = Delivery(reply.DOWNSTREAM_TROUBLE, stored=False, error="connect")

    assert await world.message() == Answer(reply.DOWNSTREAM_TROUBLE)
    assert world.count("transactions") == {"deferred": 1}


async def test_a_forged_quarantine_field_is_removed_from_a_good_message_too() -> None:
    world = World()

    await world.message(b"x-mxgate-quarantine: forged\r\n" + MESSAGE)

    assert world.relay.delivered[0].message == ABOVE + MESSAGE


async def test_edits_are_applied_once_in_order_above_our_received() -> None:
    first = Says({Stage.EOM: proceed(edits=[AddField("X-A", "1"), RemoveFields("RECEIVED-SPF")])})
    second = SaysBehind({Stage.EOM: proceed(edits=[AddField("X-B", "2")])})
    world = World(first, second)

    await world.message(b"X-A: kept\r\nReceived-Spf: pass\r\n" + MESSAGE)

    (delivered,) = world.relay.delivered
    assert delivered.message == AUTHRES + b"X-A: 1\r\nX-B: 2\r\n" + RECEIVED + b"X-A: kept\r\n" + MESSAGE


async def test_what_early_stages_found_counts_for_every_transaction_behind_them() -> None:
    results = {stage: AuthResult("x-" + stage, Result.PASS) for stage in Stage}
    says = Says(
        {
            stage: proceed(results=[results[stage]], edits=[AddField(f"X-{stage}", "1")])
            for stage in (*EARLY, Stage.EOM)
        }
    )
    world = World(says)
    talk = await world.greet()
    for _ in range(2):
        await talk.mail(envelope())
        await talk.rcpt([rcpt("b@example.org")])
        send(talk)
        await talk.eom(None)

    for delivered in world.relay.delivered:
        assert delivered.tx.results == tuple(results[stage] for stage in (*EARLY, Stage.EOM))
        assert delivered.prefix.startswith(
            b"Authentication-Results: mx.example.org;\r\n"
            b"\tx-connect=pass;\r\n\tx-ehlo=pass;\r\n\tx-mail=pass;\r\n\tx-eom=pass\r\n"
            b"X-connect: 1\r\nX-ehlo: 1\r\nX-mail: 1\r\nX-eom: 1\r\nReceived:"
        )
    seen = [(stage, len(tx.results)) for stage, tx in says.transactions[:3]]
    assert seen == [(Stage.MAIL, 2), (Stage.RCPT, 3), (Stage.EOM, 3)]
    talk.tls_started(TLS)
    await talk.mail(envelope())
    assert len(says.transactions[-1][1].results) == 1, "TLS makes EHLO void"


# --- the end of a transaction -------------------------------------------------------------------------------


async def test_a_transaction_that_is_given_up_counts_as_aborted_and_leaves_nothing() -> None:
    world = World()
    talk = await world.content()
    assert world.spool.used_bytes

    talk.reset()
    talk.reset()

    assert world.spool.used_bytes == 0
    assert world.count("transactions") == {"aborted": 1}
    ((event, keys),) = world.lines
    assert (event, keys["reason"], keys["code"], keys["enhanced"]) == ("transaction.aborted", "client", 0, "")
    assert (keys["stage"], keys["size_bytes"]) == ("eom", len(stuff(MESSAGE)))


@pytest.mark.parametrize("with_rcpt", [True, False])
async def test_a_transaction_without_content_may_be_given_up(with_rcpt: bool) -> None:
    world = World()
    talk = await (world.rcpt() if with_rcpt else world.mail())

    talk.reset()

    assert world.count("transactions") == {"aborted": 1}
    # exactly one line for each transaction, a probe's too
    assert [(event, keys["stage"]) for event, keys in world.lines] == [
        ("transaction.aborted", "rcpt" if with_rcpt else "mail")
    ]


async def test_there_need_be_no_transaction_to_reset() -> None:
    world = World()
    (await world.greet()).reset()

    assert world.count("transactions") == {}


async def test_refusals_stay_the_outcome_when_the_client_gives_up() -> None:
    world = World()
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.rcpt("u@example.org", "b@example.org")

    talk.reset()

    ((event, keys),) = world.lines
    assert (event, keys["code"], keys["reason"]) == ("transaction.refused", 550, "downstream")
    assert keys["rcpts"] == ["b@example.org"]


@pytest.mark.parametrize(
    ("words", "action"),
    [([UNKNOWN], "rejected"), ([UNKNOWN, LATER], "deferred"), ([LATER, UNKNOWN], "rejected")],
)
async def test_a_transaction_whose_recipients_were_all_refused_ends_as_the_last_of_them(
    words: list[Reply], action: str
) -> None:
    world = World()
    world.relay.words = {f"u{at}@example.org": word for at, word in enumerate(words)}
    talk = await world.mail()
    for name in world.relay.words:
        await talk.rcpt([rcpt(name)])

    talk.reset()

    ((event, keys),) = world.lines
    assert (event, keys["action"], keys["code"]) == ("transaction.refused", action, words[-1].code)
    assert world.count("transactions") == {action: 1}


async def test_refusals_are_not_the_outcome_once_content_came() -> None:
    world = World()
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.rcpt("u@example.org", "b@example.org")
    send(talk)

    talk.reset()

    assert world.lines[0][0] == "transaction.aborted"


@pytest.mark.parametrize("where", ["policy", "relay"])
async def test_a_client_that_leaves_while_its_message_is_judged_or_delivered_is_accounted_for(
    where: str,
) -> None:
    says = Says()
    world = World(says)
    talk = await world.content()
    if where == "policy":
        says.gate = asyncio.Event()
    else:
        world.relay.deliver_gate = asyncio.Event()
    task = await started(talk.eom(None))

    await cancel(task)
    talk.reset()

    assert world.relay.cancelled == ([] if where == "policy" else ["deliver"])
    assert world.spool.used_bytes == 0
    assert world.count("transactions") == {"aborted": 1}
    assert [event for event, _ in world.lines] == ["transaction.aborted"]
    assert talk.outcome() is None


async def test_a_client_that_leaves_while_a_recipient_is_verified_is_accounted_for() -> None:
    world = World()
    world.relay.verify_gate = asyncio.Event()
    talk = await world.mail()
    task = await started(talk.rcpt([rcpt("b@example.org")]))

    await cancel(task)
    talk.reset()

    assert world.relay.cancelled == ["verify"]
    assert world.count("transactions") == {"aborted": 1}


async def test_a_defect_of_the_relay_leaves_nothing_behind() -> None:
    world = World()
    world.relay.error = RuntimeError("a defect")
    talk = await world.content()

    with pytest.raises(RuntimeError, match="a defect"):
        await talk.eom(None)

    assert world.spool.used_bytes == 0
    talk.reset()
    assert world.count("transactions") == {"aborted": 1}


async def test_one_line_tells_all_about_a_transaction() -> None:
    """Who only lets a message pass has decided nothing: "known" is no reason of it."""
    world = World(Says({Stage.EOM: proceed(reason="known")}))
    talk = await world.rcpt(*(f"b{n}@example.org" for n in range(7)))
    world.services.clock.advance(0.25)
    send(talk)
    world.services.clock.advance(1)

    await talk.eom(None)

    assert world.lines == [
        (
            "message.accepted",
            {
                "session": "T1",
                "tx": "T1-1",
                "stage": Stage.EOM,
                "policy": "",
                "action": "accepted",
                "reason": "",
                "code": 250,
                "enhanced": "2.0.0",
                "text": "Stored as 1",
                "auth": "",
                "client": "192.0.2.1",
                "user": "",
                "role": "mx",
                "helo": "client.example",
                "proto": "ESMTP",
                "tls": "",
                "trust": "untrusted",
                "mail_from": "a@client.example",
                "rcpts": [f"b{n}@example.org" for n in range(5)],
                "rcpt_count": 7,
                "refused": [],
                "refused_count": 0,
                "observed": "",
                "route": "main",
                "delivered": True,
                "size_bytes": len(stuff(MESSAGE)),
                "policies_ms": 0.0,
                "delivery_ms": 0.0,
                "duration_ms": 1250.0,
                "error": "",
            },
        )
    ]
    durations = world.services.metrics.observed
    assert durations["mxgate_transaction_duration_seconds", "accepted"] == [1.25]


async def test_the_null_sender_is_logged_as_nothing() -> None:
    world = World()
    talk = await world.greet()
    await talk.mail(Envelope(None))
    await talk.rcpt([rcpt("b@example.org")])
    send(talk)
    await talk.eom(None)

    assert world.lines[0][1]["mail_from"] == ""


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        ({}, Outcome(STORED, delivered=True)),
        ({Stage.EOM: reject("spam", NEVER)}, Outcome(NEVER, delivered=False)),
        ({Stage.MAIL: reject("listed", NEVER, close=True)}, Outcome(NEVER, delivered=False)),
    ],
    ids=["stored", "rejected", "rejected-at-mail"],
)
async def test_policies_are_told_the_outcome_once_and_behind_the_reply(
    verdicts: dict[Stage | str, Verdict], told: Outcome
) -> None:
    says = Says(verdicts)
    world = World(says)
    if Stage.MAIL in verdicts:
        talk = await world.greet()
        await talk.mail(envelope())
    else:
        talk = await world.content()
        await talk.eom(None)
    assert says.told == []

    outcome = talk.outcome()
    assert outcome is not None
    await outcome

    ((tx, outcome_told),) = says.told
    assert (tx.id, outcome_told) == ("T1-1", told)
    assert talk.outcome() is None


async def test_there_is_no_outcome_to_tell_when_nobody_wants_it() -> None:
    world = World()
    talk = await world.content()
    await talk.eom(None)

    assert talk.outcome() is None


# --- records of decisions -----------------------------------------------------------------------------------


async def test_a_message_leaves_a_record_of_who_said_what() -> None:
    ring = DecisionRing()
    early = AuthResult("spf", Result.PASS)
    says = Says({Stage.EHLO: proceed(results=[early]), "p@example.org": reject("listed", NEVER)})
    world = World(says, decisions=ring)
    world.relay.words = {"u@example.org": UNKNOWN}
    talk = await world.rcpt("b@example.org", "p@example.org", "u@example.org")
    world.services.clock.advance(2)
    send(talk)

    await talk.eom(None)

    (record,) = ring.latest(9)
    b, p, u = (rcpt(f"{name}@example.org") for name in "bpu")
    assert record == Decision(
        id="T1-1",
        time=world.services.clock.now(),
        session=talk.session,
        envelope=replace(envelope(), rcpts=(b,)),
        rcpts=[
            RcptAnswer(b, reply.RECIPIENT_OK, "", "downstream"),
            RcptAnswer(p, NEVER, "says", "listed"),
            RcptAnswer(u, UNKNOWN, "", "downstream"),
        ],
        action="accepted",
        stage=Stage.EOM,
        reply=STORED,
        policy="",
        reason="",
        duration_s=2,
        judged=record.judged,
        results=(early,),
        delivered=True,
        route="main",
        header=b"From: a@client.example\r\nSubject: x\r\n",
        size_bytes=len(stuff(MESSAGE)),
        timings=(("policies", 0), ("delivery", 0)),
        judged_at=world.services.clock.now(),
        authserv_id="mx.example.org",
    )
    assert [(judged.stage, judged.rcpt, judged.verdict.action.label) for judged in record.judged] == [
        (Stage.CONNECT, None, "continue"),
        (Stage.EHLO, None, "continue"),
        (Stage.MAIL, None, "continue"),
        (Stage.RCPT, b, "continue"),
        (Stage.RCPT, p, "reject"),
        (Stage.RCPT, u, "continue"),
        (Stage.EOM, None, "continue"),
    ]


async def test_each_transaction_has_a_record_with_what_its_session_was_told() -> None:
    ring = DecisionRing()
    world = World(Says({Stage.EOM: defer("grey", LATER)}), decisions=ring)
    talk = await world.greet()
    for _ in range(2):
        await talk.mail(envelope())
        await talk.rcpt([rcpt("b@example.org")])
        send(talk)
        await talk.eom(None)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.org")])
    talk.reset()
    talk.tls_started(TLS)
    await talk.mail(envelope())
    await talk.rcpt([rcpt("b@example.org")])
    talk.reset()

    records = [*ring.latest(9)][::-1]

    assert [(r.id, r.action, r.policy, r.reason) for r in records] == [
        ("T1-1", "deferred", "says", "grey"),
        ("T1-2", "deferred", "says", "grey"),
        ("T1-3", "aborted", "", "client"),
        ("T1-4", "aborted", "", "client"),
    ]
    stages = [[judged.stage for judged in record.judged] for record in records]
    assert stages[0] == stages[1] == [*Stage]
    assert stages[2] == [*Stage][:-1]
    assert stages[3] == [Stage.CONNECT, Stage.MAIL, Stage.RCPT], "what was said before TLS is forgotten"
    assert records[2].reply is None
