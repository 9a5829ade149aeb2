"""crosscheck: the second opinions agree with ours on real mail, a wrong result of ours is told, and bounds hold."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import spf as pyspf  # type: ignore[import-untyped]  # it has no types

from gateway.api import Answer, Asked, Found, Question, RRType
from gateway.own_names import under_name
from gateway.plan import Step
from gateway.policy import OnError, Policy
from gateway.session import AddressSource, Transaction, client_address
from gateway.smtp.content import stuff
from gateway.testing import PolicyContract, Zone
from gateway.verdict import Result, Verdict
from policies import crosscheck
from policies.arc import Arc
from policies.crosscheck import Crosscheck, CrosscheckSettings
from policies.dkim import Dkim
from policies.spf import Spf
from policies.verify.second_opinion.answers import UnaskedError, recorded
from policies.verify.second_opinion.compare import is_costly
from policies.verify.second_opinion.spf import Checked, opinion
from tests.fakes import FakeDns, FakeServices
from tests.mailkit import compose, dkim_sign, rsa_key, seal, txt_line, zone_text
from tests.scenarios import SCENARIOS, records
from tests.world import World, envelope, rcpt

KEY = rsa_key("author.example")
SIGNED = dkim_sign(compose(), KEY)
ALL = CrosscheckSettings(share=1.0)
DNS = 'author.example. 60 IN TXT "v=spf1 ip4:192.0.2.1 -all"\n' + zone_text(KEY)


class TestContract(PolicyContract):
    policy = Crosscheck
    settings = ALL


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keys: object) -> None:
        raise AssertionError("somebody sends")

    for each in ("connect", "sendto"):
        monkeypatch.setattr(socket.socket, each, refuse, raising=False)


class Watched:
    """A gateway in memory with policies of ours and the crosscheck; `counted` is what it counts."""

    def __init__(
        self, *first: type[Policy[Any]], zone: str = DNS, settings: CrosscheckSettings = ALL
    ) -> None:
        self.services = FakeServices(dns=FakeDns(Zone.parse(zone)))
        # dkimpy asks the system's clock
        self.services.clock.time_s = time.time()
        made = [self.made(each, each.Settings()) for each in first]
        self.crosscheck = self.made(Crosscheck, settings)
        steps = [Step(each, 10.0, OnError.CONTINUE) for each in (*made, self.crosscheck)]
        self.world = World(*steps, services=self.services)
        self._ids = iter(f"T{n}" for n in range(1, 10_000))
        self.world.gate.new_id = lambda: next(self._ids)

    def made(self, policy: type[Policy[Any]], settings: object) -> Any:
        return policy(settings, under_name(self.services, policy.name))

    async def deliver(
        self,
        octets: bytes = SIGNED,
        *,
        client: str = "192.0.2.1",
        mail_from: str = "ann@author.example",
        source: AddressSource = AddressSource.SOCKET,
    ) -> None:
        talk = self.world.gate.open(client_address(client), 1234, source=source)
        await talk.connect()
        await talk.ehlo("client.example", esmtp=True)
        await talk.mail(envelope(mail_from))
        await talk.rcpt([rcpt("bob@example.org")])
        talk.begin_content(is_stuffed=True)
        wire = stuff(octets)
        for at in range(0, len(wire), 50_000):
            talk.content(wire[at : at + 50_000])
        assert (await talk.eom(None)).reply.code in (250, 550)
        telling = talk.outcome()
        assert telling is not None
        await telling

    def results(self, method: str) -> dict[str, float]:
        counted = self.services.metrics.of("mxgate_crosscheck_results_total")
        return {agreement: n for (which, agreement), n in counted.items() if which == method}

    @property
    def messages(self) -> Mapping[str, float]:
        counted = self.services.metrics.of("mxgate_crosscheck_messages_total")
        return {outcome: n for (outcome,), n in counted.items()}

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line.keys for line in self.services.log.lines if line.event == event]


async def test_it_agrees_on_mail_as_operators_meet_it_and_asks_nothing() -> None:
    watched = Watched(Spf, Dkim, Arc, zone=records())
    compare, trail = watched.crosscheck._compare, watched.services.dns.zone.trail

    def asks_nothing(*args: Any) -> Any:
        asked = len(trail)
        compared = compare(*args)
        assert len(trail) == asked
        return compared

    watched.crosscheck._compare = asks_nothing
    for make in SCENARIOS.values():
        scenario = make()
        await watched.deliver(scenario.content, client=scenario.client, mail_from=scenario.mail_from)
    assert watched.messages == {"checked": len(SCENARIOS)}
    for method in ("spf", "dkim", "arc"):
        assert watched.results(method).keys() == {"agree"}, watched.services.log.lines
    assert watched.results("spf")["agree"] == 2 * len(SCENARIOS), "MAIL FROM and HELO"
    assert watched.said("crosscheck.disagreed") == []


def lying(verdict: Verdict) -> Verdict:
    """With everything passed."""
    lies = tuple(replace(each, result=Result.PASS, reason="") for each in verdict.results)
    return replace(verdict, results=lies)


class LyingSpf(Spf):
    async def on_mail(self, tx: Transaction) -> Verdict:
        return lying(await super().on_mail(tx))


class LyingDkim(Dkim):
    async def on_eom(self, tx: Transaction) -> Verdict:
        return lying(await super().on_eom(tx))


class LyingArc(Arc):
    async def on_eom(self, tx: Transaction) -> Verdict:
        return lying(await super().on_eom(tx))


@pytest.mark.parametrize("liar", [LyingSpf, LyingDkim, LyingArc], ids=lambda each: each.name)
async def test_a_wrong_result_of_ours_is_counted_and_logged_with_the_decisions_id(
    liar: type[Policy[Any]],
) -> None:
    broken = seal(SIGNED, KEY, "mx.example; none").replace(b"Hello", b"Bye")
    honest = [each for each in (Spf, Dkim, Arc) if each.name != liar.name]
    watched = Watched(liar, *honest)

    await watched.deliver(broken, client="192.0.2.99")

    assert watched.results(liar.name)["disagree"] == len(watched.said("crosscheck.disagreed"))
    assert all(watched.results(each.name).keys() == {"agree"} for each in honest)
    line = watched.said("crosscheck.disagreed")[0]
    assert (line["tx"], line["method"], line["ours"]) == ("T1-1", liar.name, "pass")
    assert line["theirs"] != "pass"


async def test_a_known_difference_is_explained_and_no_disagreement() -> None:
    watched = Watched(Dkim)
    await watched.deliver(b"Subject: Buy this\r\n" + SIGNED)
    assert watched.results("dkim") == {"explained": 1}, watched.services.log.lines
    assert watched.said("crosscheck.disagreed") == []
    (line,) = watched.said("crosscheck.differed")
    assert line["reason"].startswith("our ruling")


async def test_while_clients_are_hidden_spf_is_not_compared() -> None:
    watched = Watched(Spf, Dkim)
    await watched.deliver(source=AddressSource.HIDDEN)
    assert watched.results("spf") == {}
    assert watched.results("dkim") == {"agree": 1}


async def test_large_and_costly_messages_are_left_out_and_counted() -> None:
    watched = Watched(Dkim, settings=CrosscheckSettings(share=1.0, max_bytes=100_000))
    for body in ("x\r\n" * 40_000, " " * 50_000 + "\r\n"):
        await watched.deliver(compose(body=body))
    assert watched.messages == {"too_large": 1, "costly": 1}
    assert watched.results("dkim") == {}


@pytest.mark.parametrize("blank", [b" ", b"\t", b"\r\n", b" \r\n"])
def test_what_dkimpy_takes_quadratic_time_for_is_costly(blank: bytes) -> None:
    assert is_costly(b"A: b\r\n", blank * 3000)
    assert is_costly(b"A: " + blank * 3000 + b"b\r\n", b"")
    assert not is_costly(b"A: b\r\n", (blank * 20 + b"x\r\n") * 100)
    assert is_costly(b"A: b\r\n" * 6000, b""), "fields cost dkimpy their number for each name in h="


async def test_one_message_at_a_time_and_the_rest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(Dkim)
    begun, go_on = threading.Event(), threading.Event()
    compare = watched.crosscheck._compare

    def slow(*args: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return compare(*args)

    watched.crosscheck._compare = slow
    first = asyncio.create_task(watched.deliver())
    assert await asyncio.to_thread(begun.wait, 30)
    await watched.deliver()
    assert watched.messages == {"busy": 1}
    go_on.set()
    await first
    assert watched.messages == {"busy": 1, "checked": 1}
    await watched.deliver()
    assert watched.messages == {"busy": 1, "checked": 2}


async def test_what_is_cancelled_still_counts_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(Dkim)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return []

    watched.crosscheck._compare = slow
    first = asyncio.create_task(watched.deliver())
    assert await asyncio.to_thread(begun.wait, 30)
    first.cancel()
    await asyncio.wait([first])
    await watched.deliver()
    assert watched.messages == {"busy": 1}
    go_on.set()
    await watched.crosscheck.stop()


async def test_no_more_than_a_few_messages_are_kept_while_they_arrive() -> None:
    watched = Watched(Dkim)
    talks = []
    for _ in range(crosscheck._MAX_KEPT + 3):
        talk = watched.world.gate.open(client_address("192.0.2.1"), 1234)
        await talk.ehlo("client.example", esmtp=True)
        await talk.mail(envelope())
        await talk.rcpt([rcpt("bob@example.org")])
        talk.begin_content(is_stuffed=True)
        talk.content(stuff(SIGNED))
        talks.append(talk)
    assert watched.messages == {"not_kept": 3}
    for talk in talks:
        talk.reset()
    talks.clear()
    del talk
    gc.collect()
    await watched.deliver()
    assert watched.messages == {"not_kept": 3, "checked": 1}


async def test_what_a_library_raises_is_counted_and_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **keys: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("policies.verify.second_opinion.spf.opinion", broken)
    watched = Watched(Spf, Dkim)
    await watched.deliver()
    assert watched.results("spf") == {"failed": 2}
    assert watched.results("dkim") == {"agree": 1}
    assert watched.said("policy.failed") == []


async def test_a_share_of_messages_is_sampled() -> None:
    none, half = (Watched(Spf, settings=CrosscheckSettings(share=share)) for share in (0.0, 0.5))
    for _ in range(50):
        await none.deliver(compose())
        await half.deliver(compose())
    assert none.messages == {}
    assert 10 < half.messages["checked"] < 40


async def test_a_key_whose_use_would_take_long_is_not_handed_on() -> None:
    """What dkimpy computes with it is one step, which no thread is interrupted in."""
    large = KEY.record.replace("p=", "n=" + "x" * 1100 + "; p=")
    watched = Watched(Dkim, zone=txt_line(KEY.name, large))
    await watched.deliver()
    assert watched.results("dkim") == {"unanswered": 1}


@pytest.mark.parametrize("given", [{"share": 1.5}, {"share": -0.1}, {"max_bytes": 0}, {"max_bytes": 10**8}])
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        CrosscheckSettings(**given)


def test_without_its_libraries_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosscheck, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"mxgate\[crosscheck\]"):
        CrosscheckSettings()


@pytest.mark.parametrize("text", [b"v=spf1 -all", b"v=spf1 a:%{" + b"x" * 5000 + b" -all"])
def test_pyspf_asks_nobody_and_its_hook_is_left_alone(text: bytes) -> None:
    hook = pyspf.DNSLookup
    trail = [Asked("spf", Question("Author.example.", RRType.TXT), Answer(Found.RECORDS, (text,)))]
    checked = Checked("192.0.2.1", "ann@author.example", "h")
    if len(text) < 4096:
        assert opinion(checked, recorded(trail)).word == "fail"
    else:
        with pytest.raises(UnaskedError):
            opinion(checked, recorded(trail))
    with pytest.raises(UnaskedError):
        opinion(Checked("192.0.2.1", "ann@other.example", "h"), recorded(trail))
    assert pyspf.DNSLookup is hook


def test_a_question_with_two_answers_has_none() -> None:
    asked = Question("a.example", RRType.A)
    late = Asked("spf", asked, Answer(Found.TEMPORARY_FAILURE, why="budget"))
    with pytest.raises(UnaskedError):
        recorded([late, Asked("spf", asked, Answer(Found.NO_DATA))])(asked)
