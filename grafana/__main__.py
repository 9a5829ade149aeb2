"""Write everything anew: `python -m grafana`.

`--runbooks URL` is what `runbook_url` of the alerts begins with: where you keep docs/runbooks.md. `--to DIRECTORY` is
where dashboards and rules go, instead of the project's own folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from grafana.catalogue import catalogue
from grafana.document import document
from grafana.model import to_json
from grafana.pages import DASHBOARDS
from grafana.promtool import rule_file, test_file
from grafana.rules import RUNBOOKS, Windows, alerts

ROOT = Path(__file__).parents[1]
DOCUMENT = "docs/metrics.md"


def files(runbooks: str = RUNBOOKS) -> Mapping[str, str]:
    """Every generated file by its path below the project's root."""
    made = {f"grafana/{each.uid}.json": f"{json.dumps(to_json(each), indent=1)}\n" for each in DASHBOARDS}
    made["grafana/rules/mxgate.yaml"] = rule_file(runbooks=runbooks)
    made["grafana/rules/tests/mxgate.yaml"] = test_file()
    told = [(each.name, each.severity, each.summary) for each in alerts(Windows())]
    cost = (ROOT / "grafana" / "cost.md").read_text("utf-8")
    made[DOCUMENT] = document(catalogue(), told, cost)
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m grafana", description=__doc__)
    parser.add_argument("--runbooks", metavar="URL", default=RUNBOOKS)
    parser.add_argument("--to", metavar="DIRECTORY", type=Path, default=ROOT)
    given = parser.parse_args()
    for name, text in files(given.runbooks).items():
        if given.to != ROOT and name == DOCUMENT:
            continue
        file = given.to / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        print(file)


if __name__ == "__main__":
    main()
