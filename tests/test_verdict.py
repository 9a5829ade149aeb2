"""verdict: a decision is sound when it is made, many become one, and no header edit can end its field."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.smtp.reply import Reply
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    RemoveFields,
    Result,
    Verdict,
    defer,
    forbidden,
    merge,
    proceed,
    quarantine,
    reject,
)

LATER = Reply(450, "4.7.1", "Come again later")
NEVER = Reply(550, "5.7.1", "Not here")
SPF = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "example.org"),))
DKIM = AuthResult("dkim", Result.NONE)
FIELD = AddField("X-Test", "a")


# --- Verdict -----------------------------------------------------------------------------------------


def test_actions_are_ordered_and_labelled() -> None:
    assert Action.CONTINUE < Action.QUARANTINE < Action.DEFER < Action.REJECT
    assert [action.label for action in Action] == ["continue", "quarantine", "defer", "reject"]


def test_constructors_say_what_they_are_called() -> None:
    results, edits = [SPF], [FIELD]
    assert proceed(reason="known", results=results, edits=edits) == Verdict(
        Action.CONTINUE, "known", None, (SPF,), (FIELD,)
    )
    assert quarantine("odd", results=results, edits=edits) == Verdict(
        Action.QUARANTINE, "odd", None, (SPF,), (FIELD,)
    )
    assert defer("grey", LATER, results=results) == Verdict(Action.DEFER, "grey", LATER, (SPF,))
    assert reject("bad", NEVER, results=results, close=True) == Verdict(
        Action.REJECT, "bad", NEVER, (SPF,), close=True
    )


def test_proceeding_without_findings_is_always_the_same_verdict() -> None:
    assert proceed() is proceed()


@pytest.mark.parametrize(
    ("action", "reply", "close"),
    [
        (Action.DEFER, None, False),
        (Action.DEFER, NEVER, False),
        (Action.DEFER, Reply(250, "2.0.0", "Ok"), False),
        (Action.REJECT, None, False),
        (Action.REJECT, LATER, False),
        (Action.CONTINUE, LATER, False),
        (Action.CONTINUE, None, True),
        (Action.QUARANTINE, NEVER, False),
        (Action.QUARANTINE, None, True),
    ],
)
def test_reply_has_to_fit_the_action(action: Action, reply: Reply | None, close: bool) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Verdict(action, "reason", reply, close=close)


@pytest.mark.parametrize("reason", ["Bad", "two words", "a-b", "1st", "_a", "a\n", "é", "a" * 64])
def test_reason_is_a_token(reason: str) -> None:
    with pytest.raises(ValueError, match="is no token"):
        reject(reason, NEVER)


# --- merge -------------------------------------------------------------------------------------------


def test_nothing_merges_to_continue() -> None:
    assert merge([]) == proceed()


def test_strictest_wins_wherever_it_stands() -> None:
    verdicts = [
        proceed(reason="fine"),
        reject("bad", NEVER, close=True),
        quarantine("odd"),
        defer("grey", LATER),
    ]
    assert merge(verdicts) == merge(reversed(verdicts)) == reject("bad", NEVER, close=True)


def test_first_among_equals_gives_reason_and_reply() -> None:
    other = Reply(554, "5.7.1", "Another one")
    assert merge([reject("first", NEVER), reject("second", other)]) == reject("first", NEVER)
    assert merge([proceed(), proceed(reason="first"), proceed(reason="second")]).reason == "first"


def test_first_among_equals_gives_the_reply_also_without_a_reason() -> None:
    assert (
        merge([Verdict(Action.REJECT, "", NEVER), reject("second", Reply(554, "5.7.1", "Another one"))]).reply
        == NEVER
    )


def test_results_and_edits_of_all_are_kept_in_order() -> None:
    removal = RemoveFields("Received-SPF")
    merged = merge(
        [
            proceed(results=[SPF], edits=[FIELD]),
            reject("bad", NEVER, results=[DKIM]),
            proceed(edits=[removal]),
        ]
    )
    assert merged == Verdict(Action.REJECT, "bad", NEVER, (SPF, DKIM), (FIELD, removal))


REASONS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
RESULTS = st.lists(st.sampled_from([SPF, DKIM]), max_size=2)
EDITS = st.lists(st.sampled_from([FIELD, RemoveFields("X-Test")]), max_size=2)
VERDICTS = (
    st.builds(proceed, reason=st.just("") | REASONS, results=RESULTS, edits=EDITS)
    | st.builds(quarantine, REASONS, results=RESULTS, edits=EDITS)
    | st.builds(defer, REASONS, st.just(LATER), results=RESULTS, close=st.booleans())
    | st.builds(reject, REASONS, st.just(NEVER), results=RESULTS, close=st.booleans())
)


@given(st.lists(VERDICTS, max_size=6))
def test_merge_is_the_first_of_the_strictest_with_the_findings_of_all(verdicts: list[Verdict]) -> None:
    merged = merge(verdicts)
    assert merged.action == max((verdict.action for verdict in verdicts), default=Action.CONTINUE)
    equals = [verdict for verdict in verdicts if verdict.action == merged.action]
    winner = next((verdict for verdict in equals if verdict.reason), proceed())
    assert (merged.reason, merged.reply) == (winner.reason, winner.reply)
    assert merged.close == any(verdict.close for verdict in verdicts)
    assert merged.results == tuple(result for verdict in verdicts for result in verdict.results)
    assert merged.edits == tuple(edit for verdict in verdicts for edit in verdict.edits)


@given(st.lists(VERDICTS, max_size=6), st.integers(0, 6))
def test_merging_in_ranks_is_merging_at_once(verdicts: list[Verdict], cut: int) -> None:
    assert merge([merge(verdicts[:cut]), *verdicts[cut:]]) == merge(verdicts)


# --- AddField ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "a", "a; b=c", "a\r\n b", "a\r\n\tb;\r\n \t c", "\r\n a", "é"])
def test_field_may_be_folded(value: str) -> None:
    assert AddField("X-Test", value).value == value


@pytest.mark.parametrize(
    "value",
    [
        "a\r\nb",
        "a\r\nBcc: x@example.org",
        "a\r\n\r\nbody",
        "a\r\n \r\n\r\nbody",
        "a\r\n ",
        "a\r\n \t\r\n b",
        "a\rb",
        "a\nb",
        "a\n b",
        "a\r b",
        "a\r\r\n b",
        "a\r\n\n b",
        "a\r\n b\r",
        "a\0b",
        "a\r\n \0b",
    ],
)
def test_value_cannot_end_its_field(value: str) -> None:
    with pytest.raises(ValueError, match="no folding"):
        AddField("X-Test", value)


@pytest.mark.parametrize("name", ["", "X Test", "X:Test", "X\r\nTest", "X\n", "é", "X\t", "\0", "X" * 78])
def test_name_has_to_be_a_field_name(name: str) -> None:
    with pytest.raises(ValueError, match="no field name"):
        AddField(name, "a")


@pytest.mark.parametrize("name", ["", "X Test", "X:", "X\r\n", "\u00e9"])
def test_field_to_remove_has_to_have_a_field_name(name: str) -> None:
    with pytest.raises(ValueError, match="no field name"):
        RemoveFields(name)


def test_value_that_cannot_be_encoded_is_refused_when_made() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        AddField("X-Test", "a\ud800")


@given(st.text(), st.text() | st.text(st.sampled_from("\r\n\t \0a:\x0b\x0c\x85\u2028")))
@example("X", "\r\n a\r\n b")
def test_any_field_that_can_be_made_is_one_field(name: str, value: str) -> None:
    try:
        field = AddField(name or "X", value)
    except ValueError:
        return
    octets = f"{field.name}: {field.value}\r\n".encode("utf-8", "surrogatepass")
    # RFC 5322 2.2.3: only CRLF, each but the last before white space and something to fold
    assert re.fullmatch(rb"[!-9;-~]+:[^\r\n\0]*(\r\n[ \t]+[^ \t\r\n\0][^\r\n\0]*)*\r\n", octets)


# --- edits that no policy may make ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("From", "sender", "Reply-To", "TO", "Cc", "Bcc", "Subject", "Date", "Message-ID", "In-Reply-To"),
        *("References", "MIME-Version", "Content-Type", "content-disposition", "Received", "Return-Path"),
        *("Resent-From", "DKIM-Signature", "ARC-Seal", "ARC-Message-Signature", "Authentication-Results"),
    ],
)
def test_no_policy_adds_what_stands_once_or_is_others_word(name: str) -> None:
    assert forbidden(AddField(name, "x")).startswith(f"{name} ")


@pytest.mark.parametrize(
    "name", ["X-Spam-Score", "Received-SPF", "List-Id", "X-Mxgate-Colour", "Contents", "Fro"]
)
def test_other_fields_may_be_added(name: str) -> None:
    assert forbidden(AddField(name, "x")) == ""


@pytest.mark.parametrize(
    ("name", "is_allowed"),
    [
        ("Received-SPF", True),
        ("x-mxgate-colour", True),
        ("X-Mxgate", False),
        ("X-Spam-Score", False),
        ("Authentication-Results", False),
        ("DKIM-Signature", False),
        ("Subject", False),
    ],
)
def test_only_what_is_ours_is_taken_out(name: str, is_allowed: bool) -> None:
    assert forbidden(RemoveFields(name)) == ("" if is_allowed else f"{name} leaves as it came")


@pytest.mark.parametrize("edit", [AddField("X-Jail", "1"), RemoveFields("x-jail")], ids=repr)
def test_the_engines_own_fields_are_reserved(edit: AddField | RemoveFields) -> None:
    assert forbidden(edit) == ("" if isinstance(edit, AddField) else "x-jail leaves as it came")
    assert forbidden(edit, frozenset({"x-jail"})) == f"{edit.name} is written by the engine"


def test_a_line_that_downstreams_may_refuse_is_not_added() -> None:
    fits = "x" * (998 - len("X-A: "))

    assert forbidden(AddField("X-A", f"{fits}\r\n {fits}")) == ""
    assert forbidden(AddField("X-A", f"{fits}x")) == "X-A has a line of more than 998 characters"
    assert forbidden(AddField("X-A", f"a\r\n {'x' * 998}")) == "X-A has a line of more than 998 characters"
    # shorter lines would not help
    assert "signs" in forbidden(AddField("ARC-Seal", f"{fits}x"))


@pytest.mark.parametrize(
    ("edit", "is_allowed"),
    [
        (AddField("DKIM-Signature", "v=1"), True),
        (AddField("dkim-signature", "v=1"), True),
        (AddField("X-Test", "a"), False),
        (RemoveFields("DKIM-Signature"), False),
        # taken out at EOM, where it is not yet signed
        (RemoveFields("Received-SPF"), False),
    ],
    ids=repr,
)
def test_behind_the_edits_signatures_are_added_and_nothing_else_is_done(
    edit: AddField | RemoveFields, is_allowed: bool
) -> None:
    why = f"{edit.name} is no signature, which is all that is added behind the edits"
    assert forbidden(edit, is_last=True) == ("" if is_allowed else why)
