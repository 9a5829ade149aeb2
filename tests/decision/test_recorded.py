"""recorded: a record in JSON is read back as it was, and anything else is one line that says what is wrong."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import RecordError, read_record, to_json
from gateway.lookup import NO_DATA, Answer, Asked, Found, Mx, Question, RRType
from gateway.mail.digest import BodyDigest, Canonicalization
from tests.decision.records import DENIED, decision

HEADER = b"From: a@example.net\r\nSubject: \xff\x00\r\n"
DNS = (
    Asked("spf", Question("example.net", RRType.TXT), Answer(Found.RECORDS, (b"v=spf1 \\ \xff -all",)), 0.1),
    Asked("spf", Question("example.net", RRType.MX), Answer(Found.RECORDS, (Mx(5, "mx.example.net"),))),
    Asked("spf", Question("mx.example.net", RRType.A), Answer(Found.RECORDS, (ip_address("192.0.2.1"),))),
    Asked("dmarc", Question("_dmarc.example.net", RRType.TXT), NO_DATA),
    Asked("dkim", Question("a.b", RRType.TXT), Answer(Found.TEMPORARY_FAILURE, why="timeout")),
)
DIGESTS = {
    (Canonicalization.RELAXED, None): BodyDigest(bytes(32), 100),
    (Canonicalization.SIMPLE, 10): BodyDigest(bytes(range(32)), 100),
}
RECORD = decision(1, header=HEADER)._replace(
    dns=DNS, digests=DIGESTS, judged_at=1_700_000_000.25, authserv_id="mx.example.org"
)


def as_read(record: Any) -> Any:
    return json.loads(json.dumps(record))


def test_what_was_recorded_is_read_back() -> None:
    found = read_record(as_read(to_json(RECORD)))
    assert found.session == RECORD.session
    assert found.envelope.mail_from == RECORD.envelope.mail_from
    assert [(rcpt, reply) for rcpt, reply, _ in found.rcpts] == [(a.rcpt, a.reply) for a in RECORD.rcpts]
    assert (found.header, found.digests, found.time) == (HEADER, DIGESTS, 1_700_000_000.25)
    assert [each[:3] for each in found.dns] == [each[:3] for each in DNS]
    assert (found.reply, found.delivered, found.stage) == (RECORD.reply, True, "eom")
    assert (found.authserv_id, found.missing) == ("mx.example.org", ())


def test_the_null_reverse_path_is_none() -> None:
    assert read_record(as_read(to_json(decision(1, mail_from="")))).envelope.mail_from is None


def test_the_answer_of_the_command_is_read_where_it_holds_one() -> None:
    one = as_read(to_json(RECORD))
    assert read_record({"decisions": [one], "truncated": False}).header == HEADER
    for count in (0, 2):
        with pytest.raises(RecordError, match=f"holds {count} decisions"):
            read_record({"decisions": [one] * count})


def test_what_was_cut_is_told() -> None:
    cut = RECORD._replace(omitted_header_bytes=7, omitted_dns=8, omitted_rcpts=9)
    assert read_record(as_read(to_json(cut))).missing == (
        "7 octets of the header",
        "8 answers of DNS",
        "9 recipients",
    )


def test_a_record_that_is_not_in_full_is_told() -> None:
    with pytest.raises(RecordError, match="ask for the record by its id"):
        read_record(as_read(to_json(RECORD, in_full=False)))


@pytest.mark.parametrize("key", ["helo", "tls", "mail_from", "authserv_id", "session", "reason"])
def test_half_a_character_is_no_text(key: str) -> None:
    with pytest.raises(RecordError, match=key):
        read_record(json.loads(json.dumps({**WHOLE, key: "a\ud800b"})))


values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
WHOLE = as_read(to_json(RECORD._replace(reply=DENIED)))


@given(st.sampled_from(sorted(WHOLE)), values)
def test_any_other_value_of_a_key_is_read_or_told(key: str, value: Any) -> None:
    try:
        read_record({**WHOLE, key: value})
    except RecordError as exc:
        assert "\n" not in str(exc)  # noqa: PT017  # it is read or told


@given(st.sampled_from(["dns", "rcpts", "digests"]), st.data())
def test_any_other_value_within_a_list_is_read_or_told(key: str, data: st.DataObject) -> None:
    entry = WHOLE[key][0]
    changed = {**entry, data.draw(st.sampled_from(sorted(entry))): data.draw(values)}
    try:
        read_record({**WHOLE, key: [changed]})
    except RecordError as exc:
        assert "\n" not in str(exc)  # noqa: PT017  # it is read or told


@given(values)
def test_what_is_no_record_is_told(value: Any) -> None:
    with pytest.raises(RecordError):
        read_record(value)
