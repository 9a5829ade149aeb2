"""metrics: what is counted is what is shown, whichever process counted it and whether it still lives."""

from __future__ import annotations

import json
import re
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.adapters.metrics import MergedMetrics, ProcessMetrics, Snapshot
from gateway.services import Merge, Metrics


def _travel(snapshot: Snapshot) -> Snapshot:
    travelled: Snapshot = json.loads(json.dumps(snapshot))
    return travelled


def _values(merged: MergedMetrics) -> dict[str, float]:
    text, _ = merged.render("")
    return {
        sample.name
        + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in parse_text(text.decode())
        for sample in family.samples
    }


def test_is_the_metrics_service() -> None:
    metrics: Metrics = ProcessMetrics()
    counter = metrics.counters("mxgate_messages_total", "Messages.", ("verdict",)).labels("reject")
    counter.inc()
    counter.inc(2)
    gauge = metrics.gauges("mxgate_connections", "Connections.").labels()
    gauge.set(5)
    gauge.inc()
    gauge.dec(3)
    histogram = metrics.histograms("mxgate_stage_seconds", "Stages.", ("stage",), (0.1, 1)).labels("rcpt")
    for amount in (0.05, 0.1, 0.5, 7):
        histogram.observe(amount)
    merged = MergedMetrics()
    assert isinstance(metrics, ProcessMetrics)
    merged.update(1, _travel(metrics.snapshot()))
    assert _values(merged) == {
        "mxgate_messages_total verdict=reject": 3,
        "mxgate_connections": 3,
        "mxgate_stage_seconds_bucket le=0.1 stage=rcpt": 2,
        "mxgate_stage_seconds_bucket le=1.0 stage=rcpt": 3,
        "mxgate_stage_seconds_bucket le=+Inf stage=rcpt": 4,
        "mxgate_stage_seconds_count stage=rcpt": 4,
        "mxgate_stage_seconds_sum stage=rcpt": pytest.approx(7.65),
    }


def test_asking_twice_gives_the_same_family() -> None:
    metrics = ProcessMetrics()
    first = metrics.counters("mxgate_messages_total", "Messages.", ("verdict",))
    assert metrics.counters("mxgate_messages_total", "Messages.", ("verdict",)) is first
    assert first.labels("reject") is first.labels("reject")
    assert first.labels("reject") is not first.labels("defer")


