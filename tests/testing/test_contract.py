"""gateway.testing.contract: every built-in policy passes, and each test of the suite fails for what it is about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.api import (
    AddField,
    HttpError,
    NoSettings,
    Policy,
    Question,
    Recipient,
    Reply,
    RRType,
    Services,
    Session,
    StoreError,
    Transaction,
    Verdict,
    Watch,
    ask,
    proceed,
    quarantine,
    reject,
)
from gateway.testing import PolicyContract, PolicyFailedError
from policies.arc import Arc
from policies.dkim import Dkim
from policies.dmarc import Dmarc
from policies.greylist import Greylist
from policies.relay_guard import RelayGuard, RelayGuardSettings
from policies.spf import Spf

NO = Reply(550, "5.7.1", "No")


class TestSpf(PolicyContract):
    policy = Spf


class TestDkim(PolicyContract):
    policy = Dkim


class TestArc(PolicyContract):
    policy = Arc


class TestDmarc(PolicyContract):
    policy = Dmarc


class TestGreylist(PolicyContract):
    policy = Greylist


class TestRelayGuard(PolicyContract):
    policy = RelayGuard
    settings = RelayGuardSettings(domains=("example.org",))


class Bad(Policy[Any]):
    """Each of those below is bad in one way."""

    name = "bad"


class NoName(Bad):
    name = "No Name"

    async def on_mail(self, tx: Transaction) -> Verdict:
        return proceed()


class NotAsync(Bad):
    def on_mail(self, tx: Transaction) -> Verdict:  # type: ignore[override]
        return proceed()


@dataclass(frozen=True)
class Silent:
    limit: int = 3


@dataclass(frozen=True)
class Nested:
    inner: Silent = field(default=Silent(), metadata={"doc": "documented itself"})


class Undocumented(Bad):
    Settings = Nested

    async def on_mail(self, tx: Transaction) -> Verdict:
        return proceed()


class KeepsNotes(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        setattr(self, f"seen_{tx.id}".replace("-", "_"), True)
        return proceed()


class LeavesTasks(Bad):
    async def on_connect(self, session: Session) -> Verdict:
        self.task = asyncio.create_task(asyncio.sleep(3600))
        await asyncio.sleep(0)
        return proceed()


class SwallowsCancellation(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await asyncio.sleep(3600)
        return proceed()


class WantsSender(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        assert tx.envelope.mail_from is not None
        return proceed()


class WantsIpv4(Bad):
    async def on_connect(self, session: Session) -> Verdict:
        assert session.client.version == 4
        return proceed()


class WantsDomain(Bad):
    async def on_ehlo(self, session: Session) -> Verdict:
        session.helo.encode("ascii")
        return proceed()


class WantsAscii(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        assert tx.envelope.mail_from is None or tx.envelope.mail_from.text.isascii()
        return proceed()


class WantsFew(Bad):
    async def on_eom(self, tx: Transaction) -> Verdict:
        assert len(tx.envelope.rcpts) < 3
        return proceed()


class WantsAuthor(Bad):
    async def on_eom(self, tx: Transaction) -> Verdict:
        assert tx.message is not None
        (_,) = tx.message.header.all(b"from")
        return proceed()


class WantsText(Bad):
    async def on_eom(self, tx: Transaction) -> Verdict:
        assert tx.message is not None
        tx.message.header.octets.decode()
        return proceed()


class RejectsOnTrouble(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        (answer,) = await self.services.dns.run(ask(Question("example.org", RRType.TXT)), tx)
        return reject("no_record", NO) if not answer.texts else proceed()


class RejectsWithoutStore(Bad):
    needs_store = True

    async def on_mail(self, tx: Transaction) -> Verdict:
        try:
            await self.services.store.ask(self.services.store.get("seen"))
        except StoreError:
            return reject("no_store", NO)
        return proceed()


class BreaksWithTheStore(Bad):
    """What it makes of an outage is a defect of its own."""

    needs_store = True

    async def on_mail(self, tx: Transaction) -> Verdict:
        try:
            await self.services.store.ask(self.services.store.get("seen"))
        except StoreError as exc:
            raise KeyError(exc.reason) from exc
        return proceed()


class NeverRecovers(Bad):
    needs_store = True

    def __init__(self, settings: Any, services: Services) -> None:
        super().__init__(settings, services)
        self.trouble: StoreError | None = None

    async def on_mail(self, tx: Transaction) -> Verdict:
        if self.trouble is not None:
            raise self.trouble
        try:
            await self.services.store.ask(self.services.store.get("seen"))
        except StoreError as exc:
            self.trouble = exc
        return proceed()


class RejectsWithoutService(Bad):
    needs_http = True

    async def on_mail(self, tx: Transaction) -> Verdict:
        try:
            response = await self.services.http.request("GET", "http://127.0.0.1/")
        except HttpError:
            return reject("no_service", NO)
        return proceed() if response.status == 200 else reject("no_service", NO)


class BelievesNonsense(Bad):
    needs_http = True

    async def on_mail(self, tx: Transaction) -> Verdict:
        response = await self.services.http.request("GET", "http://127.0.0.1/")
        response.content.decode("ascii")
        return proceed()


class LeavesTheStoreWaiting(Bad):
    """Goes on in a task of its own when the client has gone away while the store was asked."""

    needs_store = True

    async def on_mail(self, tx: Transaction) -> Verdict:
        asking = asyncio.ensure_future(self.services.store.ask(self.services.store.get("seen")))
        try:
            await asyncio.shield(asking)
        except asyncio.CancelledError:
            self.task = asyncio.create_task(asyncio.sleep(3600))
            raise
        return proceed()


class WantsRecord(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        (answer,) = await self.services.dns.run(ask(Question("example.org", RRType.TXT)), tx)
        [text.decode("ascii") for text in answer.texts]
        return proceed()


class Blocks(Bad):
    async def on_eom(self, tx: Transaction) -> Verdict:
        time.sleep(0.6)  # noqa: ASYNC251  # what a policy must not do
        return proceed()


class Raises(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        raise LookupError(tx.id)


class SaysNothing(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        return None  # type: ignore[return-value]


class QuarantinesEarly(Bad):
    async def on_mail(self, tx: Transaction) -> Verdict:
        return quarantine("early")


class Forges(Bad):
    async def on_eom(self, tx: Transaction) -> Verdict:
        return proceed(edits=[AddField("From", "forged@example.org")])


class Hangs(Bad):
    timeout_s = 0.05

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        await asyncio.Event().wait()
        return proceed()


class WatchRaises(Bad):
    def on_header(self, tx: Transaction) -> Watch | None:
        raise KeyError(tx.id)


class LeavesTasksBehind(Bad):
    async def start(self) -> None:
        self.task = asyncio.create_task(asyncio.sleep(3600))

    async def on_mail(self, tx: Transaction) -> Verdict:
        return proceed()


def contract_of(bad: type[Policy[Any]]) -> PolicyContract:
    class Suite(PolicyContract):
        policy = bad

    bad.Settings = bad.__dict__.get("Settings", NoSettings)
    return Suite()


Test = Callable[[PolicyContract], None]


@pytest.mark.parametrize(
    ("bad", "test"),
    [
        (NoName, PolicyContract.test_declares_name_settings_and_hooks),
        (NotAsync, PolicyContract.test_declares_name_settings_and_hooks),
        (Bad, PolicyContract.test_declares_name_settings_and_hooks),
        (Undocumented, PolicyContract.test_documents_each_setting),
        (KeepsNotes, PolicyContract.test_takes_fifty_transactions_at_once),
        (SwallowsCancellation, PolicyContract.test_can_be_cancelled_at_each_await),
        (LeavesTasks, PolicyContract.test_can_be_cancelled_at_each_await),
        (WantsSender, PolicyContract.test_takes_the_null_reverse_path),
        (WantsIpv4, PolicyContract.test_takes_clients_of_ipv6),
        (WantsDomain, PolicyContract.test_takes_any_helo),
        (WantsAscii, PolicyContract.test_takes_addresses_beyond_ascii),
        (WantsFew, PolicyContract.test_takes_many_recipients),
        (WantsAuthor, PolicyContract.test_takes_no_author_and_two),
        (WantsText, PolicyContract.test_takes_content_that_is_no_mail),
        (RejectsOnTrouble, PolicyContract.test_trouble_of_dns_is_no_refusal_for_good),
        (RejectsWithoutStore, PolicyContract.test_trouble_of_the_store_is_no_refusal_for_good),
        (BreaksWithTheStore, PolicyContract.test_trouble_of_the_store_is_no_refusal_for_good),
        (NeverRecovers, PolicyContract.test_trouble_of_the_store_is_no_refusal_for_good),
        (RejectsWithoutService, PolicyContract.test_trouble_of_services_is_no_refusal_for_good),
        (BelievesNonsense, PolicyContract.test_trouble_of_services_is_no_refusal_for_good),
        (LeavesTheStoreWaiting, PolicyContract.test_can_be_cancelled_at_each_await),
        (WantsRecord, PolicyContract.test_takes_any_answer_of_dns),
        (Blocks, PolicyContract.test_does_not_keep_the_loop_busy),
        (LeavesTasksBehind, PolicyContract.test_starts_and_stops_and_leaves_nothing_running),
    ],
    ids=lambda each: each.__name__,
)
def test_it_fails_for_what_it_is_about(bad: type[Policy[Any]], test: Test) -> None:
    with pytest.raises(AssertionError):
        test(contract_of(bad))


@pytest.mark.parametrize("bad", [Raises, SaysNothing, QuarantinesEarly, Forges, Hangs, WatchRaises])
def test_what_fails_on_any_mail_is_told_with_its_name(bad: type[Policy[Any]]) -> None:
    with pytest.raises(PolicyFailedError, match=r"^bad failed at "):
        contract_of(bad).test_takes_the_null_reverse_path()


def test_each_test_of_the_suite_is_seen_to_fail() -> None:
    marks = test_it_fails_for_what_it_is_about.pytestmark
    seen = {test.__name__ for _, test in marks[0].args[1]}
    assert seen == {name for name in vars(PolicyContract) if name.startswith("test_")}
