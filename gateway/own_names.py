"""Services as one policy has them: its log lines carry its name, its metrics stand under it.

    services.metrics.counters("refused_total", "...")     # mxgate_sunday_refused_total
    services.log.info("list.restored", zone=zone)         # ... policy=sunday

So two policies never count into one family by accident, and an operator sees whose line it is. The app and the testing
kit's harness make them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.services import Merge

if TYPE_CHECKING:
    from gateway.services import Counters, Gauges, Histograms, Log, Metrics, Services


def under_name(services: Services, name: str) -> Services:
    """The same services for the policy of this name."""
    return replace(services, log=_OwnLog(name, services.log), metrics=_OwnMetrics(name, services.metrics))


class _OwnLog:
    """A Log that adds the policy to each line."""

    def __init__(self, name: str, log: Log) -> None:
        self._name = name
        self._log = log

    def debug(self, event: str, **keys: object) -> None:
        self._log.debug(event, **{**keys, "policy": self._name})

    def info(self, event: str, **keys: object) -> None:
        self._log.info(event, **{**keys, "policy": self._name})

    def warning(self, event: str, **keys: object) -> None:
        self._log.warning(event, **{**keys, "policy": self._name})

    def error(self, event: str, **keys: object) -> None:
        self._log.error(event, **{**keys, "policy": self._name})


class _OwnMetrics:
    """Metrics whose names begin with `mxgate_` and the policy; one that is given in full stays as it is."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self._prefix = f"mxgate_{name}_"
        self._metrics = metrics

    def counters(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counters:
        return self._metrics.counters(self._full(name), documentation, labels)

    def gauges(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), merge: Merge = Merge.SUM
    ) -> Gauges:
        return self._metrics.gauges(self._full(name), documentation, labels, merge)

    def histograms(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
    ) -> Histograms:
        return self._metrics.histograms(self._full(name), documentation, labels, buckets)

    def _full(self, name: str) -> str:
        return name if name.startswith(self._prefix) else self._prefix + name
