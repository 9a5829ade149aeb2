"""access: who is on the deny list is refused, unless anything about the mail is on the allow list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import AddressError, AddressSource, ListError, Stage, Trust
from gateway.testing import Client, Harness, PolicyContract
from policies.access import DENIED, DENIED_NOW, Access, AccessSettings, Entry, OnDenied, Subject, parse_entry


class TestContract(PolicyContract):
    policy = Access


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path]:
    """A deny list and an allow list, both empty."""
    deny, allow = tmp_path / "deny", tmp_path / "allow"
    deny.write_text("")
    allow.write_text("")
    return deny, allow


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("client 192.0.2.1", "client_denied"),
        ("client 192.0.2.0/24  # a comment", "client_denied"),
        ("client 0.0.0.0/0", "client_denied"),
        ("client 2001:db8::/32", ""),
        ("helo mail.client.example", "helo_denied"),
        ("helo MAIL.client.example", "helo_denied"),
        ("helo .client.example", "helo_denied"),
        ("helo client.example", ""),
        ("sender ANN@client.example", "sender_denied"),
        ("sender client.example", "sender_denied"),
        ("sender .example", "sender_denied"),
        ("sender .client.example", ""),
        ("sender <>", ""),
        ("rcpt bob@example.org", "rcpt_denied"),
        ("rcpt example.org", "rcpt_denied"),
        ("rcpt carl@example.org", ""),
    ],
)
def test_an_entry_refuses_what_it_is_about(lists: tuple[Path, Path], line: str, reason: str) -> None:
    deny, _ = lists
    deny.write_text(f"# who is not let in\n\n{line}\n")
    with Harness(Access, AccessSettings(deny)) as harness:
        played = harness.deliver(helo="mail.client.example")
    verdict = played.verdict(Stage.RCPT)
    assert verdict.reason == reason
    assert verdict.reply == (DENIED if reason else None)
    assert played.reply.code == (550 if reason else 250)
    if reason:
        assert verdict.evidence is not None
        assert verdict.evidence.lines()[0].startswith("the deny list has ")


def test_networks_of_ipv6_and_the_null_reverse_path_are_entries_too(lists: tuple[Path, Path]) -> None:
    deny, _ = lists
    deny.write_text("client 2001:db8:1::/48\nsender <>\n")
    with Harness(Access, AccessSettings(deny)) as harness:
        assert harness.deliver(client="2001:db8:1::7").verdict(Stage.RCPT).reason == "client_denied"
        assert harness.deliver(client="2001:db8:2::7").verdict(Stage.RCPT).reason == ""
        assert harness.deliver(mail_from="").verdict(Stage.RCPT).reason == "sender_denied"


def test_the_allow_list_takes_back_what_the_deny_list_says(lists: tuple[Path, Path]) -> None:
    deny, allow = lists
    deny.write_text("client 192.0.2.0/24\n")
    allow.write_text("rcpt postmaster@example.org\n")
    with Harness(Access, AccessSettings(deny, allow)) as harness:
        played = harness.deliver(rcpts=["Postmaster@example.org", "bob@example.org"])
    assert [each.code for each in played.replies] == [250, 250, 550, 250]
    assert played.verdict(Stage.RCPT, "Postmaster@example.org").reason == "rcpt_allowed"


def test_a_refusal_may_be_for_now(lists: tuple[Path, Path]) -> None:
    deny, _ = lists
    deny.write_text("sender client.example\n")
    with Harness(Access, AccessSettings(deny, on_denied=OnDenied.DEFER)) as harness:
        assert harness.deliver().reply == DENIED_NOW


def test_an_address_that_hides_its_clients_is_on_no_list(lists: tuple[Path, Path]) -> None:
    deny, _ = lists
    deny.write_text("client 192.0.2.0/24\n")
    with Harness(Access, AccessSettings(deny)) as harness:
        assert harness.deliver(client=Client(source=AddressSource.HIDDEN)).reply.code == 250
        assert harness.deliver(client=Client(trust=Trust.TRUSTED)).reply.code == 250


def test_a_file_is_read_again_when_it_changes_and_kept_when_it_is_wrong(lists: tuple[Path, Path]) -> None:
    deny, _ = lists
    with Harness(Access, AccessSettings(deny)) as harness:
        assert harness.deliver().reply.code == 250
        for number, (text, code) in enumerate(
            [
                ("client 192.0.2.0/24\n", 550),
                ("nonsense\n", 550),
                ("client 192.0.2.0/33\n", 550),
                ("\n", 250),
            ],
            1,
        ):
            deny.write_text(text)
            os.utime(deny, ns=(number, number))
            harness.clock.advance(6)
            assert harness.deliver().reply.code == code, text
        errors = [
            line.keys["error"] for line in harness.log.of("error") if line.event == "list.reload_failed"
        ]
    assert len(errors) == 2
    assert "deny:1: 'nonsense' is not one of client, helo, sender, rcpt" in errors[0]


@pytest.mark.parametrize(
    "text", ["client", "client 192.0.2.1/24", "sender a@@b", "rcpt -", "who x", "sender \xff"]
)
def test_does_not_start_with_a_wrong_list(lists: tuple[Path, Path], text: str) -> None:
    deny, _ = lists
    deny.write_text(f"\n{text}\n", "latin-1")
    with pytest.raises(ListError, match="deny"):
        Harness(Access, AccessSettings(deny)).deliver()


@given(st.text(max_size=300))
def test_a_line_is_an_entry_or_one_of_two_errors(line: str) -> None:
    try:
        found = parse_entry(line)
    except (ValueError, AddressError):
        return
    assert isinstance(found, Entry)


@given(st.sampled_from(Subject), st.text(max_size=30))
def test_an_entry_written_again_is_the_same(subject: Subject, text: str) -> None:
    try:
        found = parse_entry(f"{subject} {text}")
    except (ValueError, AddressError):
        return
    assert parse_entry(" ".join(found)) == found
