"""One downstream: its connections, whether it is up, what it offers, what is counted of it.

A host that cannot be reached is down at once. Trouble in the middle of a dialogue starts a probe (connect, EHLO), which
decides. A host that is down is probed, from `probe_min_s` doubling to `probe_max_s`, until it answers, and is up as
soon as anybody's connection to it is. Never two probes at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import NoConnectionError, Opener
from gateway.adapters.relay.pool import DismissedError, Pool, PoolMetrics
from gateway.adapters.relay.settings import HostSettings, Identity, RelaySettings, RouteSettings
from gateway.services import Counter, Instruments, Metrics
from gateway.session import Session
from gateway.smtp.client import Capabilities

# Tokens of gateway.relaying.Delivery that are trouble, and the delivery whose client was gone.
_ERRORS = (
    "partial",
    "smtputf8",
    "connect",
    "tls",
    "banner",
    "ehlo",
    "identity",
    "busy",
    "timeout",
    "closed",
    "protocol",
    "final_lost",
    "internal",
    "orphan",
)
# Those that may mean that the host is not well.
_SUSPICIOUS = frozenset({"timeout", "closed", "protocol", "final_lost"})


class HostMetrics:
    """The children of the relay's metric families that belong to one host of one route."""

    def __init__(self, metrics: Metrics, route: str, host: str) -> None:
        up = metrics.gauges(
            "mxgate_relay_up",
            "Workers that reached the downstream last time; 0: it is down for all of them",
            ("route", "host"),
        )
        connections = metrics.gauges(
            "mxgate_relay_connections", "Connections to a downstream", ("route", "host", "state")
        )
        waiting = metrics.gauges(
            "mxgate_relay_waiting",
            "Callers that wait for a connection, since all that may be open are in use",
            ("route", "host"),
        )
        errors = metrics.counters(
            "mxgate_relay_errors_total",
            "Trouble with a downstream, also where another one took over",
            ("route", "host", "error"),
        )
        durations = metrics.histograms(
            "mxgate_relay_duration_seconds",
            "Seconds of the relay's steps; connect: up to the answer to EHLO; deliver: up to the dot; final: behind it",
            ("route", "host", "step"),
        )
        self.up = up.labels(route, host)
        self.pool = PoolMetrics(
            in_use=connections.labels(route, host, "in_use"),
            idle=connections.labels(route, host, "idle"),
            waiting=waiting.labels(route, host),
            connect_s=durations.labels(route, host, "connect"),
        )
        self.verify_s = durations.labels(route, host, "verify")
        self.deliver_s = durations.labels(route, host, "deliver")
        self.final_s = durations.labels(route, host, "final")
        self.errors: dict[str, Counter] = {error: errors.labels(route, host, error) for error in _ERRORS}


