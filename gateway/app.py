"""The composition root of one worker: configuration -> services -> policies -> relay -> gatekeeper -> listener.

Start: everything that can fail is made before the first connection is accepted; what fails is said on standard
error and the worker exits with 78. Stop: no new connections, messages under way end, then relay, then policies.
Called by the supervisor in a process of its own; the end of the channel means that the supervisor died.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from gateway import plugins
from gateway.adapters import memory
from gateway.adapters.auth import (
    DovecotBackend,
    DownstreamBackend,
    DownstreamSettings,
    DownstreamSettingsError,
)
from gateway.adapters.dns import Dns, DnsSettings, DnsSettingsError, Nameserver
from gateway.adapters.listener import Listener, ListenerSettings
from gateway.adapters.log import open_log, take_over_library_logs
from gateway.adapters.loop_lag import LoopLag
from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.relay import (
    HostSettings,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
    SmtpRelay,
    TlsMode,
)
from gateway.adapters.relay.settings import Identity, Protocol
from gateway.adapters.reserve import Reserve
from gateway.adapters.tls import CertificateError, ServerTls
from gateway.authentication import STORE_NAME, AuthenticationSettings, Authenticator, Backend
from gateway.blocked import places
from gateway.channel import (
    Channel,
    ChannelError,
    Drain,
    Json,
    Message,
    MetricsPush,
    Places,
    Request,
    Response,
    State,
    open_channel,
)
from gateway.config import AuthBackend, Config, ConfigError, HostPort, Route
from gateway.config.explain import print_problems
from gateway.connection_counts import ConnectionCounts
from gateway.debugging import Debugging
from gateway.decision import DecisionRing, DecisionsAnswer, FilterError
from gateway.errors import GatewayError
from gateway.gatekeeper import Gatekeeper, GatekeeperSettings
from gateway.listening import Sockets, WorkerSockets
from gateway.mail.body import Spool, SpoolError
from gateway.open_http import WorkerHttp
from gateway.open_store import WorkerStore
from gateway.own_names import under_name
from gateway.pipeline import START_S, Pipeline, least_times
from gateway.plan import PlanError, Step
from gateway.redaction import Redaction
from gateway.services import Counter, Instruments, Log, Merge, Resolver, Services
from gateway.session import Role
from gateway.show_plan import shown_plan
from gateway.smtp.server import ServerSettings
from gateway.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 78

_PUSH_S = 1.0
# What a policy may wait for DNS, or for a service, of the time that it has: the rest is for what it makes of answers.
_DNS_SHARE = 0.85
_HTTP_SHARE = 0.95
_GC_THRESHOLD = 50_000
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


class SystemClock:
    """The clocks of the system."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class StartError(GatewayError):
    """The worker cannot start; the text says why. The operator has to change something."""


def run_worker(
    config: Config,
    sockets: WorkerSockets,
    channel: socket.socket,
    counts: Mapping[Role, ConnectionCounts],
) -> int:
    """Serve until drained; the exit code. Everything that this process needs from its parent is in the arguments."""
    metrics = ProcessMetrics()
    log = log_of(config, on_loss=lost_lines(metrics).inc)
    # Messages leave hardly any cycles; to look for them as often as Python does would cost a hundredth of each.
    gc.set_threshold(_GC_THRESHOLD)
    take_over_library_logs(log)
    try:
        planned = [(view, plugins.plan(view)) for view in views(config)]
    except ConfigError as exc:
        print_problems(exc, sys.stderr)
        return EXIT_CONFIG
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            worker = Worker(config, planned, log, metrics)
            return runner.run(worker.run(sockets, channel, counts))
    except StartError as exc:
        log.error("worker.start_failed", error=str(exc))
        return EXIT_CONFIG


def lost_lines(metrics: ProcessMetrics) -> Counter:
    """What counts the lines that the log could not take."""
    return metrics.counters(
        "mxgate_log_lines_lost_total",
        "Log lines that standard error did not take at once; mail never waits for the log",
    ).labels()


