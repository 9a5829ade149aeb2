"""Recording rules and alerts, with examples of when each alert fires and when it does not.

An example is a set of series as promtool takes them (`0x10` is eleven times 0, a minute apart) and a time at which the
alert is looked at. promtool.py makes unit tests of them; docs/runbooks.md has a section for each alert.

`rules(Windows(...))` makes the same rules with other windows: the end-to-end test cannot wait for a day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

RUNBOOKS = "docs/runbooks.md"

CRITICAL, WARNING = "critical", "warning"

# A gateway's labels in the examples.
_AT = 'instance="mx1:9464",job="mxgate"'


@dataclass(frozen=True, slots=True)
class Windows:
    """Durations of PromQL. `rate` is that of most expressions, `slow` of what happens rarely, `day` of what is usual.

    `soon`, `patient` and `late` are how long a condition has to last.
    """

    rate: str = "5m"
    slow: str = "15m"
    day: str = "1d"
    soon: str = "2m"
    patient: str = "10m"
    late: str = "30m"


@dataclass(frozen=True, slots=True)
class Example:
    """Series at a time. `labels` and `value` are what the alert's texts have then; None of `labels`: it does not fire."""

    series: Mapping[str, str]
    at: str
    labels: Mapping[str, str] | None = None
    value: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. In `description` $value is a number that `value_format` (a function of Prometheus' templates) writes."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str
    description: str
    examples: tuple[Example, ...]
    value_format: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording rule, named level:metric:operation."""

    name: str
    expr: str
    description: str = field(default="", compare=False)


def _series(name: str, more: str = "") -> str:
    return f"{name}{{{_AT}{',' if more else ''}{more}}}"


def _fires(series: Mapping[str, str], at: str, value: str = "", **labels: str) -> Example:
    return Example(series, at, labels, value)


def _quiet(series: Mapping[str, str], at: str) -> Example:
    return Example(series, at)


def recordings(windows: Windows) -> tuple[Recording, ...]:
    """What alerts and people ask for again and again."""
    rate = windows.rate

    def of(metric: str, by: str, *, where: str = "") -> str:
        return f"sum by ({by}) (rate({metric}{where}[{rate}]))"

    return (
        Recording("job_action:mxgate_transactions:rate", of("mxgate_transactions_total", "job, action")),
        Recording("job:mxgate_transactions:rate", of("mxgate_transactions_total", "job")),
        Recording(
            "job:mxgate_transactions_rejected:ratio",
            f"""({of("mxgate_transactions_total", "job", where='{action="rejected"}')} """
            "or job:mxgate_transactions:rate * 0) / (job:mxgate_transactions:rate > 0)",
        ),
        Recording(
            "job:mxgate_transactions_deferred:ratio",
            f"""({of("mxgate_transactions_total", "job", where='{action="deferred",policy!="greylist"}')} """
            "or job:mxgate_transactions:rate * 0) / (job:mxgate_transactions:rate > 0)",
        ),
        Recording(
            "job_policy:mxgate_policy_failures:ratio",
            f"{of('mxgate_policy_failures_total', 'job, policy')} / "
            f"({of('mxgate_policy_decisions_total', 'job, policy')} > 0)",
        ),
        Recording(
            "job_policy:mxgate_policy_duration_seconds:p99",
            f"histogram_quantile(0.99, {of('mxgate_policy_duration_seconds_bucket', 'job, policy, le')})",
        ),
        Recording(
            "job:mxgate_dns_unanswered:ratio",
            f"""{of("mxgate_dns_questions_total", "job", where='{outcome=~"timeout|network"}')} / """
            f"({of('mxgate_dns_questions_total', 'job')} > 0)",
        ),
        Recording(
            "instance:mxgate_loop_lag_seconds:p99",
            f"histogram_quantile(0.99, {of('mxgate_loop_lag_seconds_bucket', 'job, instance, le')})",
        ),
    )


_EVERY = {"job": "mxgate"}
_BUILD = 'version="1",python="3"'
_ONE = {"job": "mxgate", "instance": "mx1:9464"}
_HOST = 'route="main",host="10.0.0.5:25"'
_OTHER_HOST = 'route="main",host="10.0.0.6:25"'


def _transactions(action: str, values: str, **labels: str) -> dict[str, str]:
    more = "".join(f',{name}="{value}"' for name, value in labels.items())
    return {_series("mxgate_transactions_total", f'action="{action}"{more}'): values}


def alerts(windows: Windows) -> tuple[Alert, ...]:
    """All alerts, those about the gateway itself first."""
    slow, day = windows.slow, windows.day
    return (
        Alert(
            "MxgateDown",
            "up == 0 and on (job, instance) last_over_time(mxgate_build_info[1d])",
            windows.soon,
            CRITICAL,
            "{{ $labels.instance }} does not answer",
            "Prometheus gets no numbers of this gateway: it is down, or its admin port cannot be reached.",
            (
                _fires(
                    {_series("up"): "1 1 0x20", _series("mxgate_build_info", _BUILD): "1 1 _x20"},
                    "10m",
                    **_ONE,
                ),
                # somebody else's target
                _quiet(
                    {_series("up"): "1x20", _series("mxgate_build_info", _BUILD): "1x20"}
                    | {'up{job="node",instance="mx1:9100"}': "0x20"},
                    "10m",
                ),
            ),
        ),
        Alert(
            "MxgateAbsent",
            "absent(mxgate_build_info)",
            windows.patient,
            CRITICAL,
            "No gateway is scraped",
            "Prometheus knows no gateway at all: none runs, or it is not told where they are.",
            (
                _fires({}, "15m"),
                _quiet({_series("mxgate_build_info", _BUILD): "1x20"}, "15m"),
            ),
        ),
        Alert(
            "MxgateNotReady",
            "max by (job, instance) (mxgate_ready) == 0",
            windows.soon,
            CRITICAL,
            "{{ $labels.instance }} should get no mail",
            "/readyz says 503: a worker is missing, its policies are not started, or it drains. Its body says why.",
            (
                _fires({_series("mxgate_ready"): "1 1 0x10"}, "6m", **_ONE),
                _quiet({_series("mxgate_ready"): "1 1 0 1x10"}, "6m"),
            ),
        ),
        Alert(
            "MxgateWorkerRestarts",
            f"sum by (job, instance) (increase(mxgate_worker_restarts_total[{slow}])) > 2",
            "0m",
            WARNING,
            "Workers of {{ $labels.instance }} die again and again",
            "Sessions of a worker that dies are lost and come again; see worker.died and worker.stuck in the log.",
            (
                _fires({_series("mxgate_worker_restarts_total"): "0 0 1 2 3 4x10"}, "10m", **_ONE),
                _quiet({_series("mxgate_worker_restarts_total"): "0 0 1x15"}, "10m"),
            ),
        ),
        Alert(
            "MxgateLoopLag",
            "instance:mxgate_loop_lag_seconds:p99 > 0.5",
            windows.patient,
            WARNING,
            "Sessions on {{ $labels.instance }} wait for their turn",
            "One in a hundred waits $value and more: a policy computes for too long, or the machine has no core to spare.",
            (
                _fires(_lag("0+60x30"), "20m", "995ms", **_ONE),
                _quiet(_lag("0+60x30", fast="0+60x30"), "20m"),
            ),
            "humanizeDuration",
        ),
        Alert(
            "MxgateFilesNearLimit",
            "max by (job, instance) (mxgate_process_open_fds) / "
            "min by (job, instance) (mxgate_process_max_fds) > 0.8",
            windows.soon,
            WARNING,
            "{{ $labels.instance }} runs out of file descriptors",
            "A process has $value of those it may have. At the limit it accepts nothing more.",
            (
                _fires(_files("900x10"), "5m", "87.89%", **_ONE),
                _quiet(_files("100x10"), "5m"),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgateConnectionsNearLimit",
            "sum by (job, instance, role) (mxgate_open_connections) / "
            "max by (job, instance, role) (mxgate_max_connections) > 0.9",
            windows.soon,
            WARNING,
            "{{ $labels.instance }} has nearly as many connections ({{ $labels.role }}) as it may",
            "$value of max_connections of [server], or of [submission], are open; beyond it clients get 421 and come again.",
            (
                _fires(_connections("1900x10"), "5m", "95%", **_ONE, role="mx"),
                _quiet(_connections("1700x10"), "5m"),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgateSpoolFailing",
            f'sum by (job, instance) (increase(mxgate_transactions_total{{reason="spool"}}[{windows.rate}])) > 0',
            "0m",
            CRITICAL,
            "{{ $labels.instance }} cannot keep messages",
            "The disk of server.spool_dir is full or broken: larger messages get 452 4.3.1.",
            (
                _fires(_transactions("deferred", "0 0 1 2 3 4x5", reason="spool"), "6m", **_ONE),
                _quiet(_transactions("deferred", "0 1 2 3 4x9", reason="policy_failed"), "6m"),
            ),
        ),
        Alert(
            "MxgateSessionsFailed",
            f'sum by (job, instance) (increase(mxgate_closed_sessions_total{{reason="failed"}}[{slow}])) > 0',
            "0m",
            WARNING,
            "Sessions on {{ $labels.instance }} end by a defect of the gateway",
            "Clients got 421 4.3.0 and come again. session.failed in the log has the traceback: please report it.",
            (
                _fires(
                    {_series("mxgate_closed_sessions_total", 'reason="failed"'): "0 0 1x10"}, "6m", **_ONE
                ),
                _quiet({_series("mxgate_closed_sessions_total", 'reason="lost"'): "0 0 1x10"}, "6m"),
            ),
        ),
        Alert(
            "MxgateRejectSpike",
            "job:mxgate_transactions_rejected:ratio > 0.3 and job:mxgate_transactions_rejected:ratio > "
            f"2 * avg_over_time(job:mxgate_transactions_rejected:ratio[{day}]) and job:mxgate_transactions:rate > 0.1",
            windows.soon,
            WARNING,
            "Much more mail is rejected than usual",
            "$value of the transactions are rejected, over twice the part of the last day: an attack, a rule that is wrong, or "
            "a downstream that refuses.",
            (
                _fires(
                    _transactions("accepted", "0+60x600 36000+6x20")
                    | _transactions("rejected", "0+6x600 3600+60x20"),
                    "612m",
                    "90.91%",
                    **_EVERY,
                ),
                # much is rejected all the time: that is how the day is
                _quiet(_transactions("accepted", "0+30x620") | _transactions("rejected", "0+60x620"), "612m"),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgateDeferSpike",
            "job:mxgate_transactions_deferred:ratio > 0.2 and job:mxgate_transactions:rate > 0.01",
            windows.patient,
            WARNING,
            "Much mail is deferred",
            "$value of the transactions are deferred for other reasons than greylisting; senders come again for some days.",
            (
                _fires(
                    _transactions("accepted", "0+60x60")
                    | _transactions("deferred", "0+60x60", reason="connect"),
                    "20m",
                    "50%",
                    **_EVERY,
                ),
                _quiet(
                    _transactions("accepted", "0+60x60")
                    | _transactions("deferred", "0+60x60", policy="greylist", reason="greylisted"),
                    "20m",
                ),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgatePolicyFailures",
            "job_policy:mxgate_policy_failures:ratio > 0.01",
            windows.soon,
            WARNING,
            "Policy {{ $labels.policy }} fails",
            "$value of its calls failed. Mail goes on without its verdict, or is deferred, as its on_error says.",
            (
                _fires(_policy("0+6x20", "0+60x20"), "8m", "10%", **_EVERY, policy="spf"),
                _quiet(_policy("0x20", "0+60x20"), "8m"),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgatePolicySlow",
            "job_policy:mxgate_policy_duration_seconds:p99 > 5",
            windows.patient,
            WARNING,
            "Policy {{ $labels.policy }} is slow",
            "One call in a hundred takes $value and more: what it asks (DNS, the store, a scanner) is slow.",
            (
                _fires(_durations("0+60x30"), "20m", "9.95s", **_EVERY, policy="spf"),
                _quiet(_durations("0+60x30", fast="0+60x30"), "20m"),
            ),
            "humanizeDuration",
        ),
        Alert(
            "MxgateDnsDown",
            "job:mxgate_dns_unanswered:ratio > 0.5",
            windows.soon,
            CRITICAL,
            "The name servers do not answer",
            "$value of the questions had no answer: SPF, DKIM and DMARC are temperror, and mail may be deferred.",
            (
                _fires(_dns("0+60x20", "0+6x20"), "8m", "90.91%", **_EVERY),
                # strangers' broken domains are no outage of ours
                _quiet(_dns("0+1x20", "0+60x20") | _dns_of("servfail", "0+600x20"), "8m"),
            ),
            "humanizePercentage",
        ),
        Alert(
            "MxgateStoreDown",
            "max by (job, instance) (mxgate_store_outage) > 0",
            windows.soon,
            CRITICAL,
            "The store is out of reach of {{ $labels.instance }}",
            "Policies that remember work without it, as state.on_outage says; see store.down in the log.",
            (
                _fires({_series("mxgate_store_outage"): "0 0 4x10"}, "6m", **_ONE),
                _quiet({_series("mxgate_store_outage"): "0 4 0x10"}, "6m"),
            ),
        ),
        Alert(
            "MxgateDownstreamDown",
            "max by (job, instance, route) (mxgate_relay_up) == 0",
            windows.soon,
            CRITICAL,
            "No downstream of route {{ $labels.route }} takes mail",
            "Senders get 451 and keep their mail; see /readyz and relay.host_down in the log.",
            (
                _fires(_up("2 2 0x10", "2 2 0x10"), "6m", **_ONE, route="main"),
                _quiet(_up("2 2 0x10", "2x12"), "6m"),
            ),
        ),
        Alert(
            "MxgateDownstreamHostDown",
            "mxgate_relay_up == 0",
            windows.patient,
            WARNING,
            "Downstream {{ $labels.host }} of route {{ $labels.route }} is down",
            "The others of its route get its mail; when the last of them goes, senders get 451.",
            (
                _fires(_up("2 2 0x20", "2x22"), "14m", **_ONE, route="main", host="10.0.0.5:25"),
                _quiet(_up("1x20", "2x20"), "14m"),
            ),
        ),
        Alert(
            "MxgateDownstreamBusy",
            "sum by (job, instance, route) (mxgate_relay_waiting) > 0",
            windows.patient,
            WARNING,
            "Mail waits for connections to route {{ $labels.route }}",
            "All that relay.max_connections_per_host allows are in use: the downstream is slow, or the limit too low.",
            (
                _fires({_series("mxgate_relay_waiting", _HOST): "0 3x20"}, "14m", **_ONE, route="main"),
                _quiet({_series("mxgate_relay_waiting", _HOST): "0 3 3 0x20"}, "14m"),
            ),
        ),
        Alert(
            "MxgateCertificateEndsSoon",
            "min by (job, instance) (mxgate_certificate_expiry_timestamp_seconds) - time() < 7 * 86400",
            "0m",
            WARNING,
            "The certificate of {{ $labels.instance }} ends soon",
            "It ends in $value. New files are taken as soon as they are there, without a reload.",
            (
                _fires(_certificate("518400x10"), "5m", "5d 23h 55m 0s", **_ONE),
                _quiet(_certificate("864000x10"), "5m"),
            ),
            "humanizeDuration",
        ),
        Alert(
            "MxgateCertificateEnds",
            "min by (job, instance) (mxgate_certificate_expiry_timestamp_seconds) - time() < 86400",
            "0m",
            CRITICAL,
            "The certificate of {{ $labels.instance }} ends within a day, or has ended",
            "It ends in $value. Senders that check it (MTA-STS, DANE) will not deliver.",
            (
                _fires(_certificate("43200x10"), "5m", "11h 55m 0s", **_ONE),
                _quiet(_certificate("518400x10"), "5m"),
            ),
            "humanizeDuration",
        ),
        Alert(
            "MxgateReloadFailed",
            "min by (job, instance) (mxgate_config_last_reload_success) == 0",
            windows.soon,
            WARNING,
            "The last reload of {{ $labels.instance }} failed",
            "The configuration before it is in force; reload.failed in the log and /api/v1/status say what is wrong.",
            (
                _fires({_series("mxgate_config_last_reload_success"): "1 1 0x10"}, "6m", **_ONE),
                _quiet({_series("mxgate_config_last_reload_success"): "1 0 1x10"}, "6m"),
            ),
        ),
        Alert(
            "MxgateConfigurationsDiffer",
            "count by (job) (count by (job, hash) (mxgate_config_info)) > 1",
            windows.late,
            WARNING,
            "Gateways run with different configurations",
            "For longer than a rollout takes: one of them was forgotten, or its reload failed.",
            (
                _fires(_hashes("0a", "0b"), "40m", **_EVERY),
                _quiet(_hashes("0a", "0a"), "40m"),
            ),
        ),
        Alert(
            "MxgateClientsHidden",
            "max by (job, instance) (mxgate_source_hidden) > 0",
            windows.patient,
            WARNING,
            "A balancer hides the clients' addresses from {{ $labels.instance }}",
            "SPF and the limits of a client are blind; use externalTrafficPolicy Local or the PROXY protocol.",
            (
                _fires({_series("mxgate_source_hidden"): "0 2x20"}, "14m", **_ONE),
                _quiet({_series("mxgate_source_hidden"): "0 2 2 0x20"}, "14m"),
            ),
        ),
    )


# --- series of the examples --------------------------------------------------------------------------------


def _lag(slow: str, fast: str = "0x30") -> dict[str, str]:
    """Ticks between half a second and one; with `fast` all are fast."""
    name = "mxgate_loop_lag_seconds_bucket"
    return {
        _series(name, 'le="0.5"'): fast,
        _series(name, 'le="1"'): slow,
        _series(name, 'le="+Inf"'): slow,
    } | ({_series(name, 'le="0.01"'): fast} if fast != "0x30" else {})


def _durations(slow: str, fast: str = "0x30") -> dict[str, str]:
    name, of = "mxgate_policy_duration_seconds_bucket", 'policy="spf",stage="mail"'
    return {
        _series(name, f'{of},le="5"'): fast,
        _series(name, f'{of},le="10"'): slow,
        _series(name, f'{of},le="+Inf"'): slow,
    } | ({_series(name, f'{of},le="0.1"'): fast} if fast != "0x30" else {})


def _files(of_worker: str) -> dict[str, str]:
    return {
        _series("mxgate_process_open_fds", 'process="supervisor"'): "40x10",
        _series("mxgate_process_open_fds", 'process="worker_1"'): of_worker,
        _series("mxgate_process_max_fds"): "1024x10",
    }


def _connections(open_: str) -> dict[str, str]:
    return {
        _series("mxgate_open_connections", 'role="mx"'): open_,
        _series("mxgate_max_connections", 'role="mx"'): "2000x10",
    }


def _policy(failures: str, decisions: str) -> dict[str, str]:
    of = 'policy="spf",stage="mail"'
    return {
        _series("mxgate_policy_failures_total", f'{of},failure="exception"'): failures,
        _series("mxgate_policy_decisions_total", f'{of},action="continue"'): decisions,
    }


def _dns(timeouts: str, answers: str) -> dict[str, str]:
    return _dns_of("timeout", timeouts) | _dns_of("records", answers)


def _dns_of(outcome: str, values: str) -> dict[str, str]:
    return {_series("mxgate_dns_questions_total", f'rrtype="TXT",outcome="{outcome}"'): values}


def _up(one: str, other: str) -> dict[str, str]:
    return {_series("mxgate_relay_up", _HOST): one, _series("mxgate_relay_up", _OTHER_HOST): other}


def _certificate(ends_at: str) -> dict[str, str]:
    # promtool's clock begins at 0
    return {_series("mxgate_certificate_expiry_timestamp_seconds"): ends_at}


def _hashes(one: str, other: str) -> dict[str, str]:
    return {
        f'mxgate_config_info{{job="mxgate",instance="mx{number}:9464",hash="{each}"}}': "1x60"
        for number, each in enumerate((one, other), 1)
    }
