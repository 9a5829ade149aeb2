"""What DNS said to one decision; who asks for more gets nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.api import Answer, Asked, Lookup, Question

Answers = Callable[[Question], Answer]
"""What DNS said to a question. Raises UnaskedError for one that is not to be answered."""


# A record of more octets is none that anybody publishes, and what reads it backtracks
_MAX_TEXT_BYTES = 4096


class UnaskedError(Exception):
    """The decision has not asked this, or what it was told is not to be handed on."""


def recorded(trail: Iterable[Asked]) -> Answers:
    """The answers of a decision. A question that got two different ones (the first came too late) has none."""
    known: dict[Question, Answer | None] = {}
    for asked in trail:
        question = _key(asked.question)
        answer = known.setdefault(question, asked.answer)
        if answer != asked.answer:
            known[question] = None

    def answer_of(question: Question) -> Answer:
        answer = known.get(_key(question))
        if answer is None or any(len(text) > _MAX_TEXT_BYTES for text in answer.texts):
            raise UnaskedError(f"{question.name} {question.rrtype}")
        return answer

    return answer_of


def drive(lookup: Lookup[str], answers: Answers) -> str:
    """A Lookup to its end, with these answers. Raises what they raise."""
    try:
        questions = next(lookup)
        while True:
            questions = lookup.send([answers(question) for question in questions])
    except StopIteration as done:
        return str(done.value)


def _key(question: Question) -> Question:
    return Question(question.name.lower().removesuffix("."), question.rrtype)