class Host:
    """One downstream of one route. `capabilities` are those of its last EHLO, None before the first.

    `changed` is called when they are something else than before. `last_error` is the token of what was wrong with it
    since it was last reached, "" for nothing. Without `start` there are no probes.
    """

    def __init__(
        self,
        at: HostSettings,
        route: RouteSettings,
        settings: RelaySettings,
        services: Instruments,
        changed: Callable[[], None],
    ) -> None:
        self.name = str(at)
        self.route = route.name
        self.is_up = True
        # it is up as far as is known, and a probe that decides is under way
        self.is_suspected = False
        self.last_error = ""
        self.capabilities: Capabilities | None = None
        self.is_forwarding = route.identity is Identity.XFORWARD
        self.metrics = HostMetrics(services.metrics, route.name, self.name)
        self.metrics.up.set(1)
        self._log = services.log
        self._changed = changed
        self._opener = Opener(at, route, settings, self._learn)
        self.pool = Pool(
            self._opener, settings, route.identity, services.clock, self.metrics.pool, watcher=self
        )
        # to wait for a slot, to connect, to greet
        self._probe_timeout_s = 3 * settings.connect_timeout_s
        self._probe_min_s = self._pause_s = settings.probe_min_s
        self._probe_max_s = settings.probe_max_s
        self._is_watched = False
        self._is_warned = False
        self._timer: asyncio.TimerHandle | None = None
        self._probe: asyncio.Task[None] | None = None

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Ask it what it offers, and watch its health from here."""
        self._is_watched = True
        self._begin_probe()

    async def stop(self) -> None:
        """No more probes; nobody waits for a connection any more."""
        self._is_watched = False
        self._cancel_timer()
        self._opener.addresses.close()
        self.pool.close()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait((self._probe,))

    # --- use -------------------------------------------------------------------------------------

    async def acquire(
        self, client: Session | None, deadline: float, *, fresh: bool = False, is_urgent: bool = False
    ) -> Connection:
        """As Pool.acquire, with its trouble counted. Raises NoConnectionError."""
        try:
            return await self.pool.acquire(client, deadline, fresh=fresh, is_urgent=is_urgent)
        except NoConnectionError as trouble:
            trouble.host = self.name
            if not isinstance(trouble, DismissedError):
                self.metrics.errors[trouble.error].inc()
                self.last_error = trouble.error
            raise

    def state(self) -> dict[str, object]:
        """What is known of it, as /readyz shows it."""
        return {
            "host": self.name,
            "up": self.is_up,
            "in_use": self.pool.in_use,
            "idle": self.pool.idle,
            "last_error": self.last_error,
        }

    def met(self, error: str) -> None:
        """A dialogue ended in this trouble, a token of gateway.relaying.Delivery."""
        self.metrics.errors[error].inc()
        if error in _SUSPICIOUS:
            self.last_error = error
            self._suspect()

    # --- health ----------------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """The pool has a new connection."""
        connection.host = self
        self._up()

    def not_opened(self, trouble: NoConnectionError, *, is_hurried: bool) -> None:
        """The pool failed to get one."""
        if trouble.is_about_client:
            return
        if is_hurried:
            # It had less time than it may take.
            self._suspect()
        else:
            self._down(trouble)

    def _up(self) -> None:
        self.last_error = ""
        self._pause_s = self._probe_min_s
        self._cancel_timer()
        if not self.is_up:
            self.is_up = True
            self.metrics.up.set(1)
            self._log.info("relay.host_up", route=self.route, host=self.name)

    def _down(self, trouble: NoConnectionError) -> None:
        if self.is_up:
            self.is_up = False
            self.metrics.up.set(0)
            self._log.warning(
                "relay.host_down",
                route=self.route,
                host=self.name,
                error=trouble.error,
                detail=str(trouble),
            )
            self.pool.dismiss()
        self._probe_later()

    def _suspect(self) -> None:
        """Probe it at once; where it is known to be down it is probed anyway."""
        if self._is_watched and self._probe is None and self._timer is None:
            self.is_suspected = True
            self._begin_probe()

    def _probe_later(self) -> None:
        if self._is_watched and self._probe is None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._begin_probe)
            self._pause_s = min(2 * self._pause_s, self._probe_max_s)

    def _begin_probe(self) -> None:
        self._timer = None
        self._probe = asyncio.create_task(self._ask(), name="relay-probe")
        self._probe.add_done_callback(self._probe_ended)

    async def _ask(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._probe_timeout_s
        try:
            connection = await self.acquire(None, deadline, fresh=True, is_urgent=True)
        except NoConnectionError as trouble:
            self._log.warning(
                "relay.failed",
                route=self.route,
                host=self.name,
                step="probe",
                error=trouble.error,
                detail=str(trouble),
            )
        else:
            # also one that somebody has just finished with: it answers
            self._up()
            self.pool.release(connection)

    def _probe_ended(self, probe: asyncio.Task[None]) -> None:
        self._probe = None
        self.is_suspected = False
        if not probe.cancelled() and (defect := probe.exception()) is not None:
            # Mail goes on; what is offered stays cautious until a delivery's connection tells more.
            self._log.error(
                "relay.failed",
                route=self.route,
                host=self.name,
                step="probe",
                error="internal",
                detail=repr(defect),
            )
        if not self.is_up or self.capabilities is None:
            self._probe_later()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- what it offers --------------------------------------------------------------------------

    def _learn(self, capabilities: Capabilities) -> None:
        if self.is_forwarding:
            self._watch_identity(is_offered=bool(capabilities.xforward))
        if capabilities != self.capabilities:
            self.capabilities = capabilities
            self._changed()

    def _watch_identity(self, *, is_offered: bool) -> None:
        """Where XFORWARD is not offered, say so once until it is."""
        if not is_offered and not self._is_warned:
            self._log.warning("relay.identity_not_offered", route=self.route, host=self.name)
        self._is_warned = not is_offered
