"""gateway.own_names: nobody's lines and metrics are taken for another policy's."""

from __future__ import annotations

import pytest

from gateway.app import steps_of
from gateway.config.model import State
from gateway.open_http import WorkerHttp
from gateway.open_store import WorkerStore
from gateway.own_names import under_name
from gateway.plugins import PlannedPolicy
from gateway.policy import Mode, NoSettings, OnError, Policy
from gateway.session import Transaction
from gateway.testing import FakeServices
from gateway.verdict import Verdict, proceed


class Counts(Policy[NoSettings]):
    name = "counts"

    async def on_mail(self, tx: Transaction) -> Verdict:
        return proceed()


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_each_line_names_the_policy_and_it_cannot_name_another(level: str) -> None:
    services = FakeServices()
    getattr(under_name(services, "sunday").log, level)("mail.seen", tx="T1", policy="spf")
    (line,) = services.log.lines
    assert (line.level, line.event, line.keys) == (level, "mail.seen", {"tx": "T1", "policy": "sunday"})


def test_a_metric_stands_under_the_policys_name_once() -> None:
    services = FakeServices()
    metrics = under_name(services, "sunday").metrics
    metrics.counters("refused_total", "Refused").labels().inc()
    metrics.counters("mxgate_sunday_refused_total", "Refused").labels().inc()
    metrics.gauges("open", "Open", ("kind",)).labels("a").set(3)
    metrics.histograms("wait_seconds", "Wait", buckets=(1, 2)).labels().observe(0.5)
    metrics.counters("mxgate_messages_total", "Of the engine").labels().inc()
    assert services.metrics["mxgate_sunday_refused_total"] == 2
    assert services.metrics["mxgate_sunday_open", "a"] == 3
    assert services.metrics.observed["mxgate_sunday_wait_seconds",] == [0.5]
    assert services.metrics["mxgate_sunday_mxgate_messages_total"] == 1


def test_the_worker_gives_each_policy_its_own() -> None:
    class Resolvers:
        def for_policy(self, name: str, limit_s: float) -> object:
            return services.dns

    services = FakeServices()
    planned = PlannedPolicy("counts", Counts, NoSettings(), Mode.ENFORCE, 10.0, OnError.CONTINUE)
    (step,) = steps_of(
        [planned],
        services,
        Resolvers(),  # type: ignore[arg-type]  # it is a Resolver all the same
        WorkerStore(State(url="memory:"), [Counts], services),
        WorkerHttp([Counts], services),
    )
    step.policy.services.metrics.counters("mail_total", "Mail").labels().inc()
    assert services.metrics["mxgate_counts_mail_total"] == 1
