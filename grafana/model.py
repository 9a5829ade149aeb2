"""Panels and dashboards, and how they become the JSON that Grafana reads (schema version 39, Grafana 10 and newer).

Sizes are in Grafana's grid of 24 columns. Every panel has a unit and a description. Expressions are PromQL in which `$F`
stands for the dashboard's selection of jobs and instances.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Any

WIDTH = 24
FILTER = 'job=~"$job",instance=~"$instance"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "mxgate"

# One word has one colour on all dashboards.
GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = (
    "green",
    "yellow",
    "orange",
    "red",
    "blue",
    "purple",
    "#8e8e8e",
)
COLOURS = {
    "accepted": GREEN,
    "pass": GREEN,
    "continue": GREEN,
    "served": GREEN,
    "done": GREEN,
    "hit": GREEN,
    "store": GREEN,
    "records": GREEN,
    "quarantined": ORANGE,
    "quarantine": ORANGE,
    "softfail": ORANGE,
    "local": ORANGE,
    "deferred": YELLOW,
    "defer": YELLOW,
    "timeout": YELLOW,
    "rejected": RED,
    "reject": RED,
    "fail": RED,
    "failed": RED,
    "servfail": RED,
    "nobody": RED,
    "temperror": PURPLE,
    "permerror": "dark-purple",
    "aborted": GREY,
    "none": GREY,
    "neutral": "#b7b7b7",
    "miss": BLUE,
}
"""Names of series (whole legends) and their colours."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and what its series are called."""

    expr: str
    legend: str = ""
    exemplar: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """What all panels have. `thresholds` are values and the colours that begin with them."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    stacked: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    mappings: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # value -> text and colour
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A heading with the panels below it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def expression(query: Query, chosen: str = FILTER) -> str:
    """The PromQL of a query with its selection."""
    return query.expr.replace("$F", chosen)


def to_json(dashboard: Dashboard) -> Json:
    """As Grafana imports it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "timepicker": {},
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "weekStart": "",
        "annotations": {"list": [_reloads()]},
        "links": [
            {
                "type": "dashboards",
                "title": "mxgate",
                "tags": [TAG],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {"list": _variables()},
        "panels": _laid_out(dashboard.rows),
    }


RELOADS = "changes(mxgate_config_last_reload_success_timestamp_seconds{$F}[$__interval]) > 0"


def _reloads() -> Json:
    return {
        "name": "Reloads",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": BLUE,
        "expr": RELOADS.replace("$F", FILTER),
        "step": "60s",
        "titleFormat": "configuration loaded",
        "textFormat": "{{instance}}",
    }


def _variables() -> list[Json]:
    def of_label(name: str, label: str, query: str) -> Json:
        asked = f"label_values({query}, {label})"
        return {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": DATASOURCE,
            "definition": asked,
            "query": {"query": asked, "refId": f"variable-{name}"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "hide": 0,
            "options": [],
            "regex": "",
            "skipUrlSync": False,
        }

    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "options": [],
            "refresh": 1,
            "regex": "",
            "skipUrlSync": False,
        },
        of_label("job", "job", "mxgate_build_info"),
        of_label("instance", "instance", 'mxgate_build_info{job=~"$job"}'),
    ]


def _laid_out(rows: Sequence[Row]) -> list[Json]:
    """Panels from left to right; a row begins below all that stands above it."""
    laid: list[Json] = []
    top = 0
    for row in rows:
        laid.append(
            {
                "id": len(laid) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            laid.append(_panel(panel, len(laid) + 1, left, top))
            left, height = left + panel.width, max(height, panel.height)
        top += height
    return laid


def _panel(panel: Panel, number: int, left: int, top: int) -> Json:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
        "targets": [
            _target(panel, query, chr(ord("A") + place)) for place, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _OPTIONS[panel.kind],
    }


def _target(panel: Panel, query: Query, ref: str) -> Json:
    is_instant = panel.kind in {"stat", "table", "bargauge"}
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression(query),
        "legendFormat": query.legend or "__auto",
        "range": not is_instant,
        "instant": is_instant,
        "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        "exemplar": query.exemplar,
    }


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": GREEN if panel.thresholds else "text", "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in panel.thresholds]
    defaults: dict[str, Json] = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "thresholds" if panel.kind in {"stat", "bargauge"} else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [
            {"type": "value", "options": {value: {"text": text, "color": colour, "index": place}}}
            for place, (value, (text, colour)) in enumerate(panel.mappings.items())
        ],
        "noValue": "no data",
    }
    if panel.max is not None:
        defaults["max"] = panel.max
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
        }
    return defaults


def _overrides(panel: Panel) -> list[Json]:
    """The colours of words: all where a label is a series' whole name, else those of the names that there are."""
    legends = {query.legend for query in panel.queries}
    has_words = any(re.fullmatch(r"\{\{\w+\}\}", legend) for legend in legends)
    return [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for name, colour in COLOURS.items()
        if has_words or name in legends
    ]


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Mapping[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": _REDUCE,
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    },
    "bargauge": {
        "reduceOptions": _REDUCE,
        "displayMode": "basic",
        "orientation": "horizontal",
        "showUnfilled": True,
    },
    "table": {"showHeader": True, "cellHeight": "sm", "footer": {"show": False}},
}
