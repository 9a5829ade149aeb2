"""reply: one line of printable ASCII, whatever it was made of, and a table in which every reply is sound."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.smtp import reply as replies
from gateway.smtp.reply import MAX_TEXT, Reply

TABLE = {name: value for name, value in vars(replies).items() if isinstance(value, Reply)}

# RFC 5321 4.5.3.1.5: with code and CRLF
MAX_LINE = 512


# --- Reply -------------------------------------------------------------------------------------------


def test_reply_is_written_as_one_line() -> None:
    reply = Reply(550, "5.1.1", "No such user")
    assert reply.wire == b"550 5.1.1 No such user\r\n"
    assert str(reply) == "550 5.1.1 No such user"


def test_reply_without_enhanced_code_is_written_without_it() -> None:
    assert Reply(354, "", "Go on").wire == b"354 Go on\r\n"


@pytest.mark.parametrize("code", [-1, 0, 99, 100, 199, 600, 1000])
def test_code_out_of_range_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="reply code"):
        Reply(code, "", "text")


@pytest.mark.parametrize(
    "enhanced",
    [
        "4.1.1",
        "2.0.0",
        "5",
        "5.1",
        "5.1.1.1",
        "5.1.1000",
        "5..1",
        "5.1.1 ",
        " 5.1.1",
        "5.1.1\r\n",
        "3.0.0",
        "x",
    ],
)
def test_enhanced_code_that_is_malformed_or_of_another_class_is_refused(enhanced: str) -> None:
    with pytest.raises(ValueError, match="enhanced status code"):
        Reply(550, enhanced, "text")


def test_enhanced_code_is_ascii() -> None:
    with pytest.raises(ValueError, match="enhanced status code"):
        Reply(550, "5.1.\N{ARABIC-INDIC DIGIT ONE}", "text")


def test_enhanced_code_of_an_intermediate_reply_is_refused() -> None:
    # RFC 2034 4: there is none for 3xx
    with pytest.raises(ValueError, match="enhanced status code"):
        Reply(354, "3.0.0", "text")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\r\nb",
        "a\r",
        "a\n",
        "a\0",
        "a\tb",
        "a\x1b[2J",
        "a\x7f",
        "é",
        "a\x85",
        "a\u2028b",
        "a" * (MAX_TEXT + 1),
    ],
)
def test_text_that_is_not_one_line_of_printable_ascii_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="reply text"):
        Reply(550, "5.1.1", text)


@pytest.mark.parametrize(
    ("code", "positive", "transient", "permanent"),
    [
        (200, True, False, False),
        (354, True, False, False),
        (399, True, False, False),
        (400, False, True, False),
        (499, False, True, False),
        (500, False, False, True),
        (599, False, False, True),
    ],
)
def test_class_of_a_reply_is_its_first_digit(
    code: int, positive: bool, transient: bool, permanent: bool
) -> None:
    reply = Reply(code, "", "text")
    assert (reply.is_positive, reply.is_transient, reply.is_permanent) == (positive, transient, permanent)


@given(st.integers(-1000, 2000), st.text(), st.text())
def test_a_reply_that_can_be_made_is_one_line(code: int, enhanced: str, text: str) -> None:
    try:
        reply = Reply(code, enhanced, text)
    except ValueError:
        return
    assert reply.wire.count(b"\r\n") == 1
    assert reply.wire[:-2].decode("ascii").isprintable()
    assert len(reply.wire) <= MAX_LINE


# --- from_downstream ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "line"),
    [
        (250, "2.1.5 Ok", "250 2.1.5 Ok"),
        (550, "5.1.1 No such user", "550 5.1.1 No such user"),
        (550, "No such user", "550 5.0.0 No such user"),
        (550, "4.1.1 Of another class", "550 5.0.0 4.1.1 Of another class"),
        (550, "5.1.1", "550 5.1.1 No text given"),
        (450, "", "450 4.0.0 No text given"),
        (250, "\r\n", "250 2.0.0 No text given"),
        (354, "Go on", "354 Go on"),
        (354, "2.0.0 Go on", "354 2.0.0 Go on"),
        (550, "5.7.1 first\r\n5.7.1 second", "550 5.7.1 first 5.7.1 second"),
        (550, "5.7.1 injected\r\n250 2.0.0 Ok", "550 5.7.1 injected 250 2.0.0 Ok"),
        (550, "5.7.1 caf\u00e9 \x1b[2J\0\u2028x", "550 5.7.1 caf [2J x"),
        (550, "5.1.\N{ARABIC-INDIC DIGIT ONE} x", "550 5.0.0 5.1. x"),
    ],
)
def test_reply_of_the_downstream_keeps_its_codes_and_becomes_one_line(
    code: int, text: str, line: str
) -> None:
    assert str(Reply.from_downstream(code, text)).split() == line.split()


def test_long_text_of_the_downstream_is_cut() -> None:
    reply = Reply.from_downstream(550, "5.7.1 " + "x" * 200_000)
    assert reply.text == "x" * MAX_TEXT
    assert len(reply.wire) <= MAX_LINE


@given(st.integers(200, 599), st.text() | st.from_regex(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}[ \r\n\t]?.*"))
@example(550, "5.999.999 " + "x" * 1000)
@example(550, "5.1.1\N{NO-BREAK SPACE}x")
def test_any_text_of_the_downstream_becomes_one_line(code: int, text: str) -> None:
    reply = Reply.from_downstream(code, text)
    assert reply.code == code
    assert reply.wire.count(b"\r\n") == 1
    assert reply.wire.endswith(b"\r\n")
    assert reply.wire[:-2].decode("ascii").isprintable()
    assert len(reply.wire) <= MAX_LINE


# --- the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_every_reply_has_an_enhanced_code_where_rfc_2034_has_one(name: str) -> None:
    # RFC 2034 4: every 2xx, 4xx and 5xx but the banner and the replies to HELO and EHLO
    assert bool(TABLE[name].enhanced) == (TABLE[name].code // 100 != 3)


def test_trouble_of_ours_is_never_permanent() -> None:
    ours = {
        "INTERNAL",
        "INTERNAL_CLOSING",
        "DOWNSTREAM_TROUBLE",
        "FINAL_REPLY_LOST",
        "PARTIAL_REFUSAL",
    }
    assert ours <= TABLE.keys()
    assert all(
        TABLE[name].is_transient for name in ours | {"NO_SPACE", "SHUTTING_DOWN", "TOO_MANY_CONNECTIONS"}
    )


def test_reply_that_announces_the_end_of_the_connection_may_end_it() -> None:
    # RFC 5321 4.2.3, 3.8: 421 and 221, and 554 for what cannot go on
    closing = {name for name, reply in TABLE.items() if "closing" in reply.text.lower()}
    assert {TABLE[name].code for name in closing} <= {221, 421, 554}