def log_of(config: Config, *, on_loss: Callable[[], None], with_debug: bool = False) -> Log:
    """The log that the configuration asks for."""
    wanted = config.log
    return open_log(
        wanted.format,
        on_loss=on_loss,
        hostname=config.server.hostname,
        redaction=Redaction(wanted.redact),
        with_debug=with_debug,
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The one of uvloop where it is installed (the extra `fast`)."""
    try:
        import uvloop  # noqa: PLC0415  # optional
    except ImportError:
        return None
    return uvloop.new_event_loop


def views(config: Config) -> tuple[Config, ...]:
    """The configuration as each role sees it that has listeners; the MX has one always."""
    return (config, config.for_submission()) if config.submission.is_on else (config,)


@dataclass(frozen=True, slots=True)
class _Side:
    """What serves one role: its policies, its way out, its listener."""

    role: Role
    pipeline: Pipeline
    relay: SmtpRelay
    listener: Listener


class Worker:
    """One worker process from start to end. `planned`: each role's view of the configuration, and its policies."""

    def __init__(
        self,
        config: Config,
        planned: Sequence[tuple[Config, Sequence[plugins.PlannedPolicy]]],
        log: Log,
        metrics: ProcessMetrics,
    ) -> None:
        self._config = config
        self._log = log
        self._metrics = metrics
        self._instruments = Instruments(SystemClock(), log, metrics)
        self._planned = planned
        policies = [each.policy for _, side in planned for each in side]
        self._store = WorkerStore(
            config.state, policies, self._instruments, is_needed=config.submission.is_on
        )
        self._http = WorkerHttp(policies, self._instruments)
        self._stop = asyncio.Event()
        self._parent_died = False
        self._patience_s = 0.0
        self._channel: Channel | None = None
        self._sides: list[_Side] = []
        self._dns: Dns | None = None
        self._tls: ServerTls | None = None
        self._content_spool: Spool | None = None
        self._lag = LoopLag(metrics)
        self._gauges = _Gauges(metrics)
        self._redaction = Redaction(config.log.redact)
        self._debugging = Debugging(
            log_of(config, on_loss=lost_lines(metrics).inc, with_debug=True),
            config.log.debug_clients,
            config.log.debug_rcpts,
            self._redaction,
        )
        self._decisions = DecisionRing(on_add=self._debugging.decided if self._debugging else None)
        self._pushing: asyncio.TimerHandle | None = None
        self._state = State(listening=False, draining=False, policies_started=False)

    async def run(
        self,
        sockets: WorkerSockets,
        channel: socket.socket,
        counts: Mapping[Role, ConnectionCounts],
    ) -> int:
        """Start, serve, drain."""
        config = self._config
        self._catch_signals()
        self._channel = await open_channel(channel, on_message=self._on_message, on_close=self._on_close)
        self._tls = tls = self._server_tls()
        self._content_spool = spool = self._spool()
        try:
            self._dns = dns = Dns(dns_settings(config), self._instruments)
        except DnsSettingsError as exc:
            raise StartError(str(exc)) from exc
        new_id, reserve = id_source(), self._reserve()
        self._sides = sides = [
            self._side(view, planned, dns, tls, spool, new_id, counts[view.role], reserve)
            for view, planned in self._planned
        ]
        try:
            await self._store.start()
        except StoreError as exc:
            raise StartError(
                f"the store cannot be opened: {exc}; give state.url a file in a directory that mxgate may write to, "
                'or a Redis; without a policy that remembers (policy.greylist.mode = "off") none is needed'
            ) from exc
        for side in sides:
            try:
                await side.pipeline.start()
            except Exception as exc:
                raise StartError(start_failure(exc)) from exc
        for side in sides:
            await side.relay.start()
        for side in sides:
            await side.listener.start(*sockets.get(side.role, Sockets()))
        policies = [step.policy for side in sides for step in side.pipeline.steps]
        self._channel.send(Places([[*place] for place in places(policies)]))
        self._say(listening=True, policies_started=True)
        self._log.info("worker.started", pid=os.getpid(), policies=self._policies())
        self._lag.start()
        self._push()
        await self._stop.wait()
        for side in sides:
            await side.listener.stop_accepting()
        self._say(draining=True, listening=False)
        timeout_s = 0.0 if self._parent_died else config.server.drain_timeout_s
        async with asyncio.TaskGroup() as draining:
            for side in sides:
                draining.create_task(side.listener.drain(timeout_s, self._patience_s))
        async with asyncio.TaskGroup() as closing:
            for side in sides:
                closing.create_task(side.relay.close())
        for side in sides:
            await side.pipeline.stop()
        await self._http.close()
        await self._store.close()
        await dns.close()
        self._lag.stop()
        if self._pushing is not None:
            self._pushing.cancel()
        self._channel.send(MetricsPush(self._metrics.snapshot()))
        self._log.info("worker.ended", pid=os.getpid())
        self._channel.close()
        return EXIT_FAILURE if self._parent_died else EXIT_OK

    def _side(
        self,
        view: Config,
        planned: Sequence[plugins.PlannedPolicy],
        dns: Dns,
        tls: ServerTls | None,
        spool: Spool,
        new_id: Callable[[], str],
        counts: ConnectionCounts,
        reserve: Reserve,
    ) -> _Side:
        instruments = self._instruments
        services = Services(instruments.clock, instruments.log, instruments.metrics, dns)
        pipeline = self._pipeline(view, planned, services, dns)
        try:
            relay = SmtpRelay(
                relay_settings(view), clock=services.clock, log=services.log, metrics=services.metrics
            )
        except RelaySettingsError as exc:
            raise StartError(str(exc)) from exc
        gatekeeper = Gatekeeper(
            gatekeeper_settings(view),
            pipeline,
            relay,
            spool,
            services,
            new_id,
            decisions=self._decisions,
            authenticator=self._authenticator(view) if view.role is Role.SUBMISSION else None,
        )
        listener = Listener(
            listener_settings(view),
            server_settings(view, has_groups=pipeline.has_groups),
            gatekeeper,
            services,
            tls,
            counts,
            self._debugging,
            reserve,
        )
        return _Side(view.role, pipeline, relay, listener)

    def _authenticator(self, view: Config) -> Authenticator:
        try:
            backend = auth_backend(view)
        except DownstreamSettingsError as exc:
            raise StartError(str(exc)) from exc
        return Authenticator(
            authentication_settings(view), backend, self._store.part(STORE_NAME), self._instruments
        )

    def _policies(self) -> list[str]:
        return [each.name for _, planned in self._planned for each in planned]

    def _server_tls(self) -> ServerTls | None:
        files = self._config.server.tls
        if files.cert_file is None or files.key_file is None:
            return None
        try:
            return ServerTls(str(files.cert_file), str(files.key_file), self._log)
        except CertificateError as exc:
            raise StartError(str(exc)) from exc

    def _reserve(self) -> Reserve:
        # of the process, so one for all roles, with room for the connections of each
        connections = sum(view.server.max_connections for view, _ in self._planned)
        reserve = Reserve(connections, self._config.server.max_worker_memory_bytes)
        if reserve.limit < reserve.wanted:
            self._log.warning("descriptors.few", limit=reserve.limit, wanted=reserve.wanted)
        return reserve

    def _spool(self) -> Spool:
        server = self._config.server
        spool = Spool(
            str(server.spool_dir or ""),
            memory_bytes=server.spool_memory_bytes,
            total_bytes=server.spool_memory_total_bytes,
            release=memory.release,
        )
        try:
            spool.open_file().close()
        except SpoolError as exc:
            raise StartError(str(exc)) from exc
        return spool

    def _pipeline(
        self, view: Config, planned: Sequence[plugins.PlannedPolicy], services: Services, dns: Dns
    ) -> Pipeline:
        steps = steps_of(planned, services, dns, self._store, self._http)
        reserved = frozenset([view.quarantine.header.lower()])
        try:
            return Pipeline(steps, services, reserved=reserved)
        except PlanError as exc:
            raise StartError(str(exc)) from exc

    # --- the supervisor -------------------------------------------------------------------------------

    def _say(self, **changes: bool) -> None:
        state = self._state
        self._state = State(
            listening=changes.get("listening", state.listening),
            draining=changes.get("draining", state.draining),
            policies_started=changes.get("policies_started", state.policies_started),
            detail=self._detail(),
        )
        assert self._channel is not None
        self._channel.send(self._state)

    def _detail(self) -> dict[str, Json]:
        """What /readyz shows of this worker, although it is no reason to get no mail."""
        detail: dict[str, Json] = {}
        for side in self._sides:
            own: dict[str, Json] = {
                "clients": cast("Json", side.listener.state()),
                "relay": cast("Json", side.relay.state()),
            }
            if side.role is Role.MX:
                detail |= own
            else:
                detail[str(side.role)] = own
        if self._tls is not None:
            detail["tls"] = cast("Json", self._tls.state())
        if (store := self._store.detail()) is not None:
            detail["store"] = cast("Json", store)
        if self._dns is not None:
            detail["dns"] = cast("Json", self._dns.state())
        return detail

    def _push(self) -> None:
        channel = self._channel
        assert channel is not None
        if channel.is_writable:
            if self._detail() != self._state.detail:
                self._say()
            self._gauges.look(self._content_spool, self._tls)
            channel.send(MetricsPush(self._metrics.snapshot()))
        self._pushing = asyncio.get_running_loop().call_later(_PUSH_S, self._push)

    def _status(self) -> dict[str, Json]:
        """What /api/v1/status shows of this worker."""
        return {
            "sessions": sum(len(side.listener.sessions) for side in self._sides),
            "policies": cast("Json", self._policies()),
            "plan": cast("Json", shown_plan(self._planned[0][1])) if self._planned else None,
            "submission_plan": cast("Json", shown_plan(self._planned[1][1]))
            if len(self._planned) > 1
            else None,
        }

    def _answer_decisions(self, number: int, query: Json) -> None:
        """Answer /api/v1/decisions, a few records in each turn of the loop, since mail goes on meanwhile."""
        channel = self._channel
        assert channel is not None
        try:
            answer = DecisionsAnswer(
                self._decisions, query if isinstance(query, dict) else {}, self._redaction
            )
        except FilterError as exc:
            channel.send(Response(number, error=str(exc)))
            return

        def go_on() -> None:
            if answer.step():
                channel.send(Response(number, answer.result))
            else:
                asyncio.get_running_loop().call_soon(go_on)

        go_on()

    def _on_message(self, message: Message) -> None:
        match message:
            case Drain():
                self._drain(message.patience_s)
            case Request(id=number, name="status"):
                assert self._channel is not None
                self._channel.send(Response(number, self._status()))
            case Request(id=number, name="decisions"):
                self._answer_decisions(number, message.argument)
            case Request():
                assert self._channel is not None
                self._channel.send(Response(message.id, error=f"unknown request {message.name}"))
            case _:
                pass

    def _on_close(self, error: ChannelError | None) -> None:
        if not self._stop.is_set():
            self._parent_died = True
            self._log.error("supervisor.lost", error=str(error or ""))
        self._drain(0.0)

    def _drain(self, patience_s: float) -> None:
        if self._stop.is_set():
            for side in self._sides:
                side.listener.hurry()
            return
        self._patience_s = patience_s
        self._stop.set()

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        # the terminal sends SIGINT to the whole group; the supervisor decides
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._drain, 0.0)


