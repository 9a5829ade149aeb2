"""docs/metrics.md: every metric with its type, labels and meaning, out of the catalogue, and how to use them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gateway.adapters.metrics import Kind
from gateway.verdict import Action, Result, Stage
from grafana.catalogue import Metric
from policies.verify.dmarc.record import DmarcPolicy

# The sections, by the beginnings of names; the first that fits counts.
_SECTIONS = {
    "Connections, commands and TLS": (
        "mxgate_connections",
        "mxgate_clients",
        "mxgate_open_connections",
        "mxgate_max_connections",
        "mxgate_closed",
        "mxgate_commands",
        "mxgate_replies",
        "mxgate_tls",
        "mxgate_proxy",
        "mxgate_source",
        "mxgate_certificate",
    ),
    "Transactions": (
        "mxgate_transaction",
        "mxgate_recipients",
        "mxgate_content",
        "mxgate_message",
    ),
    "Authentication": ("mxgate_auth", "mxgate_dmarc"),
    "The downstream": ("mxgate_relay",),
    "DNS": ("mxgate_dns_",),
    "The store": ("mxgate_store",),
    "The process and its configuration": (
        "mxgate_build",
        "mxgate_config",
        "mxgate_log",
        "mxgate_loop",
        "mxgate_process",
        "mxgate_ready",
        "mxgate_start",
        "mxgate_worker",
    ),
    "Policies": ("mxgate_policy",),
    "What single policies count": ("",),
}

_LABELS = {
    "code": "the three digits of the reply",
    "hash": "as `/api/v1/status` has it",
    "host": "a downstream of your configuration",
    "policy": "a policy of the plan",
    "process": "supervisor, worker_1, worker_2, ...",
    "python": "the version of Python",
    "reason": "why",
    "stage": ", ".join(Stage),
    "route": "a route of your configuration",
    "version": "the version of mxgate",
}
_WHO = "the policy that decided it, empty where none did"
_WHY = "a word of [the log](operate.md#log) or of that policy; other: it had too many (500 in all)"
_OF_METRICS = {
    ("mxgate_transactions_total", "action"): "accepted, quarantined, deferred, rejected, aborted",
    ("mxgate_transactions_total", "policy"): _WHO,
    ("mxgate_transactions_total", "reason"): _WHY,
    ("mxgate_recipients_total", "action"): "accepted, deferred, rejected",
    ("mxgate_recipients_total", "policy"): _WHO,
    ("mxgate_recipients_total", "reason"): _WHY,
    ("mxgate_closed_sessions_total", "reason"): "see [below](#how-a-session-ends)",
    ("mxgate_store_errors_total", "reason"): "see [the log](operate.md#log)",
    ("mxgate_relay_errors_total", "error"): "see [the log](operate.md#log)",
    ("mxgate_dmarc_messages_total", "result"): ", ".join(
        map(str, (Result.NONE, Result.PASS, Result.FAIL, Result.TEMPERROR, Result.PERMERROR))
    ),
    ("mxgate_dmarc_messages_total", "policy"): ", ".join((*map(str, DmarcPolicy), "absent")),
    ("mxgate_dmarc_messages_total", "disposition"): ", ".join(each.label for each in Action),
    ("mxgate_greylist_skipped_total", "reason"): "see [Greylisting](greylisting.md)",
}

_INTRODUCTION = """\
# Metrics, dashboards and alerts

This page is made by `./dev grafana` from what the code defines; do not edit it. What to look at when an alert fires:
[runbooks.md](runbooks.md).

`/metrics` of the [admin port](operate.md#admin-port) has the numbers of all workers together. Workers push what they
counted each second; one that is killed takes its last second along. Counters and histograms survive a worker's death, its
gauges do not. Labels come from closed sets, from your configuration, or from the plan: no address of a client and no domain
of a sender is ever in one.

Who asks for OpenMetrics (Prometheus with `--enable-feature=exemplar-storage` does) gets exemplars: histograms of latency
and size name the newest transaction of each bucket in the label `tx`, which `mxgate decisions --tx` takes.

```yaml
scrape_configs:
  - job_name: mxgate
    static_configs: [{targets: ["127.0.0.1:9464"]}]
rule_files: [grafana/rules/mxgate.yaml]
```
"""

_BEHIND = """\
## How a session ends

`reason` of `mxgate_closed_sessions_total` is `quit`; `lost` (the client closed); `timeout`; `drain`; `refused`; a violation of
the protocol (`early_talker`, `pipelining`, `line_end`, `line_too_long`, `protocol`, `plaintext_behind_starttls`, `tls`,
`content`); a limit (`errors`, `commands`, `unknown_recipients`); or `failed`, which is a defect of ours.

## Dashboards

`grafana/mxgate-*.json` are seven dashboards for Grafana 10 or newer: Overview, SMTP, Authentication, Policies, DNS and store,
Downstream, Process. Import them (Dashboards, New, Import), or let the chart do it (`monitoring.dashboards.enabled`). Each has
the variables `datasource`, `job` and `instance`, and links to the others. In a data source's settings, an exemplar link with
the label `tx` leads from a dot in a latency panel to the transaction.

No Grafana was at hand to look at them in. Instead their structure is tested (ids, a grid without overlaps, variables, units),
and so is every expression, by a real Prometheus that scraped a gateway with mail; Grafana's own Python model of dashboards
(grafana-foundation-sdk 10.1.0) reads all seven and loses no field of a panel.

## Rules

`grafana/rules/mxgate.yaml` has the recording rules and alerts below, `grafana/rules/tests/` their unit tests for
`promtool test rules`. Each alert has a runbook; `python -m grafana --runbooks https://wiki.example.org/runbooks.md` writes
that address into `runbook_url`.
"""

_COST = """\
## What it costs

{cost}"""


def document(metrics: Iterable[Metric], rules: Iterable[tuple[str, str, str]], cost: str) -> str:
    """The page. `rules` are name, severity and summary of each alert; `cost` is what was measured."""
    parts = [_INTRODUCTION]
    of_section: dict[str, list[Metric]] = {section: [] for section in _SECTIONS}
    for metric in metrics:
        of_section[_section_of(metric.name)].append(metric)
    for section, found in of_section.items():
        rows = "\n".join(map(_row, found))
        parts.append(f"## {section}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n{rows}\n")
    alerts = "\n".join(
        f"| [{name}](runbooks.md#{name.lower()}) | {severity} | {_plain(summary)} |"
        for name, severity, summary in rules
    )
    parts += [f"{_BEHIND}\n| alert | severity | says |\n|---|---|---|\n{alerts}\n", _COST.format(cost=cost)]
    return "\n".join(parts)


def _plain(summary: str) -> str:
    """Without the template's braces: the label in capitals."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: found[1].upper(), summary)


def _section_of(name: str) -> str:
    return next(section for section, begins in _SECTIONS.items() if name.startswith(begins))


def _row(metric: Metric) -> str:
    labels = "; ".join(f"`{label}`: {_values(metric, label)}" for label in metric.definition.labels)
    meaning = metric.definition.documentation
    if metric.definition.kind is Kind.GAUGE and metric.definition.merge.value == "min":
        meaning += "; the smallest of all workers"
    return f"| `{metric.name}` | {metric.definition.kind} | {labels} | {meaning} |"


def _values(metric: Metric, label: str) -> str:
    told = _OF_METRICS.get((metric.name, label))
    return told or ", ".join(map(str, metric.values[label])) or _LABELS[label]
