"""redaction: what tells of a person is gone, whatever stands around it, and the rest is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import DecisionRing, DecisionsAnswer, Judged
from gateway.lookup import Answer, Asked, Found, Question, RRType
from gateway.redaction import Redact, Redaction
from gateway.smtp.reply import Reply
from gateway.verdict import Stage, proceed
from tests.decision.records import decision, session

BOTH = Redaction([*Redact])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ann@example.org", "***@example.org"),
        ('"ann b"@example.org', "***@example.org"),
        (r'to "a\"n@n"@example.org', "to ***@example.org"),
        ("bounce+ann=example.org@list.example", "***@list.example"),
        ("550 5.1.1 <ann@example.org>: User unknown", "550 5.1.1 <***@example.org>: User unknown"),
        ("ann@example.org,bob@example.net", "***@example.org,***@example.net"),
        ("\u00e4nn@example.org", "***@example.org"),
        ("nobody @example.org", "nobody @example.org"),
        ("192.0.2.7", "192.0.2.0/24"),
        ("[192.0.2.7]", "[192.0.2.0/24]"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("2001:db8:1:2::7", "2001:db8:1::/48"),
        ("[IPv6:2001:db8:1:2::7]", "[IPv6:2001:db8:1::/48]"),
        ("7.2.0.192.zen.example.org", "***.zen.example.org"),
        ("host-192-0-2-7.dyn.example.net", "host-***.dyn.example.net"),
        ("2001:db8:1:2::7: rejected", "2001:db8:1::/48: rejected"),
        ("2001:db8:1:2:3:4:5:7: rejected", "2001:db8:1::/48: rejected"),
        ("[2001:db8:1:2:3:4:5:7]:25", "[2001:db8:1::/48]:25"),
        ("2001:db8:1:2:3:4:5:7:25", "***"),
        ("client:2001:db8:1:2::7", "client:2001:db8:1::/48"),
        ("05:33:44: rejected", "05:33:44: rejected"),
        (".".join("7" * 32) + ".ip6.arpa", "***.ip6.arpa"),
        ("2026-11-22T05:33:44.882Z", "2026-11-22T05:33:44.882Z"),
        ("mail.example.net", "mail.example.net"),
        ("1m80vxzckjnp001-1", "1m80vxzckjnp001-1"),
        ("999.0.2.7", "999.0.2.7"),
    ],
)
def test_takes_out_what_tells_of_a_person(text: str, shown: str) -> None:
    assert BOTH.text(text) == shown
    assert BOTH.text(BOTH.text(text)) == shown
    assert Redaction().text(text) == text


def test_each_is_wanted_by_itself() -> None:
    text = "ann@example.org from 192.0.2.7"
    assert Redaction(["local_parts"]).text(text) == "***@example.org from 192.0.2.7"
    assert Redaction(["client_addresses"]).text(text) == "ann@example.org from 192.0.2.0/24"
    assert not Redaction()


around = st.text(alphabet=st.sampled_from("<>()[];:, \"'=@x\n\\")) | st.text()


@given(around, around)
def test_no_text_around_an_address_keeps_it(before: str, after: str) -> None:
    assert "secretlocal" not in BOTH.text(f"{before} secretlocal@example.org {after}")
    assert "secretlocal" not in BOTH.text(f'{before}"secretlocal"@example.org{after}')


@given(
    st.ip_addresses(),
    st.sampled_from(["", " ", "[", "<", "=", "from ", "IPv6:", "client:", "source:", "error: "]),
    st.sampled_from(["", "]", " ", ">", ":25", ": refused", ":"]),
)
def test_no_address_is_left(address: IPv4Address | IPv6Address, before: str, after: str) -> None:
    shown = BOTH.text(f"{before}{address}{after}")
    kept = 24 if isinstance(address, IPv4Address) else 48
    assert f"/{kept}" in shown or "***" in shown
    assert f"{address}{after or ' '}" not in f"{shown} "


@given(st.text(max_size=5000))
def test_any_text_is_a_text(text: str) -> None:
    assert isinstance(BOTH.text(text), str)


def test_it_takes_linear_time() -> None:
    for text in (
        "@" * 200_000,
        '"' * 200_000 + "@",
        "a" * 200_000,
        "1." * 100_000,
        "f:" * 100_000,
        "1-" * 100_000,
    ):
        BOTH.text(text)


class Seen:
    """Evidence that names whom it is about."""

    def lines(self) -> Sequence[str]:
        return ("exists:ann._spf.example.net for carl",)


def test_words_about_somebody_are_without_the_local_part_alone() -> None:
    about = ["bob@example.org", "ann", '"c d"@example.org', "", "<>"]
    for text, told in (
        ("Bob: no such user, bobby and ann.b", "***: no such user, bobby and ***.b"),
        ("user c d <bob@example.net>", "user *** <***@example.net>"),
        ("192.0.2.7 and nobody", "192.0.2.0/24 and nobody"),
    ):
        assert BOTH.about(about, text) == told
        assert Redaction().about(about, text) == text
    assert [BOTH.user(name) for name in ("ann", "ann@example.org", "")] == ["***", "***@example.org", ""]


def shown(redaction: Redaction | None, **query: str) -> dict[str, Any]:
    ring = DecisionRing()
    asked = Asked("spf", Question("ann._spf.7.2.0.192.example.net", RRType.A), Answer(Found.NO_DATA))
    seen = proceed(reason="spf_none", evidence=Seen())
    ring.add(
        decision(
            1,
            mail_from="ann@example.net",
            rcpts=("bob@example.org",),
            header=b"From: Ann Smith <ann@example.net>\r\nReceived: from [192.0.2.7]\r\n",
            error="refused <bob@example.org> for 192.0.2.7",
            answer=Reply.from_downstream(550, "5.1.1 Bob: no such user here"),
            judged=[Judged("spf", Stage.EOM, "enforce", seen, None, 0.01, "")],
        )._replace(dns=(asked,), session=replace(session(1), user="carl"))
    )
    answer = DecisionsAnswer(ring, query, redaction)
    while not answer.step():
        pass
    (record,) = cast("Any", answer.result)["decisions"]
    return dict(record)


def test_decisions_are_shown_redacted_and_found_by_what_they_hide() -> None:
    record: dict[str, Any] = {}
    for query in ({"rcpt": "bob@example.org"}, {"tx": "1m80vxzckjnp001-1", "client": "192.0.2.7"}):
        record = shown(BOTH, **query)
        text = json.dumps(record)
        for told in ("ann", "bob", "Bob", "carl", "Ann", "Smith", "192.0.2.7", "7.2.0.192"):
            assert told not in text.replace("quarantine", "").replace("cannot", ""), told
        assert record["client"] == "192.0.2.0/24"
        assert record["mail_from"] == "***@example.net"
        assert record["rcpts"][0]["rcpt"] == "***@example.org"
    assert "header_octets" not in record
    assert record["header"] == []
    assert record["dns"][0]["name"] == "***._spf.***.example.net"
    assert "Smith" in json.dumps(shown(None, tx="1m80vxzckjnp001-1"))