class _Gauges:
    """What is looked at before each push, since it costs nothing then."""

    def __init__(self, metrics: ProcessMetrics) -> None:
        self._metrics = metrics
        self._content = metrics.gauges(
            "mxgate_content_memory_bytes", "Octets of messages under way that are in memory"
        ).labels()
        self._limit = metrics.gauges(
            "mxgate_content_memory_limit_bytes",
            "Octets of messages that may be in memory, of all workers; what is beyond that goes to files",
        ).labels()
        self._spilled = metrics.counters(
            "mxgate_content_spilled_total", "Messages whose content went from memory to a file"
        ).labels()
        self._spills = 0

    def look(self, spool: Spool | None, tls: ServerTls | None) -> None:
        """As of now."""
        if spool is not None:
            self._content.set(spool.used_bytes)
            self._limit.set(spool.total_bytes)
            self._spilled.inc(spool.spilled - self._spills)
            self._spills = spool.spilled
        if tls is not None:
            # a gateway without a certificate shows none that could end
            self._metrics.gauges(
                "mxgate_certificate_expiry_timestamp_seconds",
                "When the first certificate of the chain that clients are shown ends, since the epoch",
                merge=Merge.MIN,
            ).labels().set(tls.expires_at)


def start_failure(exc: BaseException) -> str:
    """Which policy did not start, and why."""
    policy = (getattr(exc, "__notes__", None) or ["a policy"])[-1]
    why = f"not within {START_S:g} s" if isinstance(exc, TimeoutError) and not str(exc) else repr(exc)
    return f"{policy} did not start: {why}"


