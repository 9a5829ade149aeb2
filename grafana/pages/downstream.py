"""Downstream: who takes the mail, how fast, and what goes wrong."""

from grafana.model import GREEN, RED, Dashboard, Panel, Query, Row
from grafana.promql import quantile, rate, total

_HOSTS = "route, host"
_LEGEND = "{{route}} {{host}}"


def _step(step: str, title: str, meaning: str) -> Panel:
    where = f'step="{step}"'
    return Panel(
        title,
        meaning,
        "s",
        (
            Query(quantile(0.5, "mxgate_relay_duration_seconds", _HOSTS, where), f"{_LEGEND} median"),
            Query(
                quantile(0.99, "mxgate_relay_duration_seconds", _HOSTS, where),
                f"{_LEGEND} 99 %",
                exemplar=True,
            ),
        ),
    )


_STATE = Row(
    "State",
    (
        Panel(
            "Downstreams",
            "Workers that reached the downstream last time. 0: it is down, and is probed until it answers.",
            "short",
            (Query(total("mxgate_relay_up", _HOSTS), _LEGEND),),
            kind="stat",
            width=24,
            height=4,
            thresholds=((0, RED), (1, GREEN)),
        ),
        Panel(
            "Connections",
            "In use (those that are being opened not among them) and idle, ready for the next message.",
            "short",
            (Query(total("mxgate_relay_connections", f"{_HOSTS}, state"), f"{_LEGEND} {{{{state}}}}"),),
        ),
        Panel(
            "Waiting for a connection",
            "All that relay.max_connections_per_host allows are in use. More than a few for long: the downstream is too slow.",
            "short",
            (Query(total("mxgate_relay_waiting", _HOSTS), _LEGEND),),
        ),
        Panel(
            "Trouble",
            "By kind; docs/operate.md says what each word means. A refusal by the downstream is no trouble.",
            "ops",
            (Query(rate("mxgate_relay_errors_total", f"{_HOSTS}, error"), f"{_LEGEND} {{{{error}}}}"),),
            width=24,
        ),
    ),
)

_TIMES = Row(
    "Time",
    (
        _step("connect", "Connecting", "TCP, TLS, banner and EHLO."),
        _step(
            "verify",
            "Asking about recipients",
            "MAIL, RCPTs and RSET; answers out of the cache are not in it.",
        ),
        _step("deliver", "Sending a message", "Up to the dot."),
        _step(
            "final", "Waiting for the reply to a message", "From the dot on: the downstream's own work on it."
        ),
    ),
)

DOWNSTREAM = Dashboard(
    "mxgate-downstream",
    "mxgate / Downstream",
    "Who takes the mail, how fast, and what goes wrong.",
    (_STATE, _TIMES),
)
