"""Authentication: what SPF, DKIM, ARC and DMARC found, and what DMARC decided."""

from grafana.model import Dashboard, Panel, Query, Row
from grafana.promql import rate


def _of(method: str, meaning: str) -> Panel:
    return Panel(
        f"{method.upper()} results",
        meaning,
        "ops",
        (
            Query(
                f"""{rate("mxgate_auth_results_total", "result", f'method="{method}"')} > 0""", "{{result}}"
            ),
        ),
        stacked=True,
    )


_METHODS = Row(
    "Results",
    (
        _of("spf", "Of each transaction that SPF was checked for. temperror: DNS did not answer."),
        _of("dkim", "Of each signature; none for a message without one."),
        _of("dmarc", "Of each message: whether SPF or DKIM passed for the author domain."),
        _of("arc", "Of each message: the chain of those who forwarded it."),
    ),
)

_DMARC = Row(
    "DMARC",
    (
        Panel(
            "Failed mail by policy and disposition",
            "What the author domain asks for, and what the policy dmarc decided. reject -> continue is an override, a "
            "trusted client, or a domain for which you chose so.",
            "ops",
            (
                Query(
                    rate("mxgate_dmarc_messages_total", "policy, disposition", 'result="fail"'),
                    "{{policy}} -> {{disposition}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Policies of author domains",
            "All mail by the policy of its author domain; absent: it has no record.",
            "ops",
            (Query(rate("mxgate_dmarc_messages_total", "policy"), "{{policy}}"),),
            stacked=True,
        ),
        Panel(
            "Part of mail that passes",
            "Of the messages whose author domain has a record.",
            "percentunit",
            (
                Query(
                    f"""{rate("mxgate_dmarc_messages_total", where='result="pass",policy!="absent"')} / """
                    f"""{rate("mxgate_dmarc_messages_total", where='policy!="absent"')}""",
                    "pass",
                ),
            ),
            max=1,
        ),
        Panel(
            "Checks that could not be made",
            "temperror: DNS did not answer, or our time was used up; permerror: records or signatures of others are wrong.",
            "ops",
            (
                Query(
                    rate("mxgate_auth_results_total", "method, result", 'result=~"temperror|permerror"'),
                    "{{method}} {{result}}",
                ),
            ),
        ),
    ),
)

AUTHENTICATION = Dashboard(
    "mxgate-authentication",
    "mxgate / Authentication",
    "What SPF, DKIM, ARC and DMARC found, and what followed from it.",
    (_METHODS, _DMARC),
)