class ResolverForPolicies(typing.Protocol):
    """What makes a Resolver for each policy: adapters.dns, and what `mxgate explain` has in its place."""

    def for_policy(self, name: str, limit_s: float) -> Resolver: ...


def steps_of(
    planned: Sequence[plugins.PlannedPolicy],
    services: Services,
    dns: ResolverForPolicies,
    store: WorkerStore,
    http: WorkerHttp,
) -> list[Step]:
    """The policies, made, each with its own resolver, log, metrics, HTTP and part of the store. Raises StartError."""
    steps = []
    times = least_times(planned)
    for each in planned:
        limit_s = min(each.timeout_s, times[each.name])
        try:
            own = replace(
                under_name(services, each.name),
                dns=dns.for_policy(each.name, _DNS_SHARE * limit_s),
                store=store.for_policy(each.policy),
                http=http.for_policy(each.policy, _HTTP_SHARE * limit_s),
            )
            steps.append(each.step(own))
        except Exception as exc:
            raise StartError(f"policy {each.name}: {exc}") from exc
    return steps


def dns_settings(config: Config) -> DnsSettings:
    """[dns] as the resolver takes it."""
    dns = config.dns
    return DnsSettings(
        nameservers=tuple(Nameserver(at.host, at.port) for at in dns.nameservers),
        timeout_s=dns.timeout_s,
        total_timeout_s=dns.total_timeout_s,
    )


