"""Policies: what each decides, would decide, takes and fails at."""

from grafana.model import ORANGE, RED, Dashboard, Panel, Query, Row
from grafana.promql import mean, quantile, rate

_DECISIONS = Row(
    "Decisions",
    (
        Panel(
            "Refusals",
            "Verdicts other than continue, of enforced policies.",
            "ops",
            (
                Query(
                    f"""{rate("mxgate_policy_decisions_total", "policy, stage, action", 'action!="continue"')} > 0""",
                    "{{policy}} {{stage}} {{action}}",
                ),
            ),
        ),
        Panel(
            "What observed policies would have done",
            "Verdicts other than continue, of policies in the mode observe. Compare it with what you want before you "
            "enforce them.",
            "ops",
            (
                Query(
                    f"""{rate("mxgate_policy_would_total", "policy, stage, action", 'action!="continue"')} > 0""",
                    "{{policy}} {{stage}} {{action}}",
                ),
            ),
        ),
        Panel(
            "Calls",
            "Verdicts of each policy at each stage, continue included.",
            "ops",
            (Query(f"{rate('mxgate_policy_decisions_total', 'policy, stage')} > 0", "{{policy}} {{stage}}"),),
        ),
        Panel(
            "Greylisting",
            "Attempts of strangers that were deferred, and attempts that had not to wait. Where it is off: nothing.",
            "ops",
            (
                Query(f"{rate('mxgate_greylist_deferred_total', 'attempt')}", "deferred {{attempt}}"),
                Query(f"{rate('mxgate_greylist_skipped_total', 'reason')}", "passed {{reason}}"),
            ),
        ),
    ),
)

_TIMES = Row(
    "Time",
    (
        Panel(
            "99 % of calls take less than",
            "From the call of a policy to its verdict, DNS and store included.",
            "s",
            (
                Query(
                    quantile(0.99, "mxgate_policy_duration_seconds", "policy, stage"),
                    "{{policy}} {{stage}}",
                    exemplar=True,
                ),
            ),
        ),
        Panel(
            "Mean time of a call",
            "From the call of a policy to its verdict.",
            "s",
            (Query(mean("mxgate_policy_duration_seconds", "policy, stage"), "{{policy}} {{stage}}"),),
        ),
        Panel(
            "Failures",
            "Exceptions, timeouts and answers that are no verdict. Mail went on without that policy or was deferred, as its "
            "on_error says.",
            "ops",
            (Query(f"{rate('mxgate_policy_failures_total', 'policy, failure')}", "{{policy}} {{failure}}"),),
            thresholds=((0.01, ORANGE), (0.1, RED)),
        ),
        Panel(
            "Times that a policy blocked its worker",
            "For over half a second at once, while no other session of that worker was served.",
            "ops",
            (Query(rate("mxgate_policy_blocked_total", "policy, stage"), "{{policy}} {{stage}}"),),
        ),
    ),
)

_CALLOUTS = Row(
    "Callouts",
    (
        Panel(
            "Requests to services",
            "Of policies that ask a service by HTTP, as rspamd and http_hook do. Where none is in the plan: nothing.",
            "ops",
            (Query(rate("mxgate_http_requests_total", "policy, outcome"), "{{policy}} {{outcome}}"),),
        ),
        Panel(
            "99 % of requests take less than",
            "From the request to the end of the service's answer.",
            "s",
            (Query(quantile(0.99, "mxgate_http_duration_seconds", "policy"), "{{policy}}"),),
        ),
    ),
)

POLICIES = Dashboard(
    "mxgate-policies",
    "mxgate / Policies",
    "What each policy decides, would decide, takes and fails at.",
    (_DECISIONS, _TIMES, _CALLOUTS),
)
