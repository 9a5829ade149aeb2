"""DNS and store: what policies ask, who answers, and how long that takes."""

from grafana.model import RED, YELLOW, Dashboard, Panel, Query, Row
from grafana.promql import or_zero, quantiles, rate, share, total

_DNS = Row(
    "DNS",
    (
        Panel(
            "Questions to name servers",
            "By what came of them. no_data and no_such_name are answers like any other.",
            "ops",
            (Query(f"{rate('mxgate_dns_questions_total', 'outcome')} > 0", "{{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Time of a question to name servers",
            "To name servers, all that were tried included; what the cache answers is not in it.",
            "s",
            quantiles("mxgate_dns_duration_seconds"),
        ),
        Panel(
            "Part that the cache answers",
            "Of the questions of policies.",
            "percentunit",
            (Query(share("mxgate_dns_cache_total", 'outcome="hit"'), "hit"),),
            max=1,
        ),
        Panel(
            "Part without an answer",
            "Our name servers were silent or could not be reached. servfail is what they say of strangers' broken domains.",
            "percentunit",
            (
                Query(share("mxgate_dns_questions_total", 'outcome=~"timeout|network"'), "no answer"),
                Query(share("mxgate_dns_questions_total", 'outcome="servfail"'), "servfail"),
            ),
            thresholds=((0.05, YELLOW), (0.5, RED)),
        ),
        Panel(
            "Questions by type",
            "What is asked for.",
            "ops",
            (Query(f"{rate('mxgate_dns_questions_total', 'rrtype')} > 0", "{{rrtype}}"),),
            stacked=True,
        ),
        Panel(
            "Questions that were not asked",
            "budget: no time was left for them; limit: the message had caused 160 already.",
            "ops",
            (Query(rate("mxgate_dns_cut_total", "reason"), "{{reason}}"),),
        ),
    ),
)

_STORE = Row(
    "Store",
    (
        Panel(
            "Operations",
            "By who answered. local: the worker's own memory in an outage; nobody: as on_outage says.",
            "ops",
            (Query(rate("mxgate_store_operations_total", "answered_by"), "{{answered_by}}"),),
            stacked=True,
        ),
        Panel(
            "Time of a question to the store",
            "Up to the store's answer or failure; several operations may be one question.",
            "s",
            tuple(Query(each.expr, each.legend) for each in quantiles("mxgate_store_duration_seconds")),
        ),
        Panel(
            "Errors",
            "Questions that the store did not answer, by why.",
            "ops",
            (Query(rate("mxgate_store_errors_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Workers whose breaker is open",
            "They do not ask the store at all, and look for it twice a second.",
            "short",
            (Query(or_zero(total("mxgate_store_outage")), "open"),),
            thresholds=((1, RED),),
        ),
    ),
)

DNS_AND_STORE = Dashboard(
    "mxgate-dns-and-store",
    "mxgate / DNS and store",
    "What policies ask of name servers and of the store.",
    (_DNS, _STORE),
)