def relay_settings(config: Config) -> RelaySettings:
    """[relay] as the relay takes it."""
    relay = config.relay
    return RelaySettings(
        hostname=config.server.hostname,
        routes=tuple(_route_settings(name, route) for name, route in config.relayed),
        connect_timeout_s=relay.connect_timeout_s,
        reply_timeout_s=relay.reply_timeout_s,
        final_timeout_s=relay.final_timeout_s,
        drain_timeout_s=config.server.drain_timeout_s,
        max_connections_per_host=relay.max_connections_per_host,
        idle_timeout_s=relay.idle_timeout_s,
        recipient_cache_s=relay.recipient_cache_s,
        recipient_cache_negative_s=relay.recipient_cache_negative_s,
    )


def _route_settings(name: str, route: Route) -> RouteSettings:
    def host(at: HostPort) -> HostSettings:
        return HostSettings(
            host=at.host,
            port=at.port,
            tls=TlsMode(route.tls),
            tls_name=route.tls_name,
            tls_ca_file=str(route.tls_ca_file or ""),
            tls_implicit=route.tls_implicit,
        )

    return RouteSettings(
        name=name,
        domains=route.domains,
        groups=tuple(tuple(map(host, group)) for group in route.downstream),
        verify_recipients=route.verify_recipients,
        protocol=Protocol(route.protocol),
        identity=Identity(route.identity),
    )


