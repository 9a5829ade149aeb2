"""Who has authenticated, and where, in the record of a decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.decision import Recorded, to_json
from gateway.decision.recorded import RecordError, read_record
from gateway.decision.show import redacted
from gateway.redaction import Redaction
from gateway.session import Role, Trust
from tests.decision.records import decision


def test_a_record_keeps_the_user_and_the_role() -> None:
    made = decision(header=b"From: a@example.org\r\n")
    session = replace(made.session, trust=Trust.AUTHENTICATED, user="ann@example.org", role=Role.SUBMISSION)
    record = to_json(made._replace(session=session))

    assert (record["user"], record["role"]) == ("ann@example.org", "submission")
    read: Recorded = read_record(record)
    assert read.session == session


@pytest.mark.parametrize(
    ("user", "shown"), [("ann", "***"), ("ann@example.org", "***@example.org"), ("", "")]
)
def test_a_login_name_is_redacted(user: str, shown: str) -> None:
    made = decision(header=b"From: a@example.org\r\n")
    record = to_json(made._replace(session=replace(made.session, user=user)))
    assert redacted(record, Redaction(["local_parts"]))["user"] == shown
    assert redacted(record, Redaction(["client_addresses"]))["user"] == user


def test_a_record_of_before_has_neither() -> None:
    record = to_json(decision(header=b"From: a@example.org\r\n"))
    del record["user"], record["role"]

    assert (read_record(record).session.user, read_record(record).session.role) == (None, Role.MX)


def test_a_role_that_is_none_is_told() -> None:
    with pytest.raises(RecordError, match="role"):
        read_record(to_json(decision(header=b"x: y\r\n")) | {"role": "relay"})
