"""What was explained, for people: who decided what, on what evidence, and what would leave or be answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gateway.decision import as_text
from gateway.decision.text import printable
from gateway.show_plan import plan_lines


def explained_lines(explained: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the JSON of an Explained or a Replayed, without line ends."""
    yield from plan_lines(explained["plan"])
    yield ""
    decision: Mapping[str, Any] = explained["decision"]
    yield from as_text(decision)
    yield ""
    fields = explained["fields"]
    if fields is None:
        yield "nothing would be delivered"
    else:
        for sign, change in (("+", "added"), ("-", "removed")):
            for field in fields[change]:
                name, *more = f"{field['name']}: {field['value']}".split("\r\n")
                yield f"{sign} {printable(name)}"
                for folded in more:
                    yield f"    {printable(folded.strip())}"
    for line in explained["log"]:
        keys = " ".join(
            f"{key}={printable(str(value))}" for key, value in line.items() if key not in ("level", "event")
        )
        yield f"{line['level']}: {line['event']} {keys}"
    again = explained.get("replay")
    if again is not None:
        yield from (f"not in the record: {printable(each)}" for each in again["missing"])
        yield from (f"different: {printable(each)}" for each in again["differences"])
        if again["same"]:
            yield "replayed: the same action, reply, verdicts and results"
    yield " ".join(["answer", *filter(None, (str(decision["code"]), decision["enhanced"], decision["text"]))])
