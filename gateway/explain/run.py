"""One session, played through the real gatekeeper, pipeline and policies, and everything that was said in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from gateway.adapters.metrics import ProcessMetrics
from gateway.app import (
    ResolverForPolicies,
    StartError,
    gatekeeper_settings,
    id_source,
    start_failure,
    steps_of,
)
from gateway.config import Config
from gateway.config.model import State
from gateway.decision import Decision, DecisionRing, to_json
from gateway.decision.show import Json
from gateway.errors import GatewayError
from gateway.explain.stand_ins import EarlyPipeline, KeptLog, TakesAll
from gateway.gatekeeper import Answer, Conversation, Gatekeeper, GatekeeperSettings
from gateway.mail.body import Spool
from gateway.mail.digest import BodyDigests
from gateway.mail.message import Field, Header
from gateway.open_http import WorkerHttp
from gateway.open_store import WorkerStore
from gateway.plugins import PlannedPolicy
from gateway.services import Clock, Resolver, Services
from gateway.session import AddressSource, Envelope, Recipient, TlsInfo
from gateway.show_plan import ShownPlan, shown_plan
from gateway.smtp.content import Fault

_PORT = 25
_NO_LIMIT = 1 << 40


class ExplainError(GatewayError):
    """There is nothing to explain; the text says why."""


class Content(Protocol):
    """The content of a message: take the blocks to their end, then ask for the fault."""

    @property
    def fault(self) -> Fault | None: ...
    def blocks(self) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Case:
    """What a client does in one session. Without content it goes away behind its recipients."""

    client: IPv4Address | IPv6Address
    helo: str
    envelope: Envelope
    rcpts: tuple[Recipient, ...]
    content: Content | None
    esmtp: bool = True
    port: int = _PORT
    tls: TlsInfo | None = None
    source: AddressSource = AddressSource.SOCKET


class Dns(Resolver, ResolverForPolicies, Protocol):
    """DNS for the engine and for each policy."""


@dataclass(frozen=True, slots=True)
class World:
    """What the case meets: the plan of a configuration, a clock, DNS for each policy, and the downstream."""

    config: Config
    planned: Sequence[PlannedPolicy]
    clock: Clock
    dns: Dns
    relay: TakesAll
    settings: GatekeeperSettings
    spool: Spool
    new_id: Callable[[], str]
    new_digests: Callable[[], BodyDigests] = BodyDigests


@dataclass(frozen=True, slots=True)
class Explained:
    """What came of a case. `fields` is the header as it would have left, None where nothing was delivered."""

    plan: ShownPlan
    decision: Decision
    fields: tuple[Field, ...] | None
    log: Sequence[tuple[str, str, Mapping[str, object]]]

    def as_json(self) -> dict[str, object]:
        """Everything in JSON's types; `decision` is as /api/v1/decisions/ID has it."""
        return {
            "plan": self.plan,
            "decision": to_json(self.decision),
            "fields": self._changes(),
            "log": [
                {"level": level, "event": event, **{key: _plain(value) for key, value in keys.items()}}
                for level, event, keys in self.log
            ],
        }

    def _changes(self) -> dict[str, Json] | None:
        """The fields that were put above the message, and those of its own that were taken out."""
        if self.fields is None:
            return None
        header = self.decision.header
        came = list(Header(header, len(header)).fields)
        added = list(self.fields)
        removed: list[Field] = []
        # what is kept stands below what is added, in the order in which it came
        while came:
            field = came.pop()
            if added and added[-1].raw == field.raw:
                added.pop()
            else:
                removed.insert(0, field)
        return {"added": [_shown(field) for field in added], "removed": [_shown(field) for field in removed]}


def world_of(config: Config, planned: Sequence[PlannedPolicy], clock: Clock, dns: Dns) -> World:
    """The world in which a message is explained."""
    return World(
        config,
        planned,
        clock,
        dns,
        TakesAll(routes_of(config)),
        gatekeeper_settings(config),
        Spool(
            str(config.server.spool_dir or ""),
            memory_bytes=config.server.spool_memory_bytes,
            total_bytes=config.server.spool_memory_total_bytes,
        ),
        id_source(),
    )


def routes_of(config: Config) -> dict[str, str]:
    """The names of the routes by the patterns of their domains."""
    return {pattern: name for name, route in config.relay.named_routes for pattern in route.domains}


async def explain(case: Case, world: World) -> Explained:
    """Play the case; the policies are started before and stopped behind it. Raises ExplainError."""
    log, metrics = KeptLog(), ProcessMetrics()
    services = Services(world.clock, log, metrics, world.dns)
    # what the gateway remembers is neither asked nor changed
    store = WorkerStore(State(url="memory:"), [each.policy for each in world.planned], services)
    http = WorkerHttp([each.policy for each in world.planned], services)
    try:
        steps = steps_of(world.planned, services, world.dns, store, http)
    except StartError as exc:
        raise ExplainError(str(exc)) from exc
    reserved = frozenset([world.config.quarantine.header.lower()])
    pipeline = EarlyPipeline(steps, services, reserved=reserved)
    ring = DecisionRing(_NO_LIMIT, cut=False)
    gate = Gatekeeper(world.settings, pipeline, world.relay, world.spool, services, world.new_id, ring)
    gate.new_digests = world.new_digests
    try:
        await pipeline.start()
    except Exception as exc:
        raise ExplainError(start_failure(exc)) from exc
    try:
        talk = gate.open(case.client, case.port, case.tls, case.source)
        answer = await _play(talk, case)
    finally:
        await pipeline.stop()
        await http.close()
    decision = next(ring.latest(1), None)
    if decision is None and answer is not None:
        decision = _sent_away(talk, case, answer, pipeline, world.clock)
    if decision is None:
        raise ExplainError("the transaction came to no end")
    return Explained(shown_plan(world.planned), decision, world.relay.fields, log.lines)


async def _play(talk: Conversation, case: Case) -> Answer | None:
    """The dialogue. An answer only where the client was sent away before MAIL, and no transaction has begun."""
    answer = await talk.connect() or await talk.ehlo(case.helo, esmtp=case.esmtp)
    if answer is not None:
        return answer
    said = await talk.mail(case.envelope)
    if not said.reply.is_positive:
        return None
    answers = await talk.rcpt(case.rcpts)
    if case.content is None or not any(each.is_positive for each in answers.replies):
        talk.reset()
        return None
    talk.begin_content(is_stuffed=False)
    for block in case.content.blocks():
        if block:
            talk.content(block)
    await talk.eom(case.content.fault)
    return None


def _sent_away(
    talk: Conversation, case: Case, answer: Answer, pipeline: EarlyPipeline, clock: Clock
) -> Decision:
    """The record of a client that was refused before there was a transaction; the gateway keeps none of these."""
    by = next(judged for judged in reversed(pipeline.early) if judged.verdict.reply == answer.reply)
    return Decision(
        id=talk.session.id,
        time=clock.now(),
        session=talk.session,
        envelope=case.envelope,
        rcpts=(),
        action="deferred" if answer.reply.is_transient else "rejected",
        stage=by.stage,
        reply=answer.reply,
        policy=by.policy,
        reason=by.verdict.reason,
        duration_s=0.0,
        judged=tuple(pipeline.early),
        judged_at=clock.now(),
    )


def _shown(field: Field) -> dict[str, Json]:
    name, _, value = field.raw.partition(b":")
    text = value.decode("utf-8", "backslashreplace")
    return {"name": name.decode("utf-8", "backslashreplace").strip(), "value": text.strip()}


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
