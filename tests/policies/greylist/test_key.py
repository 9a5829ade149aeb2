from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import Mailbox, parse_forward_path
from policies.verify.greylist.key import client_network, parts_of, rcpt_key, sender_key, triplet_key


def mailbox(text: str) -> Mailbox:
    return parse_forward_path(f"<{text}>", smtputf8=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ann@example.org", "Ann@example.org"),
        ("bounce-1234@example.org", "bounce-98765@example.org"),
        ("news+bob=example.net@example.org", "news+cid=example.com@example.org"),
        ("msg-0a1b2c3d4e@example.org", "msg-ff99887766@example.org"),
        ("prvs=1234abcdef=ann@example.org", "prvs=2345fedcba=ann@example.org"),
        ("prvs=1234abcdef=ann@example.org", "ann@example.org"),
        ("btv1==1234abcdef@example.org", "btv1==1234abcdef@example.org"),
        ("SRS0=AbCd=XY=example.net=ann@example.org", "SRS0=EfGh=ZZ=example.net=ann@example.org"),
        ("srs0+AbCd=XY=example.net=ann@example.org", "SRS0=EfGh=ZZ=example.net=ann@example.org"),
        (
            "SRS1=H1=example.com==AbCd=XY=example.net=ann@example.org",
            "SRS1=H2=example.com==EfGh=ZZ=example.net=ann@example.org",
        ),
    ],
)
def test_retries_of_one_sender_give_one_key(one: str, other: str) -> None:
    assert sender_key(mailbox(one)) == sender_key(mailbox(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ann@example.org", "bob@example.org"),
        ("ann@example.org", "ann@example.net"),
        ("bounce-12@example.org", "return-12@example.org"),
        ("SRS0=AbCd=XY=example.net=ann@example.org", "SRS0=AbCd=XY=example.com=ann@example.org"),
        ("SRS0=AbCd=XY=example.net=ann@example.org", "SRS0=AbCd=XY=example.net=bob@example.org"),
        ("decade@example.org", "facade@example.org"),
    ],
)
def test_senders_that_are_told_apart(one: str, other: str) -> None:
    assert sender_key(mailbox(one)) != sender_key(mailbox(other))


def test_the_null_reverse_path_is_a_sender_like_others() -> None:
    assert sender_key(None) == "<>"


@pytest.mark.parametrize(
    ("client", "network"),
    [("192.0.2.77", "192.0.2.0/24"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64")],
)
def test_networks(client: str, network: str) -> None:
    assert client_network(ip_address(client)) == network


LOCAL = st.text("abcdef0123456789=+-._", min_size=1, max_size=39)


@given(LOCAL, st.sampled_from(["", "prvs=0123abcdef=", "SRS0=hh=tt=example.net="]))
def test_any_local_part_gives_a_key_without_endless_work(local: str, wrapped: str) -> None:
    try:
        key = sender_key(mailbox(f'"{wrapped}{local}"@example.org'))
    except ValueError:
        return
    assert key.endswith("@example.org")


PART = st.text(max_size=12) | st.text("ab@.", min_size=130, max_size=320)


@given(st.tuples(PART, PART, PART), st.tuples(PART, PART, PART))
def test_keys_of_triplets_are_equal_only_for_the_same_parts(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    key = triplet_key(*one)
    assert (key == triplet_key(*other)) == (one == other)
    assert len(key.encode()) <= 430


def test_a_key_tells_its_parts() -> None:
    parts = ("192.0.2.0/24", "ann@example.net", "bob@example.org")
    assert parts_of(triplet_key(*parts)) == parts
    blank = parts_of(triplet_key("example.net", '"a b"@example.net', "bob@example.org"))
    assert blank[0::2] == ("example.net", "bob@example.org")
    assert blank[1].startswith("~")


def test_a_recipient_or_its_domain() -> None:
    bob = mailbox("Bob@example.org")
    assert rcpt_key(bob, is_domain=False) == "bob@example.org"
    assert rcpt_key(bob, is_domain=True) == "example.org"
