"""Our results of one message beside what pyspf and dkimpy make of the same octets and the same answers of DNS.

Blocks, for about as long as dkimpy needs: `is_costly` says for which octets that would be too long, since dkimpy's
regular expressions take quadratic time on runs of white space and no thread is interrupted in one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gateway.api import AddressSource, Asked, AuthResult, Result, Transaction
from policies.verify.second_opinion import signatures, spf
from policies.verify.second_opinion.answers import Answers, UnaskedError, recorded

_MAX_HEADER_BYTES = 32_768
_MAX_SIGNATURES = 5
_MAX_ARC_SEALS = 10
# Steps of a regular expression that tries each octet of a run of white space to its end: some 10 ms
_MAX_BLANK_STEPS = 4_000_000
_BLANKS = re.compile(rb"\s{16,}")


class Agreement(StrEnum):
    """What came of one comparison."""

    AGREE = "agree"
    DISAGREE = "disagree"
    EXPLAINED = "explained"  # they differ, and a known rule says why
    UNANSWERED = "unanswered"  # it wanted to know of DNS what the decision did not ask
    FAILED = "failed"  # it raised


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison; `why` is the rule, the question or the exception, and `subject` what was judged."""

    method: str
    subject: str
    agreement: Agreement
    ours: str
    theirs: str = ""
    why: str = ""


def is_costly(header: bytes, body: bytes) -> bool:
    """Whether dkimpy could take far longer than the size tells; the time that this takes is linear."""
    if len(header) > _MAX_HEADER_BYTES:
        return True
    steps = sum(len(run) ** 2 for octets in (header, body) for run in _BLANKS.findall(octets))
    return steps > _MAX_BLANK_STEPS


def compare(tx: Transaction, octets: bytes, trail: Sequence[Asked]) -> list[Compared]:
    """All that can be compared of a transaction that is over; `octets` is its message."""
    answers = recorded(trail)
    checks = (*_spf(tx, answers), *_dkim(tx, octets, answers), *_arc(tx, octets, answers))
    return [compared for check in checks if (compared := check()) is not None]


_Check = Callable[[], Compared | None]


def _spf(tx: Transaction, answers: Answers) -> Iterator[_Check]:
    """Both identities; none while the client's address is not its own."""
    if tx.session.address_source is AddressSource.HIDDEN:
        return
    mail_from, helo = tx.envelope.mail_from, tx.session.helo
    for ours in (each for each in tx.results if each.method == "spf"):
        subject = dict(ours.properties)
        if "smtp.mailfrom" in subject and mail_from is not None:
            checked = spf.Checked(str(tx.session.client), mail_from.text, helo)
        elif "smtp.helo" in subject:
            checked = spf.Checked(str(tx.session.client), "", helo)
        else:
            continue  # the policy failed
        # pyspf knows nothing of U-labels and of UTF-8 in local parts
        if (checked.mail_from + helo).isascii():
            yield lambda ours=ours, checked=checked: _guarded(  # type: ignore[misc]  # mypy: lambdas with defaults
                ours, checked.mail_from or checked.helo, lambda: _compare_spf(ours, checked, answers)
            )


def _compare_spf(ours: AuthResult, checked: spf.Checked, answers: Answers) -> tuple[str, str, str]:
    theirs = spf.opinion(checked, answers)
    word = str(ours.result)
    if theirs.word == word:
        return word, word, ""
    return word, theirs.word, spf.known_difference(checked, theirs, answers)


def _dkim(tx: Transaction, octets: bytes, answers: Answers) -> Iterator[_Check]:
    ours = [each for each in tx.results if each.method == "dkim"]
    message = tx.message
    if not ours or message is None or _has_failed(ours[0]):
        return
    if ours[0].result is Result.NONE and not signatures.has_signature(octets):
        return
    fields = message.header.all(b"dkim-signature")
    for index, one in enumerate(ours[:_MAX_SIGNATURES]):
        value = fields[index].raw.partition(b":")[2] if index < len(fields) else b""
        subject = dict(one.properties).get("header.d", "")

        def check(index: int = index, one: AuthResult = one, value: bytes = value) -> tuple[str, str, str]:
            theirs = signatures.dkim_opinion(octets, index, answers)
            passes = one.result is Result.PASS
            why = ""
            if passes != theirs.passes:
                why = signatures.known_dkim_difference(one.reason, value, message.header.octets, theirs)
            return _word(passes=passes), _word(passes=theirs.passes), why

        yield lambda one=one, subject=subject, check=check: _guarded(one, subject, check)  # type: ignore[misc]  # as above


def _arc(tx: Transaction, octets: bytes, answers: Answers) -> Iterator[_Check]:
    ours = next((each for each in tx.results if each.method == "arc"), None)
    message = tx.message
    if ours is None or message is None or ours.result is Result.NONE or _has_failed(ours):
        return
    if message.header.has_more(b"arc-seal", _MAX_ARC_SEALS):
        return

    def check() -> tuple[str, str, str]:
        theirs = signatures.arc_opinion(octets, answers)
        if theirs.passes is None:
            raise ValueError("dkimpy has no opinion on this chain")
        passes = ours.result is Result.PASS
        why = ""
        if passes != theirs.passes:
            why = signatures.known_arc_difference(ours.reason, message.header.octets, theirs)
        return _word(passes=passes), _word(passes=theirs.passes), why

    yield lambda: _guarded(ours, "", check)


def _guarded(ours: AuthResult, subject: str, check: Callable[[], tuple[str, str, str]]) -> Compared:
    """What came of a check; whatever a library raises is no failure of ours."""
    try:
        our_word, their_word, why = check()
    except UnaskedError as exc:
        return Compared(ours.method, subject, Agreement.UNANSWERED, str(ours.result), why=str(exc))
    except Exception as exc:  # noqa: BLE001  # pyspf and dkimpy raise what they like
        return Compared(ours.method, subject, Agreement.FAILED, str(ours.result), why=repr(exc))
    if our_word == their_word:
        return Compared(ours.method, subject, Agreement.AGREE, our_word, their_word)
    agreement = Agreement.EXPLAINED if why else Agreement.DISAGREE
    return Compared(ours.method, subject, agreement, our_word, their_word, why)


def _has_failed(ours: AuthResult) -> bool:
    """Whether the engine gave the result for a policy that failed: a temperror about nothing."""
    return ours.result is Result.TEMPERROR and not ours.properties


def _word(*, passes: bool | None) -> str:
    return "pass" if passes else "no pass"