def gatekeeper_settings(config: Config) -> GatekeeperSettings:
    """What the gatekeeper takes of the configuration."""
    server = config.server
    return GatekeeperSettings(
        hostname=server.hostname,
        max_message_bytes=server.max_message_bytes,
        max_header_bytes=server.max_header_bytes,
        max_header_fields=server.max_header_fields,
        max_received=server.max_received,
        trusted_networks=tuple(config.relay.trusted_networks),
        delay_reject=config.pipeline.delay_reject,
        quarantine_header=config.quarantine.header,
        quarantine_route=config.quarantine.route,
        authserv_id=config.authserv_id,
        authserv_id_aliases=tuple(config.auth.authserv_id_aliases),
        role=config.role,
        adds_missing_fields=config.role is Role.SUBMISSION and config.submission.adds_missing_fields,
    )


def server_settings(config: Config, *, has_groups: bool = False) -> ServerSettings:
    """What the SMTP engine takes of the configuration; `has_groups`: policies part the recipients' domains."""
    server, routes = config.server, [route for route in config.relay.routes if route.domains]
    # DESIGN.md section 6: LMTP answers for each recipient behind the dot, so a transaction has one
    is_lmtp = all(Protocol(route.protocol) is Protocol.LMTP for route in routes)
    return ServerSettings(
        hostname=server.hostname,
        max_message_bytes=server.max_message_bytes,
        max_recipients=1 if is_lmtp else server.max_recipients,
        max_errors=server.max_errors,
        max_commands_without_mail=server.max_commands_without_mail,
        max_unknown_recipients=server.max_unknown_recipients,
        max_line_bytes=server.max_line_bytes,
        has_tls=server.tls.cert_file is not None,
        has_recipient_groups=has_groups or len(routes) > 1,
        is_submission=config.role is Role.SUBMISSION,
    )


def listener_settings(config: Config) -> ListenerSettings:
    """What the listener takes of the configuration."""
    server = config.server
    return ListenerSettings(
        max_connections=server.max_connections,
        max_connections_per_client=server.max_connections_per_client,
        max_new_connections_per_client_per_minute=server.max_new_connections_per_client_per_minute,
        greeting_delay_s=server.greeting_delay_s,
        command_timeout_s=server.command_timeout_s,
        idle_timeout_s=server.idle_timeout_s,
        data_timeout_s=server.data_timeout_s,
        session_timeout_s=server.session_timeout_s,
        allow_bare_lf_from=tuple(server.allow_bare_lf_from),
        proxy_protocol_from=tuple(server.proxy_protocol_from),
    )


def authentication_settings(config: Config) -> AuthenticationSettings:
    """What the authenticator takes of the configuration."""
    auth = config.submission.auth
    return AuthenticationSettings(
        timeout_s=auth.timeout_s,
        failure_delay_s=auth.failure_delay_s,
        failure_window_s=auth.failure_window_s,
        max_failures_per_client=auth.max_failures_per_client,
        max_failures_per_user=auth.max_failures_per_user,
    )


def auth_backend(config: Config) -> Backend:
    """The back-end that the configuration names. Raises DownstreamSettingsError."""
    auth = config.submission.auth
    if isinstance(auth.address, str):
        return DovecotBackend(auth.address.removeprefix("unix:"))
    host, port = auth.address.host, auth.address.port
    if auth.backend is AuthBackend.DOVECOT:
        return DovecotBackend((host, port))
    return DownstreamBackend(
        DownstreamSettings(
            host,
            port,
            config.server.hostname,
            tls_implicit=auth.tls_implicit,
            tls_ca_file=str(auth.tls_ca_file or ""),
            tls_name=auth.tls_name,
        )
    )


def id_source() -> Callable[[], str]:
    """Makes ids that are short and unique over workers and restarts: when the worker began, a random part, a number."""
    prefix = f"{_base32(int(time.time() * 1000))}{_base32(int.from_bytes(os.urandom(2)) | 1 << 16)}"
    count = 0

    def new_id() -> str:
        nonlocal count
        count += 1
        return f"{prefix}{count:04x}"

    return new_id


def _base32(number: int) -> str:
    digits = ""
    while number:
        digits = _CROCKFORD[number & 31] + digits
        number >>= 5
    return digits
