"""How the whole gateway is: the supervisor tells it, the admin port asks it (adapters/admin)."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping

from gateway import __version__
from gateway.adapters.metrics import MergedMetrics
from gateway.adapters.processes import Processes
from gateway.decision import merge_decisions, parse_query
from gateway.decision.show import timestamp
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
        self._started = time.time()
        self.merged = MergedMetrics()
        own = self.merged.own
        self.lost_lines = own.counters(
            "mxgate_log_lines_lost_total",
            "Log lines that standard error did not take at once; mail never waits for the log",
        ).labels()
        self.living = own.gauges(
            "mxgate_workers",
            "Worker processes that run; after a reload also old ones that end their sessions",
        ).labels()
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
        started.set(self._started)
        self._ready = own.gauges(
            "mxgate_ready", "Whether /readyz says that the gateway should get mail: 1 or 0"
        ).labels()
        self._configured = own.gauges(
            "mxgate_workers_configured", "Worker processes that the configuration in force asks for"
        ).labels()
        self._processes = Processes(own)
        self._config = own.gauges(
            "mxgate_config_info",
            "The configuration in force, without its secrets; always 1: equal on machines with equal ones",
            ("hash",),
        )
        self._reload_success = own.gauges(
            "mxgate_config_last_reload_success",
            "0 when the last reload failed and the old configuration stays in force, else 1",
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
        self._config.clear()
        self._config.labels(self._config_hash).set(1)
        self._configured.set(generation.workers)
        self._reload_success.set(1)
        self._loaded = time.time()
        self._reload_time.set(self._loaded)

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
            "config": {
                "hash": self._config_hash,
                "generation": self.current.number,
                # what is wrong stands in /api/v1/status, which not everybody may ask
                "last_reload": {key: self.last_reload[key] for key in ("timestamp", "ok")}
                if self.last_reload
                else None,
            },
            "workers": self._workers.states(self.current.number),
        }

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Of all processes."""
        self._ready.set(not self.not_ready())
        self._processes.look((worker.number, worker.pid) for worker in self._workers)
        return self.merged.render(accept)

    async def status(self) -> Mapping[str, object]:
        """What each worker answers now, those that end their sessions too."""
        return {
            "version": __version__,
            "hostname": self.current.config.server.hostname,
            "uptime_s": round(time.time() - self._started, 1),
            "ready": not self.not_ready(),
            "reasons": list(self.not_ready()),
            "config_file": self._config_path,
            "config_hash": self._config_hash,
            "config_loaded": timestamp(self._loaded),
            "generation": self.current.number,
            "last_reload": self.last_reload,
            "draining": self.is_draining,
            "wanted_workers": self.current.workers,
            "health": self._workers.states(self.current.number),
            **self._counts(),
            "workers": await self._workers.ask_all("status", None, _STATUS_TIMEOUT_S),
        }

    def _counts(self) -> dict[str, object]:
        """Since the start: transactions by action, and of each policy what it decided, would have, and failed at."""
        transactions: dict[str, int] = {}
        policies: dict[str, dict[str, object]] = {}
        for family in self.merged.collect():
            for sample in family.samples:
                labels, count = sample.labels, int(sample.value)
                match sample.name:
                    case "mxgate_transactions_total":
                        action = labels["action"]
                        transactions[action] = transactions.get(action, 0) + count
                    case "mxgate_policy_decisions_total":
                        _add(policies, labels["policy"], "decisions", labels["action"], count)
                    case "mxgate_policy_would_total":
                        _add(policies, labels["policy"], "would", labels["action"], count)
                    case "mxgate_policy_failures_total":
                        _add(policies, labels["policy"], "failed", labels["failure"], count)
        return {"transactions": transactions, "policies": policies}

    async def decisions(self, query: Mapping[str, str]) -> Mapping[str, object]:
        """The decision records of all workers, the newest first; a worker that did not answer stands in `errors`."""
        _, limit = parse_query(query)
        answers = await self._workers.ask_all("decisions", dict(query), _DECISIONS_TIMEOUT_S)
        return merge_decisions(answers, limit)


def _add(policies: dict[str, dict[str, object]], policy: str, what: str, word: str, count: int) -> None:
    said = policies.setdefault(policy, {"decisions": {}, "would": {}, "failed": {}, "failures": 0})
    counts = said[what]
    assert isinstance(counts, dict)
    counts[word] = counts.get(word, 0) + count
    if what == "failed":
        said["failures"] = sum(counts.values())
