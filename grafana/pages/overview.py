"""Overview: is it well, what becomes of mail, and why."""

from grafana.model import GREEN, ORANGE, RED, YELLOW, Dashboard, Panel, Query, Row
from grafana.promql import or_zero, quantiles, rate, share, top10, total

_WHY = "action, policy, reason"
_WHY_LEGEND = "{{action}} {{policy}} {{reason}}"
_YES_NO = {"0": ("no", RED), "1": ("yes", GREEN)}

_STATE = Row(
    "State",
    (
        Panel(
            "Ready",
            "Gateways whose /readyz says that they should get mail, of all that are scraped.",
            "percentunit",
            (Query("avg (mxgate_ready{$F})"),),
            kind="stat",
            width=3,
            height=4,
            thresholds=((0, RED), (0.5, ORANGE), (1, GREEN)),
        ),
        Panel(
            "Workers",
            "Worker processes that run. During a reload there are those of two generations.",
            "short",
            (Query(total("mxgate_workers")),),
            kind="stat",
            width=3,
            height=4,
        ),
        Panel(
            "Downstreams up",
            "Routes of which at least one downstream takes mail, of all routes. Below 100 % senders get 451.",
            "percentunit",
            (Query("avg (max by (instance, route) (mxgate_relay_up{$F}) > bool 0)"),),
            kind="stat",
            width=3,
            height=4,
            thresholds=((0, RED), (1, GREEN)),
        ),
        Panel(
            "Store out of reach",
            "Workers whose breaker is open: policies that remember do without the store.",
            "short",
            (Query(total("mxgate_store_outage")),),
            kind="stat",
            width=3,
            height=4,
            thresholds=((1, RED),),
        ),
        Panel(
            "DNS failures",
            "Part of the questions to name servers that nobody answered in the last minutes.",
            "percentunit",
            (Query(share("mxgate_dns_questions_total", 'outcome=~"timeout|network"')),),
            kind="stat",
            width=3,
            height=4,
            thresholds=((0.05, YELLOW), (0.5, RED)),
        ),
        Panel(
            "Last reload took effect",
            "No: the last reload failed, and the configuration before it is still in force. The log says why.",
            "short",
            (Query("min (mxgate_config_last_reload_success{$F})"),),
            kind="stat",
            width=3,
            height=4,
            mappings=_YES_NO,
        ),
        Panel(
            "Certificate ends in",
            "Until the first certificate of the chain that clients are shown ends.",
            "s",
            (Query("min (mxgate_certificate_expiry_timestamp_seconds{$F}) - time()"),),
            kind="stat",
            width=3,
            height=4,
            thresholds=((0, RED), (7 * 86_400, YELLOW), (14 * 86_400, GREEN)),
        ),
        Panel(
            "Versions",
            "What runs, and on how many gateways. Two versions are a rolling update, or a forgotten machine.",
            "short",
            (Query("count by (version) (mxgate_build_info{$F})", "{{version}}"),),
            kind="stat",
            width=3,
            height=4,
        ),
    ),
)

_MAIL = Row(
    "Mail",
    (
        Panel(
            "Transactions",
            "What became of mail. Aborted: the client gave it up. An accepted message is in the downstream's hands.",
            "ops",
            (Query(rate("mxgate_transactions_total", "action"), "{{action}}"),),
            stacked=True,
        ),
        Panel(
            "Parts rejected and deferred",
            "Of all transactions. A sudden rise of the rejected ones is an attack, a wrong rule, or broken DNS.",
            "percentunit",
            (
                Query(share("mxgate_transactions_total", 'action="rejected"'), "rejected"),
                Query(share("mxgate_transactions_total", 'action="deferred"'), "deferred"),
            ),
        ),
        Panel(
            "Why mail was refused",
            "The commonest reasons of refused recipients. The policy is empty where the engine or the downstream said it.",
            "ops",
            (Query(top10("mxgate_recipients_total", _WHY, 'action!="accepted"'), _WHY_LEGEND),),
        ),
        Panel(
            "Why messages were refused",
            "The commonest reasons of refused transactions: those whose content was judged, or all of whose recipients "
            "were refused.",
            "ops",
            (Query(top10("mxgate_transactions_total", _WHY, 'action=~"deferred|rejected"'), _WHY_LEGEND),),
        ),
        Panel(
            "Time of a transaction",
            "From MAIL to the final reply of accepted mail, the client's own pauses and the downstream's time included.",
            "s",
            quantiles("mxgate_transaction_duration_seconds", 'action="accepted"'),
        ),
        Panel(
            "Content",
            "Octets of content that was delivered.",
            "Bps",
            (Query(rate("mxgate_content_bytes_total"), "delivered"),),
        ),
    ),
)

_TROUBLE = Row(
    "Is it us?",
    (
        Panel(
            "Failures of ours",
            "Policies that failed, sessions that ended by a defect, workers that died, log lines that were lost. All of it "
            "should be 0.",
            "ops",
            (
                Query(rate("mxgate_policy_failures_total"), "policy failures"),
                Query(
                    or_zero(rate("mxgate_closed_sessions_total", where='reason="failed"')), "failed sessions"
                ),
                Query(rate("mxgate_worker_restarts_total"), "worker restarts"),
                Query(rate("mxgate_log_lines_lost_total"), "lost log lines"),
            ),
        ),
        Panel(
            "Trouble with others",
            "The downstream, the name servers and the store: what they did not answer. Mail is deferred meanwhile, or goes "
            "on as policies say.",
            "ops",
            (
                Query(rate("mxgate_relay_errors_total", where='error!~"orphan|partial"'), "downstream"),
                Query(rate("mxgate_dns_questions_total", where='outcome=~"timeout|network"'), "name servers"),
                Query(rate("mxgate_store_errors_total"), "store"),
            ),
        ),
    ),
)

OVERVIEW = Dashboard(
    "mxgate-overview",
    "mxgate / Overview",
    "Is the gateway well, what becomes of mail, and why.",
    (_STATE, _MAIL, _TROUBLE),
)
