"""The rules as Prometheus reads them, and their unit tests as promtool does.

https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules
https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from grafana.rules import RUNBOOKS, Alert, Example, Windows, alerts, recordings

HEADER = "# Made by ./dev grafana from grafana/rules.py; do not edit.\n"


def rule_file(windows: Windows | None = None, runbooks: str = RUNBOOKS) -> str:
    """grafana/rules/mxgate.yaml."""
    windows = windows or Windows()
    return _yaml(
        {
            "groups": [
                {
                    "name": "mxgate-recordings",
                    "rules": [{"record": each.name, "expr": each.expr} for each in recordings(windows)],
                },
                {"name": "mxgate", "rules": [_rule(each, runbooks) for each in alerts(windows)]},
            ]
        }
    )


def test_file() -> str:
    """grafana/rules/tests/mxgate.yaml: every example of every alert."""
    return _yaml(
        {
            "rule_files": ["../mxgate.yaml"],
            "evaluation_interval": "1m",
            "tests": [_test(alert, example) for alert in alerts(Windows()) for example in alert.examples],
        }
    )


def _rule(alert: Alert, runbooks: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.expr}
    if alert.lasts != "0m":
        rule["for"] = alert.lasts
    template = f"{{{{ $value | {alert.value_format} }}}}"
    return rule | {
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description.replace("$value", template),
            "runbook_url": f"{runbooks}#{alert.name.lower()}",
        },
    }


def _test(alert: Alert, example: Example) -> dict[str, Any]:
    return {
        "name": f"{alert.name} {'fires' if example.labels is not None else 'does not fire'}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in example.series.items()],
        "alert_rule_test": [
            {
                "eval_time": example.at,
                "alertname": alert.name,
                "exp_alerts": [] if example.labels is None else [_expected(alert, example, example.labels)],
            }
        ],
    }


def _expected(alert: Alert, example: Example, labels: Mapping[str, str]) -> dict[str, Any]:
    def rendered(text: str) -> str:
        for name, value in labels.items():
            text = text.replace(f"{{{{ $labels.{name} }}}}", value)
        return text.replace("$value", example.value)

    return {
        "exp_labels": {"severity": alert.severity, **labels},
        "exp_annotations": {
            "summary": rendered(alert.summary),
            "description": rendered(alert.description),
            "runbook_url": f"{RUNBOOKS}#{alert.name.lower()}",
        },
    }


class _Dumper(yaml.SafeDumper):
    """Long texts stay in one line."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(content: object) -> str:
    # through JSON, so that only plain types are left
    plain = json.loads(json.dumps(content))
    return HEADER + yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=1_000_000, allow_unicode=True)