@pytest.mark.parametrize(
    "name", ["mxgate_messages", "mxgate-messages_total", "mxgate_messäges_total", "_total\n"]
)
def test_refuses_a_bad_name_of_a_counter(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        ProcessMetrics().counters(name, "Messages.")


def test_refuses_what_contradicts_itself() -> None:
    metrics = ProcessMetrics()
    messages = metrics.counters("mxgate_messages_total", "Messages.", ("verdict",))
    with pytest.raises(ValueError, match="already defined"):
        metrics.counters("mxgate_messages_total", "Messages.", ("stage",))
    with pytest.raises(ValueError, match="already defined"):
        metrics.gauges("mxgate_messages_total", "Messages.", ("verdict",))
    with pytest.raises(ValueError, match="has the labels"):
        messages.labels()
    with pytest.raises(ValueError, match="label"):
        metrics.gauges("mxgate_connections", "Connections.", ("bad-label",))
    with pytest.raises(ValueError, match="ascend"):
        metrics.histograms("mxgate_stage_seconds", "Stages.", (), (1, 0.1))
    with pytest.raises(ValueError, match="grows"):
        messages.labels("reject").inc(-1)


def test_only_changed_families_travel() -> None:
    metrics = ProcessMetrics()
    messages = metrics.counters("mxgate_messages_total", "Messages.").labels()
    metrics.gauges("mxgate_connections", "Connections.")
    metrics.histograms("mxgate_stage_seconds", "Stages.")
    assert len(metrics.snapshot()) == 3
    assert metrics.snapshot() == []
    messages.inc()
    assert [family[1] for family in metrics.snapshot()] == ["mxgate_messages_total"]


def test_sums_over_workers_never_fall_and_gauges_of_the_dead_vanish() -> None:
    merged = MergedMetrics()
    for pid in (11, 12):
        worker = ProcessMetrics()
        worker.counters("mxgate_messages_total", "Messages.").labels().inc(pid)
        worker.gauges("mxgate_connections", "Connections.").labels().set(pid)
        worker.histograms("mxgate_stage_seconds", "Stages.", (), (1,)).labels().observe(pid)
        merged.update(pid, _travel(worker.snapshot()))
        merged.update(pid, [])
    counted = {
        "mxgate_messages_total": 23,
        "mxgate_stage_seconds_bucket le=1.0": 0,
        "mxgate_stage_seconds_bucket le=+Inf": 2,
        "mxgate_stage_seconds_count": 2,
        "mxgate_stage_seconds_sum": 23,
    }
    assert _values(merged) == counted | {"mxgate_connections": 23}
    merged.end(11)
    assert _values(merged) == counted | {"mxgate_connections": 12}
    merged.end(12)
    merged.end(12)
    assert _values(merged) == counted
    restarted = ProcessMetrics()
    restarted.counters("mxgate_messages_total", "Messages.").labels().inc()
    merged.update(13, _travel(restarted.snapshot()))
    assert _values(merged) == counted | {"mxgate_messages_total": 24}


@pytest.mark.parametrize(("merge", "value"), [(Merge.SUM, 30), (Merge.MIN, 10), (Merge.MAX, 20)])
def test_a_family_of_gauges_says_how_it_is_merged(merge: Merge, value: float) -> None:
    merged = MergedMetrics()
    for pid in (10, 20):
        worker = ProcessMetrics()
        worker.gauges("mxgate_certificate_expiry_seconds", "Expiry.", merge=merge).labels().set(pid)
        merged.update(pid, _travel(worker.snapshot()))
    assert _values(merged) == {"mxgate_certificate_expiry_seconds": value}


def test_a_family_that_was_defined_anew_shows_the_new_numbers_only() -> None:
    merged = MergedMetrics()
    old, new = ProcessMetrics(), ProcessMetrics()
    old.counters("mxgate_messages_total", "Messages.", ("verdict",)).labels("reject").inc(5)
    new.counters("mxgate_messages_total", "Messages.", ("action",)).labels("reject").inc(1)
    merged.update(1, _travel(old.snapshot()))
    merged.update(2, _travel(new.snapshot()))
    merged.end(1)
    assert _values(merged) == {"mxgate_messages_total action=reject": 1}


def test_the_supervisor_counts_too() -> None:
    merged = MergedMetrics()
    restarts = merged.own.counters("mxgate_worker_restarts_total", "Restarts.").labels()
    assert _values(merged) == {"mxgate_worker_restarts_total": 0}
    restarts.inc()
    assert _values(merged) == {"mxgate_worker_restarts_total": 1}


def test_renders_what_was_asked_for() -> None:
    merged = MergedMetrics()
    merged.own.counters("mxgate_messages_total", 'A "help"\nin two \\ lines.', ("verdict",)).labels(
        'a"\n\\'
    ).inc()
    merged.own.histograms("mxgate_stage_seconds", "Stages.").labels().observe(1)
    merged.own.gauges("mxgate_build_info", "Build.", ("version",)).labels("0.1.0").set(1)
    text, content_type = merged.render("text/plain")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert "# TYPE mxgate_messages_total counter" in text.decode()
    assert {family.type for family in parse_text(text.decode())} == {"counter", "gauge", "histogram"}
    openmetrics, content_type = merged.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(openmetrics.decode())}  # type: ignore[no-untyped-call]  # theirs
    assert families["mxgate_messages"].samples[0].labels == {"verdict": 'a"\n\\'}


OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def _exemplars(merged: MergedMetrics) -> dict[str, tuple[str, float]]:
    text, _ = merged.render(OPENMETRICS)
    return {
        sample.labels["le"]: (sample.exemplar.labels["tx"], sample.exemplar.value)
        for family in parse_openmetrics(text.decode())  # type: ignore[no-untyped-call]  # theirs
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_the_newest_transaction_of_a_bucket_is_its_exemplar() -> None:
    merged, metrics = MergedMetrics(), ProcessMetrics()
    seconds = metrics.histograms("mxgate_stage_seconds", "Stages.", (), (0.1, 1)).labels()
    seconds.observe(0.05, "T1-1")
    seconds.observe(0.06, "T1-2")
    seconds.observe(0.5)
    seconds.observe(7, "T1-3")
    merged.update(1, _travel(metrics.snapshot()))
    assert _exemplars(merged) == {"0.1": ("T1-2", 0.06), "+Inf": ("T1-3", 7)}
    # one that is there stays until another one comes
    seconds.observe(0.07, "T1-4")
    merged.update(1, _travel(metrics.snapshot()))
    assert _exemplars(merged) == {"0.1": ("T1-4", 0.07), "+Inf": ("T1-3", 7)}
    text, _ = merged.render("text/plain")
    assert "T1-4" not in text.decode()


def test_of_several_workers_the_newest_exemplar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = MergedMetrics()
    for pid, now in ((1, 1000.0), (2, 3000.0), (3, 2000.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        metrics = ProcessMetrics()
        metrics.histograms("mxgate_stage_seconds", "Stages.", (), (1,)).labels().observe(0.5, f"T{pid}")
        merged.update(pid, _travel(metrics.snapshot()))
    assert _exemplars(merged) == {"1.0": ("T2", 0.5)}
    merged.end(2)
    assert _exemplars(merged) == {"1.0": ("T2", 0.5)}


def test_what_is_cleared_is_shown_no_more() -> None:
    merged = MergedMetrics()
    hashes = merged.own.gauges("mxgate_config_info", "Configuration.", ("hash",))
    hashes.labels("0a").set(1)
    assert _values(merged) == {"mxgate_config_info hash=0a": 1}
    hashes.clear()
    hashes.labels("0b").set(1)
    assert _values(merged) == {"mxgate_config_info hash=0b": 1}
