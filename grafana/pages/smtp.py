"""SMTP: connections, commands, replies, TLS, and who hides whom."""

from grafana.model import RED, YELLOW, Dashboard, Panel, Query, Row
from grafana.promql import quantiles, rate, share, total

_CONNECTIONS = Row(
    "Connections",
    (
        Panel(
            "Open connections",
            "Of all workers. At the limit (server.max_connections) new ones get 421.",
            "short",
            (
                Query(total("mxgate_open_connections", "instance, role"), "{{instance}} {{role}}"),
                Query("max by (role) (mxgate_max_connections{$F})", "limit {{role}}"),
            ),
        ),
        Panel(
            "New connections",
            "By how they began. limit: of all; client_limit and client_rate: of one client.",
            "ops",
            (Query(rate("mxgate_connections_total", "outcome"), "{{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "How sessions ended",
            "quit is the rule. lost: the client closed; failed: a defect of ours; the others are limits and violations of "
            "the protocol.",
            "ops",
            (Query(rate("mxgate_closed_sessions_total", "reason"), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Clients behind one private address",
            "Part of the recent clients that came from the commonest private address. Near 100 % a balancer hides the "
            "clients: SPF and limits are blind.",
            "percentunit",
            (Query("max by (instance) (mxgate_source_share{$F})", "{{instance}}"),),
            thresholds=((0.8, YELLOW), (0.9, RED)),
            max=1,
        ),
        Panel(
            "Where clients come from",
            "By what their addresses belong to; proxy: a balancer told the address. Many at private addresses, where mail of "
            "the Internet is expected, are a balancer or a NAT in front.",
            "ops",
            (Query(rate("mxgate_clients_total", "origin"), "{{origin}}"),),
            stacked=True,
        ),
        Panel(
            "Part of clients at private addresses",
            "Of the connections that were served.",
            "percentunit",
            (Query(share("mxgate_clients_total", 'origin="private"'), "private"),),
            max=1,
        ),
        Panel(
            "PROXY headers",
            "Connections of balancers by the header that they sent. Nothing where no balancer is configured.",
            "ops",
            (Query(rate("mxgate_proxy_headers_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Part of sessions under TLS",
            "TLS sessions, of all connections that were served.",
            "percentunit",
            (
                Query(
                    f"{rate('mxgate_tls_sessions_total')} / "
                    f"""{rate("mxgate_connections_total", where='outcome="served"')}""",
                    "TLS",
                ),
            ),
            max=1,
        ),
    ),
)

_DIALOGUE = Row(
    "Dialogue",
    (
        Panel(
            "Commands",
            "By their verb. invalid: no command, or none that can be obeyed.",
            "ops",
            (Query(rate("mxgate_commands_total", "verb"), "{{verb}}"),),
            stacked=True,
        ),
        Panel(
            "Replies",
            "By their code, without those that every good session gets (220, 221, 250, 354).",
            "ops",
            (Query(rate("mxgate_replies_total", "code", 'code!~"220|221|250|354"'), "{{code}}"),),
        ),
        Panel(
            "Recipients",
            "By what they were answered.",
            "ops",
            (Query(rate("mxgate_recipients_total", "action"), "{{action}}"),),
            stacked=True,
        ),
        Panel(
            "Size of messages",
            "Of messages that were delivered.",
            "bytes",
            quantiles("mxgate_message_size_bytes"),
        ),
    ),
)

_TLS = Row(
    "TLS",
    (
        Panel(
            "Sessions by version and cipher",
            "TLS 1.2 with CBC ciphers is what old machines speak.",
            "ops",
            (Query(f"{rate('mxgate_tls_sessions_total', 'version, cipher')} > 0", "{{version}} {{cipher}}"),),
            stacked=True,
        ),
        Panel(
            "Handshakes that failed",
            "Part of all handshakes. Scanners fail, and clients that do not trust the certificate.",
            "percentunit",
            (Query(share("mxgate_tls_handshakes_total", 'outcome="failed"'), "failed"),),
            max=1,
        ),
    ),
)

_SUBMISSION = Row(
    "Submission",
    (
        Panel(
            "Connections by role",
            "Those of the MX and those of submission that were served.",
            "ops",
            (Query(rate("mxgate_connections_total", "role", 'outcome="served"'), "{{role}}"),),
        ),
        Panel(
            "Attempts to authenticate",
            "Refused: a wrong password. Limited: too many of them before. Unavailable: the back-end or the store could not "
            "say. Where submission is off: nothing.",
            "ops",
            (Query(rate("mxgate_auth_attempts_total", "outcome"), "{{outcome}}"),),
        ),
    ),
)

SMTP = Dashboard(
    "mxgate-smtp",
    "mxgate / SMTP",
    "Connections, commands, replies and TLS.",
    (_CONNECTIONS, _DIALOGUE, _TLS, _SUBMISSION),
)
