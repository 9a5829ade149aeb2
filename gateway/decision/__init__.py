"""The record of one decision: envelope, judged fields, verdicts, timings; bounded, and serialised only when asked for.

`record` holds the types, `ring` keeps the newest records of a worker, `filters` says which of them somebody wants to
see, `show` and `text` make JSON and lines of them, `why` says in
a sentence whose doing it was, `recorded` reads that JSON again, `exact` is how what must be exact
stands in it, `answer` what a worker answers. The gatekeeper makes records, the pipeline the trail of verdicts in them;
the admin port and `mxgate decisions` show them, `mxgate explain --record` replays them.
"""

from gateway.decision.answer import DecisionsAnswer, merge_decisions
from gateway.decision.filters import FilterError, Filters, parse_query
from gateway.decision.record import ACTIONS, Decision, Judged, RcptAnswer
from gateway.decision.recorded import Recorded, RecordError, read_record
from gateway.decision.ring import DecisionRing
from gateway.decision.show import to_json
from gateway.decision.text import as_line, as_text

__all__ = [
    "ACTIONS",
    "Decision",
    "DecisionRing",
    "DecisionsAnswer",
    "FilterError",
    "Filters",
    "Judged",
    "RcptAnswer",
    "RecordError",
    "Recorded",
    "as_line",
    "as_text",
    "merge_decisions",
    "parse_query",
    "read_record",
    "to_json",
]
