"""The record of one decision: envelope, judged fields, verdicts, timings; bounded, and serialised only when asked for.

`record` holds the types, `ring` keeps the newest records of a worker, `filters` says which of them somebody wants to
see, `show` and `text` make JSON and lines of them, `answer` what a worker answers. The gatekeeper makes records, the
pipeline the trail of verdicts in them; the admin port and `mxgate decisions` show them.
"""

from gateway.decision.answer import DecisionsAnswer, merge_decisions
from gateway.decision.filters import FilterError, Filters, parse_query
from gateway.decision.record import ACTIONS, Asked, Decision, Judged, RcptAnswer
from gateway.decision.ring import DecisionRing
from gateway.decision.show import to_json
from gateway.decision.text import as_text

__all__ = [
    "ACTIONS",
    "Asked",
    "Decision",
    "DecisionRing",
    "DecisionsAnswer",
    "FilterError",
    "Filters",
    "Judged",
    "RcptAnswer",
    "as_text",
    "merge_decisions",
    "parse_query",
    "to_json",
]
