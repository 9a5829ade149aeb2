"""SPF beside pyspf in generated worlds: the same result, or a rule of RFC 7208 that says why not.

The rules are those with which the policy crosscheck explains differences (policies.verify.second_opinion.spf).
"""

from __future__ import annotations

import pytest

from gateway.session import client_address
from policies.verify.second_opinion.spf import Checked, Opinion, known_difference, opinion
from policies.verify.spf import SpfResult, check_host
from tests.policies.verify.spf_worlds import World, world


def theirs_of(given: World) -> Opinion:
    return opinion(checked(given), given.zone.answer, explain=True)


def checked(given: World) -> Checked:
    return Checked(given.client, given.mail_from, given.helo)


def ours_of(given: World) -> SpfResult:
    client = client_address(given.client)
    return given.zone.run(check_host(client, given.domain, given.mail_from, given.helo))


def explains(given: World, theirs: Opinion) -> bool:
    """Whether our result is pyspf's, or a rule tells why it is not."""
    ours = ours_of(given).result
    return ours == theirs.word or bool(known_difference(checked(given), theirs, given.zone.answer))


def has_their_explanation(given: World, theirs: Opinion) -> bool:
    """Whether two explanations are the same; pyspf drops one at things that end its check, see the rules."""
    ours = ours_of(given)
    if theirs.word != "fail" or not theirs.explanation or ours.result != theirs.word:
        return True
    # RFC 7208 4.3: a sender without local part has "postmaster" there; pyspf has it in %{l}, but not in %{s}
    explanation = ours.explanation.replace("/?postmaster%40", "/?%40")
    # RFC 7208 7.3 shortens the names that are asked for; pyspf shortens any text once
    if len(explanation) > 253:
        explanation = explanation.partition(".")[2]
    return theirs.explanation in (ours.explanation, explanation)


def compare(seeds: range) -> None:
    unexplained = []
    for seed in seeds:
        given = world(seed)
        theirs = theirs_of(given)
        if not (explains(given, theirs) and has_their_explanation(given, theirs)):
            unexplained.append((seed, theirs.word, list(ours_of(given).lines())))
    assert unexplained == []


def test_results_are_those_of_pyspf_or_a_rule_tells_why_not() -> None:
    compare(range(1000))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(10))
def test_results_are_those_of_pyspf_in_20000_worlds(block: int) -> None:
    compare(range(1000 + block * 2000, 3000 + block * 2000))
