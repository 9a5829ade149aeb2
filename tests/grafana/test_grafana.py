"""Dashboards and rules: made by the code, with metrics and labels that exist, as Grafana and Prometheus read them."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from importlib.metadata import distribution
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.adapters.metrics import Kind
from grafana.__main__ import ROOT, files
from grafana.catalogue import Metric, catalogue
from grafana.model import COLOURS, WIDTH
from grafana.pages import DASHBOARDS
from grafana.promtool import rule_file
from grafana.rules import CRITICAL, RUNBOOKS, WARNING, Windows, alerts, recordings
from tests.e2e.machine import require
from tests.test_docs import anchors

BOARDS = sorted((ROOT / "grafana").glob("*.json"))
RULES = ROOT / "grafana" / "rules" / "mxgate.yaml"
TESTS = ROOT / "grafana" / "rules" / "tests" / "mxgate.yaml"
ALERTS = alerts(Windows())
# Units of Grafana (packages/grafana-data/src/valueFormats/categories.ts) that mean what our metrics measure.
UNITS = {"short", "percentunit", "s", "ops", "bytes", "Bps"}
# Labels that Prometheus adds.
TARGET_LABELS = {"job", "instance", "le"}
# PromQL: https://prometheus.io/docs/prometheus/latest/querying/functions
WORDS = {
    *(
        "absent",
        "and",
        "avg",
        "avg_over_time",
        "bool",
        "by",
        "changes",
        "count",
        "histogram_quantile",
        "increase",
    ),
    *("last_over_time", "max", "min", "on", "or", "up", "rate", "sum", "time", "topk", "vector"),
}

each_board = pytest.mark.parametrize("file", BOARDS, ids=lambda file: file.stem)


@cache
def metrics() -> dict[str, Metric]:
    return {each.name: each for each in catalogue()}


def board(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def panels(file: Path) -> list[Any]:
    return [panel for panel in board(file)["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    found = [target["expr"] for file in BOARDS for panel in panels(file) for target in panel["targets"]]
    found += [each["expr"] for file in BOARDS for each in board(file)["annotations"]["list"]]
    found += [each.expr for each in ALERTS]
    return found + [each.expr for each in recordings(Windows())]


def test_the_files_are_what_the_code_makes() -> None:
    """Otherwise: ./dev grafana."""
    stale = [name for name, text in files().items() if (ROOT / name).read_text("utf-8") != text]
    assert stale == []
    generated = {*BOARDS, *(ROOT / "grafana").glob("rules/**/*.yaml")}
    assert {str(path.relative_to(ROOT)) for path in generated} < files().keys()


def test_the_catalogue_knows_the_worker_the_supervisor_and_the_policies() -> None:
    assert {"mxgate_build_info", "mxgate_loop_lag_seconds", "mxgate_greylist_deferred_total"} <= {*metrics()}
    assert metrics()["mxgate_certificate_expiry_timestamp_seconds"].definition.kind is Kind.GAUGE
    assert metrics()["mxgate_replies_total"].values == {"code": ()}
    assert "served" in metrics()["mxgate_connections_total"].values["outcome"]
    for each in metrics().values():
        assert each.name.startswith("mxgate_")
        # STYLE: a claim that ends with no full stop; of what nobody wrote something down, nothing is explained
        assert re.fullmatch(r"[A-Z0-9].*[^.]", each.definition.documentation), each.name


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expr", sorted(set(expressions())))
def test_expressions_name_metrics_labels_and_values_that_exist(expr: str) -> None:
    recorded = {each.name for each in recordings(Windows())}
    plain = re.sub(r'"[^"]*"', '""', expr)
    for name in re.findall(
        r"[a-zA-Z_:][\w:]*(?=[{\[) ]|$)", re.sub(r"\{[^}]*\}|(?:by|on) \([^)]*\)|\[[^]]*\]", " ", plain)
    ):
        if name not in WORDS:
            assert name in recorded or _family(name) is not None, name
    for name, selector in re.findall(r"(mxgate_\w+)\{([^}]*)\}", expr):
        family = _family(name)
        assert family is not None
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            known = TARGET_LABELS | {*family.definition.labels}
            assert label in known, f"{name} has no {label}"
            words = family.values.get(label, ())
            if (
                not words
                or "$" in value
                or family.name in {"mxgate_transactions_total", "mxgate_recipients_total"}
            ):
                continue
            for word in value.split("|") if "~" in operator else [value]:
                assert word in words, f"{name}: {label} is never {word}"
    for grouping in re.findall(r"by \(([^)]*)\)", expr):
        of_all = TARGET_LABELS | {label for each in metrics().values() for label in each.definition.labels}
        assert {label.strip() for label in grouping.split(",")} <= of_all


def _family(name: str) -> Metric | None:
    family = metrics().get(name)
    if family is not None:
        return None if family.definition.kind is Kind.HISTOGRAM else family
    base, _, suffix = name.rpartition("_")
    family = metrics().get(base)
    is_part = suffix in {"bucket", "sum", "count"} and family and family.definition.kind is Kind.HISTOGRAM
    return family if is_part else None


def test_every_metric_is_looked_at_somewhere() -> None:
    """What nobody looks at need not be counted; what single policies count is theirs."""
    text = " ".join(expressions())
    unseen = {name for name in metrics() if not re.search(rf"\b{name}(?:_bucket|_sum|_count)?\b", text)}
    single = tuple(f"mxgate_{each.name}_" for each in distribution("mxgate").entry_points)
    assert {name for name in unseen if not name.startswith(single)} == set()


# --- dashboards --------------------------------------------------------------------------------------


@each_board
def test_panels_have_what_a_reader_needs(file: Path) -> None:
    for panel in panels(file):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == [*"ABCDEF"][: len(panel["targets"])]
        for target in panel["targets"]:
            # where one name would stand for several series nobody could tell them apart
            assert target["legendFormat"] != "__auto" or panel["type"] in {"stat", "table"}
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert labels <= grouped, target["legendFormat"]
    titles = [panel["title"] for panel in panels(file)]
    assert len(titles) == len(set(titles))


@each_board
def test_the_grid_has_no_overlaps_and_ids_are_unique(file: Path) -> None:
    found = board(file)["panels"]
    ids = [panel["id"] for panel in found]
    assert len(ids) == len(set(ids))
    assert all(number > 0 for number in ids)

    def cells(panel: Any) -> tuple[range, range]:
        at = panel["gridPos"]
        return range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])

    for panel in found:
        across, down = cells(panel)
        assert across.start >= 0
        assert across.stop <= WIDTH
        assert down.start >= 0
        assert across
        assert down
    for one, other in combinations(found, 2):
        (x, y), (u, v) = cells(one), cells(other)
        overlap = x.start < u.stop and u.start < x.stop and y.start < v.stop and v.start < y.stop
        assert not overlap, (one["title"], other["title"])


@each_board
def test_every_variable_that_is_used_exists_and_each_is_used(file: Path) -> None:
    content = board(file)
    variables = [each["name"] for each in content["templating"]["list"]]
    assert variables == ["datasource", "job", "instance"]
    builtin = {"__rate_interval", "__interval", "__all"}
    used = set(re.findall(r"\$\{?(\w+)\}?", file.read_text("utf-8"))) - builtin
    assert used == {*variables}
    for panel in panels(file):
        for target in panel["targets"]:
            # each selector obeys the chosen jobs and instances
            selectors = re.findall(r"mxgate_\w+(\{[^}]*\})?", target["expr"])
            assert selectors
            assert all('job=~"$job",instance=~"$instance"' in each for each in selectors), target["expr"]


def test_dashboards_have_addresses_of_their_own_and_lead_to_each_other() -> None:
    contents = [board(file) for file in BOARDS]
    assert len({each["uid"] for each in contents}) == len(contents) == len(DASHBOARDS) == 7
    assert len({each["title"] for each in contents}) == 7
    for content in contents:
        # Grafana takes at most 40 characters
        assert re.fullmatch(r"[a-z0-9-]{1,40}", content["uid"])
        (link,) = content["links"]
        assert {*link["tags"]} <= {*content["tags"]}
        assert link["includeVars"]
        # what an export for sharing has, and provisioning does not take
        assert "__inputs" not in content
        assert "id" not in content


def test_a_word_has_one_colour() -> None:
    for file in BOARDS:
        for panel in panels(file):
            colours = {
                each["matcher"]["options"]: each["properties"][0]["value"]["fixedColor"]
                for each in panel["fieldConfig"]["overrides"]
            }
            assert colours.items() <= COLOURS.items()
    (transactions,) = (
        panel
        for panel in panels(ROOT / "grafana" / "mxgate-overview.json")
        if panel["title"] == "Transactions"
    )
    shown = {each["matcher"]["options"] for each in transactions["fieldConfig"]["overrides"]}
    assert {"accepted", "quarantined", "deferred", "rejected", "aborted"} <= shown
    assert COLOURS["accepted"] == COLOURS["pass"] != COLOURS["rejected"] == COLOURS["reject"]


# --- rules -------------------------------------------------------------------------------------------


def test_alerts_tell_what_is_wrong_and_what_to_do() -> None:
    runbooks = (ROOT / RUNBOOKS).read_text("utf-8")
    rules = yaml.safe_load(RULES.read_text("utf-8"))["groups"][1]["rules"]
    assert [rule["alert"] for rule in rules] == [alert.name for alert in ALERTS]
    assert 15 <= len(rules) <= 25
    for rule in rules:
        texts = rule["annotations"]
        assert rule["labels"] == {"severity": rule["labels"]["severity"]}
        assert rule["labels"]["severity"] in {CRITICAL, WARNING}
        assert texts["summary"]
        assert texts["description"].endswith(".")
        file, _, anchor = texts["runbook_url"].partition("#")
        assert file == RUNBOOKS
        assert anchor in anchors(runbooks)
    sections = re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", runbooks, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == [alert.name for alert in ALERTS]
    for _, text in sections:
        assert re.findall(r"\*\*(\w+)\*\*", text)[:3] in (["Means", "Look", "Do"], ["Means", "Look", "do"])


def test_every_alert_has_an_example_of_firing_and_one_of_silence() -> None:
    for alert in ALERTS:
        assert {example.labels is None for example in alert.examples} == {True, False}, alert.name


def test_labels_in_texts_are_labels_of_the_alert() -> None:
    for alert in ALERTS:
        (fires,) = (example.labels for example in alert.examples if example.labels is not None)
        used = set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description))
        assert used <= fires.keys(), alert.name


def test_the_runbooks_may_live_elsewhere() -> None:
    text = rule_file(runbooks="https://wiki.example.org/mail")
    assert "runbook_url: https://wiki.example.org/mail#mxgatedown\n" in text


def promtool(*arguments: str) -> None:
    require(program="promtool")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", str(RULES))


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    promtool("test", "rules", str(TESTS))


def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    plain = [
        re.sub(r"\$__(?:rate_)?interval", "5m", expr.replace("$job", ".*").replace("$instance", ".*"))
        for expr in expressions()
    ]
    rules = [{"record": f"mxgate:expression{number}:of", "expr": expr} for number, expr in enumerate(plain)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}), "utf-8")
    promtool("check", "rules", str(file))
