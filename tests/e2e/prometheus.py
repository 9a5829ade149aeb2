"""A real Prometheus on a free port in a private directory, which scrapes one gateway and judges rules each second."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, free_port, wait_until

_PROGRAM = "prometheus"
_CONFIGURATION = """\
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
scrape_configs:
  - job_name: mxgate
    static_configs: [{{targets: ["{target}"]}}]
rule_files: ["{rules}"]
"""


class Prometheus:
    """One server from construction to `close`; the test is skipped where there is none."""

    def __init__(self, target: str, rules: str, directory: Path) -> None:
        require(program=_PROGRAM)
        self._at = f"{LOOPBACK}:{free_port()}"
        rule_file, file = directory / "rules.yaml", directory / "prometheus.yaml"
        rule_file.write_text(rules, "utf-8")
        file.write_text(_CONFIGURATION.format(target=target, rules=rule_file), "utf-8")
        self._log_file = directory / "prometheus.log"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    _PROGRAM,
                    f"--config.file={file}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self._at}",
                    # asks for OpenMetrics, and keeps the exemplars in it
                    "--enable-feature=exemplar-storage",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(lambda: self.query("up == 1"), within_s=30, what="Prometheus scrapes the gateway")
        except AssertionError as exc:
            self.close()
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series now; [] also while it starts. AssertionError for what is no PromQL."""
        found = self._ask("query", query=expr)
        return [(each["metric"], float(each["value"][1])) for each in found.get("result", ())]

    def exemplars(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of a series: labels, value, timestamp."""
        found = self._ask("query_exemplars", query=expr, start=str(start), end=str(end))
        return [each for series in found for each in series["exemplars"]]

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """The alerts that fire, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self._ask("alerts").get("alerts", ()):
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def unhealthy(self) -> list[tuple[str, str]]:
        """Rules whose last evaluation failed, and why."""
        groups = self._ask("rules").get("groups", ())
        return [
            (rule["name"], rule.get("lastError", ""))
            for group in groups
            for rule in group["rules"]
            if rule["health"] == "err"
        ]

    def log(self) -> str:
        return self._log_file.read_text("utf-8", "replace")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: str, **query: str) -> Any:
        url = f"http://{self._at}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                answer: Mapping[str, Any] = json.load(response)
        except urllib.error.HTTPError as exc:
            with exc:
                if exc.code == 503:  # it starts
                    return {}
                raise AssertionError(f"{query}: {exc.read().decode()}") from exc
        except OSError:
            return {}
        return answer["data"]
