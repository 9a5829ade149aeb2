"""Process: workers, event loops, memory, descriptors, configuration."""

from grafana.model import GREEN, ORANGE, RED, Dashboard, Panel, Query, Row
from grafana.promql import quantiles, rate, total

_PROCESS = "instance, process"
_LEGEND = "{{instance}} {{process}}"

_USE = Row(
    "Processes",
    (
        Panel(
            "CPU",
            "Cores in use by each process. A worker has one thread and cannot use more than one.",
            "short",
            (Query(rate("mxgate_process_cpu_seconds_total", _PROCESS), _LEGEND),),
        ),
        Panel(
            "Memory",
            "In RAM, of each process; pages that workers share with the supervisor count for each.",
            "bytes",
            (Query(total("mxgate_process_resident_memory_bytes", _PROCESS), _LEGEND),),
        ),
        Panel(
            "Open file descriptors",
            "Connections, spooled messages and sockets. At the limit nothing can be accepted.",
            "short",
            (
                Query(total("mxgate_process_open_fds", _PROCESS), _LEGEND),
                Query("min (mxgate_process_max_fds{$F})", "limit"),
            ),
        ),
        Panel(
            "How late the event loops are",
            "What every session of a worker waits for its turn. Some milliseconds are usual under load; much more is a "
            "policy that computes, or a machine without a core to spare.",
            "s",
            tuple(Query(each.expr, each.legend) for each in quantiles("mxgate_loop_lag_seconds")),
        ),
        Panel(
            "Content in memory",
            "Octets of messages under way, and how many there may be before they go to files.",
            "bytes",
            (
                Query(total("mxgate_content_memory_bytes"), "in memory"),
                Query(total("mxgate_content_memory_limit_bytes"), "limit"),
            ),
        ),
        Panel(
            "Content that went to files",
            "Messages that were larger than server.spool_memory_bytes, or for which no memory was left.",
            "ops",
            (Query(rate("mxgate_content_spilled_total"), "spilled"),),
        ),
    ),
)

_LIFE = Row(
    "Life",
    (
        Panel(
            "Workers",
            "Those that run, and those that the configuration asks for.",
            "short",
            (
                Query(total("mxgate_workers", "instance"), "{{instance}}"),
                Query(total("mxgate_workers_configured", "instance"), "{{instance}} configured"),
            ),
        ),
        Panel(
            "Workers that died",
            "In the last hour; each was replaced. Their sessions were lost, and their senders come again.",
            "short",
            (Query("sum by (instance) (increase(mxgate_worker_restarts_total{$F}[1h]))", "{{instance}}"),),
            thresholds=((1, RED),),
        ),
        Panel(
            "Workers that stood still",
            "Times in the last hour that a worker's loop did not turn for seconds, by the policy that kept it busy; none: it "
            "was no policy.",
            "short",
            (
                Query(
                    "sum by (instance, policy) (increase(mxgate_worker_blocked_total{$F}[1h]))",
                    "{{instance}} {{policy}}",
                ),
            ),
            thresholds=((1, ORANGE),),
        ),
        Panel(
            "Uptime",
            "Since the supervisor started.",
            "s",
            (Query("time() - min by (instance) (mxgate_start_time_seconds{$F})", "{{instance}}"),),
            kind="stat",
            width=8,
            height=5,
        ),
        Panel(
            "Configuration loaded",
            "Since the configuration in force was loaded.",
            "s",
            (
                Query(
                    "time() - min by (instance) (mxgate_config_last_reload_success_timestamp_seconds{$F})",
                    "{{instance}}",
                ),
            ),
            kind="stat",
            width=8,
            height=5,
        ),
        Panel(
            "Different configurations",
            "How many there are among the gateways. More than one for longer than a rollout: somebody was forgotten.",
            "short",
            (Query("count (count by (hash) (mxgate_config_info{$F}))"),),
            kind="stat",
            width=8,
            height=5,
            thresholds=((0, GREEN), (2, ORANGE)),
        ),
        Panel(
            "Builds",
            "What runs where.",
            "short",
            (Query("mxgate_build_info{$F}"),),
            kind="table",
        ),
        Panel(
            "Lost log lines",
            "Lines that standard error did not take at once.",
            "ops",
            (Query(rate("mxgate_log_lines_lost_total", "instance"), "{{instance}}"),),
        ),
    ),
)

PROCESS = Dashboard(
    "mxgate-process",
    "mxgate / Process",
    "Workers, event loops, memory, descriptors and configuration.",
    (_USE, _LIFE),
)
