"""session: what policies get to see is immutable, and a slot belongs to who made it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from ipaddress import ip_address

import pytest

from gateway.session import (
    AddressSource,
    BodyType,
    Envelope,
    Recipient,
    Session,
    Slot,
    TlsInfo,
    Transaction,
    Trust,
    client_address,
)
from gateway.smtp.address import parse_forward_path
from gateway.verdict import AuthResult, Result

SESSION = Session("S", ip_address("192.0.2.1"), 1234)
ENVELOPE = Envelope(None)


def test_a_new_session_is_untrusted_and_in_the_clear() -> None:
    assert (SESSION.helo, SESSION.esmtp, SESSION.tls) == ("", False, None)
    assert SESSION.trust is Trust.UNTRUSTED
    assert SESSION.user is None
    assert SESSION.address_source is AddressSource.SOCKET


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1%eth0", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_a_clients_address_has_no_zone_and_is_ipv4_where_it_is_mapped(text: str, address: str) -> None:
    assert client_address(text) == ip_address(address)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        client_address("client.example")


def test_an_envelope_without_parameters_is_7bit_and_unknown_in_size() -> None:
    assert ENVELOPE.body_type is BodyType.SEVEN_BIT
    assert (ENVELOPE.rcpts, ENVELOPE.smtputf8, ENVELOPE.size_hint) == ((), False, 0)
    assert (ENVELOPE.dsn_ret, ENVELOPE.dsn_envid) == ("", "")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (SESSION, "helo"),
        (ENVELOPE, "rcpts"),
        (Transaction("S-1", SESSION, ENVELOPE), "results"),
        (Recipient(parse_forward_path("<b@example.org>", smtputf8=False)), "notify"),
        (TlsInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256"), "cipher"),
    ],
)
def test_nothing_can_be_changed(value: object, name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, "")


def test_a_slot_is_empty_until_something_is_put_there() -> None:
    seen: Slot[int] = Slot("seen")
    tx = Transaction("S-1", SESSION, ENVELOPE)

    assert seen.get(tx) is None
    seen.put(tx, 1)
    seen.put(tx, 2)
    assert seen.get(tx) == 2


def test_slots_of_one_name_are_different_slots() -> None:
    mine: Slot[str] = Slot("seen")
    yours: Slot[str] = Slot("seen")
    tx = Transaction("S-1", SESSION, ENVELOPE)

    mine.put(tx, "mine")

    assert yours.get(tx) is None
    assert mine == mine  # noqa: PLR0124  # it is the only slot that it equals
    assert mine != yours


def test_notes_stay_with_the_transaction_while_it_grows_and_with_no_other() -> None:
    seen: Slot[str] = Slot("seen")
    tx, other = Transaction("S-1", SESSION, ENVELOPE), Transaction("S-2", SESSION, ENVELOPE)
    seen.put(tx, "here")

    grown = replace(tx, results=(AuthResult("spf", Result.PASS),))

    assert seen.get(grown) == "here"
    assert seen.get(other) is None


def test_notes_are_no_part_of_what_a_transaction_is() -> None:
    tx, same = Transaction("S-1", SESSION, ENVELOPE), Transaction("S-1", SESSION, ENVELOPE)
    Slot[str]("secret").put(tx, "hidden")

    assert tx == same
    assert "hidden" not in repr(tx)


def test_records_can_be_copied_and_pickled_and_not_changed() -> None:
    session = Session("S", ip_address("192.0.2.1"), 1234)

    for other in (copy.copy(session), copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert other == session
    with pytest.raises(FrozenInstanceError):
        session.port = 25  # type: ignore[misc]
