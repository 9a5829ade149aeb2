"""How the whole gateway is: the supervisor tells it, the admin port asks it (adapters/admin)."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping

from gateway import __version__
from gateway.adapters.metrics import MergedMetrics
from gateway.decision import merge_decisions, parse_query
from gateway.generation import Generation, config_hash
from gateway.workers import Workers

_STATUS_TIMEOUT_S = 2.0
# Many records are serialised between mail and mail.
_DECISIONS_TIMEOUT_S = 5.0


class Overview:
    """What the supervisor knows and counts itself, and what its workers said."""

    def __init__(self, workers: Workers, first: Generation, config_path: str | None) -> None:
        self._workers = workers
        self._config_path = config_path
        self.current = first
        self.is_draining = False
        self.last_reload: Mapping[str, object] | None = None
        self.merged = MergedMetrics()
        own = self.merged.own
        self.lost_lines = own.counters(
            "mxgate_log_lines_lost_total", "Log lines that could not be written"
        ).labels()
        self.living = own.gauges("mxgate_workers", "Worker processes that run").labels()
        self.restarts = own.counters(
            "mxgate_worker_restarts_total", "Workers that died and were replaced"
        ).labels()
        self.blocked = own.counters(
            "mxgate_worker_blocked_total",
            "Times that a worker said nothing for 5 s, by the policy that kept it busy",
            ("policy",),
        )
        self.blocked.labels("")  # there from the start
        build = own.gauges("mxgate_build_info", "What runs; always 1", ("version", "python"))
        build.labels(__version__, platform.python_version()).set(1)
        started = own.gauges(
            "mxgate_start_time_seconds", "When the supervisor started, since the epoch"
        ).labels()
        started.set(time.time())
        self._hash = own.gauges("mxgate_config_hash", "The configuration in force, as a number").labels()
        self._reload_success = own.gauges(
            "mxgate_config_last_reload_success", "Whether the last reload, or else the start, took effect"
        ).labels()
        self._reload_time = own.gauges(
            "mxgate_config_last_reload_success_timestamp_seconds",
            "When the configuration in force was loaded, since the epoch",
        ).labels()
        self.in_force(first)

    # --- told by the supervisor ----------------------------------------------------------------------------

    def in_force(self, generation: Generation) -> None:
        """This configuration holds now."""
        self.current = generation
        self._config_hash = config_hash(generation.config)
        self._hash.set(int(self._config_hash, 16))
        self._reload_success.set(1)
        self._reload_time.set(time.time())

    def reload_failed(self) -> None:
        """The one before holds."""
        self._reload_success.set(0)

    # --- adapters.admin.Supervised -------------------------------------------------------------------------

    def not_live(self) -> tuple[str, ...]:
        """A worker whose loop does not turn."""
        return tuple(
            f"worker {worker.number}: {why}" for worker in self._workers if (why := worker.not_live())
        )

    def not_ready(self) -> tuple[str, ...]:
        """Draining, or a worker that is not there or not ready."""
        reasons = self._workers.not_ready(self.current.number, self.current.workers)
        return tuple(["draining", *reasons] if self.is_draining else reasons)

    def state(self) -> Mapping[str, object]:
        """How each worker that serves said it is."""
        serving = self._workers.of(self.current.number).values()
        return {
            "listening": any(worker.state is not None and worker.state.listening for worker in serving),
            "draining": self.is_draining,
            "workers": self._workers.states(self.current.number),
        }

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Of all processes."""
        return self.merged.render(accept)

    async def status(self) -> Mapping[str, object]:
        """What each worker answers now, those that end their sessions too."""
        return {
            "version": __version__,
            "config_file": self._config_path,
            "config_hash": self._config_hash,
            "generation": self.current.number,
            "last_reload": self.last_reload,
            "draining": self.is_draining,
            "workers": await self._workers.ask_all("status", None, _STATUS_TIMEOUT_S),
        }

    async def decisions(self, query: Mapping[str, str]) -> Mapping[str, object]:
        """The decision records of all workers, the newest first; a worker that did not answer stands in `errors`."""
        _, limit = parse_query(query)
        answers = await self._workers.ask_all("decisions", dict(query), _DECISIONS_TIMEOUT_S)
        return merge_decisions(answers, limit)
