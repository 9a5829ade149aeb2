"""relay_guard: mail for others is never taken from a stranger, whatever the address looks like."""

from __future__ import annotations

import os
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api import ListError
from gateway.policy import OnError
from gateway.session import AddressSource, Envelope, Recipient, Session, Transaction, Trust
from gateway.smtp.address import AddressError, Domain, parse_forward_path
from gateway.verdict import Stage, Verdict, defer, proceed, reject
from policies.relay_guard import (
    CLIENT_HIDDEN,
    NO_SUCH_RECIPIENT,
    RELAYING_DENIED,
    ROUTING_DENIED,
    RelayGuard,
    RelayGuardSettings,
)
from tests.fakes import FakeServices

DENIED = reject("relaying_denied", RELAYING_DENIED)
ROUTING = reject("routing", ROUTING_DENIED)
UNKNOWN = reject("unknown_recipient", NO_SUCH_RECIPIENT)


def test_refusals_have_the_codes_that_senders_know() -> None:
    # RFC 5321 4.2.3, RFC 3463 3.8 and 3.2
    assert [(each.code, each.enhanced) for each in (RELAYING_DENIED, ROUTING_DENIED, NO_SUCH_RECIPIENT)] == [
        (550, "5.7.1"),
        (550, "5.7.1"),
        (550, "5.1.1"),
    ]
    assert (CLIENT_HIDDEN.code, CLIENT_HIDDEN.enhanced) == (451, "4.7.1")


def transaction(trust: Trust = Trust.UNTRUSTED) -> Transaction:
    session = Session("S", ip_address("127.0.0.1"), 1234, trust=trust)
    return Transaction("S-1", session, Envelope(None))


def run(guard: RelayGuard, rcpt: Recipient, trust: Trust = Trust.UNTRUSTED) -> Verdict:
    """The verdict on one recipient; it comes without waiting for anything."""
    try:
        guard.on_rcpt(transaction(trust), rcpt).send(None)
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict
    raise AssertionError("the guard suspended")


def ask(guard: RelayGuard, mailbox: str, trust: Trust = Trust.UNTRUSTED) -> Verdict:
    return run(guard, Recipient(parse_forward_path(f"<{mailbox}>", smtputf8=True)), trust)


def guard_of(*domains: str) -> RelayGuard:
    return RelayGuard(RelayGuardSettings(domains), FakeServices())


class Files:
    """A guard whose lists are in files, which tests write."""

    def __init__(self, folder: Path) -> None:
        self.services = FakeServices()
        self.domains, self.recipients = folder / "domains", folder / "recipients"
        self._written = 0

    def write(self, path: Path, text: str) -> None:
        path.write_text(text, "utf-8")
        # a file system's clock may be too coarse to tell two writes of a test apart
        self._written += 1
        os.utime(path, ns=(self._written, self._written))

    async def start(self, *domains: str) -> RelayGuard:
        settings = RelayGuardSettings(
            domains,
            self.domains if self.domains.exists() else None,
            self.recipients if self.recipients.exists() else None,
        )
        guard = RelayGuard(settings, self.services)
        await guard.start()
        return guard

    def later(self) -> None:
        self.services.clock.advance(5.1)

    @property
    def errors(self) -> list[str]:
        return [str(line.keys["error"]) for line in self.services.log.of("error")]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# --- domains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "mailbox", "is_ours"),
    [
        ("example.org", "b@example.org", True),
        ("example.org", "b@EXAMPLE.Org", True),
        ("EXAMPLE.org", "b@example.org", True),
        ("example.org", "b@sub.example.org", False),
        ("example.org", "b@notexample.org", False),
        ("example.org", "b@example.org.evil.example", False),
        ("example.org", "b@org", False),
        (".example.org", "b@example.org", False),
        (".example.org", "b@sub.example.org", True),
        (".Example.org", "b@a.b.SUB.example.org", True),
        (".example.org", "b@notexample.org", False),
        (".example.org", "b@org", False),
        ("bücher.example", "b@xn--bcher-kva.example", True),
        ("xn--bcher-kva.example", "b@bücher.example", True),
        (".bücher.example", "b@sub.xn--bcher-kva.example", True),
        ("xn--bcher-kva.example", "b@bucher.example", False),
    ],
)
def test_ours_are_exact_names_and_subdomains_in_whatever_form(
    entry: str, mailbox: str, is_ours: bool
) -> None:
    assert ask(guard_of("other.example", entry), mailbox) == (proceed() if is_ours else DENIED)


def test_nothing_is_ours_without_domains() -> None:
    assert ask(guard_of(), "b@example.org") == DENIED


@pytest.mark.parametrize("literal", ["[192.0.2.1]", "[127.0.0.1]", "[IPv6:2001:db8::1]"])
def test_address_literals_are_never_ours(literal: str) -> None:
    assert ask(guard_of("example.org", ".example.org"), f"b@{literal}") == DENIED
    assert ask(guard_of("example.org"), f"postmaster@{literal}") == DENIED


@pytest.mark.parametrize(
    "entry", ["", ".", "exa mple.org", "*.example.org", "..example.org", "192.0.2.1", "@example.org"]
)
def test_what_is_no_domain_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(AddressError):
        guard_of(entry)


@pytest.mark.parametrize("mailbox", ["postmaster", "Postmaster", "POSTMASTER"])
def test_postmaster_without_a_domain_is_ours(mailbox: str) -> None:
    assert ask(guard_of("example.org"), mailbox) == proceed()


# --- trust ------------------------------------------------------------------------------------------------


async def test_an_address_that_hides_its_clients_is_not_trusted_and_nobody_is_blamed_for_it() -> None:
    guard = guard_of("example.org")
    hidden = replace(transaction(Trust.TRUSTED).session, address_source=AddressSource.HIDDEN)

    async def verdict(mailbox: str, session: Session) -> Verdict:
        rcpt = Recipient(parse_forward_path(f"<{mailbox}>", smtputf8=False))
        return await guard.on_rcpt(Transaction("T", session, Envelope(None)), rcpt)

    assert await verdict("b@example.org", hidden) == proceed()
    assert await verdict("b@example.net", hidden) == defer("client_hidden", CLIENT_HIDDEN)
    # who proved who it is needs no address, and a stranger is a stranger
    assert await verdict("b@example.net", replace(hidden, trust=Trust.AUTHENTICATED)) == proceed()
    assert await verdict("b@example.net", replace(hidden, trust=Trust.UNTRUSTED)) == DENIED


@pytest.mark.parametrize("trust", [Trust.TRUSTED, Trust.AUTHENTICATED])
@pytest.mark.parametrize(
    "mailbox", ["b@elsewhere.example", "b%elsewhere.example@example.org", "b@[192.0.2.1]"]
)
def test_trusted_clients_may_send_anywhere(trust: Trust, mailbox: str) -> None:
    assert ask(guard_of("example.org"), mailbox, trust) == proceed()
    assert ask(guard_of("example.org"), mailbox) != proceed()


# --- sender-specified routing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "local",
    [
        "b%elsewhere.example",
        "elsewhere.example!b",
        '"b@elsewhere.example"',
        r'"b\@elsewhere.example"',
        r'"b\%elsewhere.example"',
        '"@elsewhere.example:b"',
        '"elsewhere.example!b"',
    ],
)
def test_routing_in_the_local_part_is_refused_from_strangers(local: str) -> None:
    assert ask(guard_of("example.org"), f"{local}@example.org") == ROUTING
    assert ask(guard_of("example.org"), f"{local}@elsewhere.example") == DENIED


@pytest.mark.parametrize("local", ["b", "b+tag", '"b c"', "a=b", "prvs=1/b", "bücher", "a.b", "#1", "{b}"])
def test_other_local_parts_are_the_destinations_own_matter(local: str) -> None:
    assert ask(guard_of("example.org"), f"{local}@example.org") == proceed()


LOCALS = st.from_regex(r'[a-z%!=+.]{1,8}|"[a-z@%!:\\ ]{0,8}"', fullmatch=True)
LABELS = st.sampled_from(["example", "org", "sub", "evil", "xn--bcher-kva", "bücher", "com", "ours"])
DOMAINS = st.lists(LABELS, min_size=1, max_size=4).map(".".join) | st.just("[192.0.2.1]")


@given(LOCALS, DOMAINS)
@example("a", "org.example.org")
@example("a", "example.org.example")
def test_nothing_outside_our_domains_ever_proceeds_for_a_stranger(local: str, domain: str) -> None:
    try:
        mailbox = parse_forward_path(f"<{local}@{domain}>", smtputf8=True)
    except AddressError:
        return
    guard = guard_of("example.org", ".example.org", "bücher.example")

    verdict = run(guard, Recipient(mailbox))

    name = str(mailbox.domain)
    ours = name in ("example.org", "xn--bcher-kva.example") or name.endswith(".example.org")
    routed = any(character in mailbox.local for character in "%!@")
    assert (verdict == proceed()) is (ours and not routed)
    assert ours or verdict == DENIED


# --- lists in files -----------------------------------------------------------------------------------------


async def test_domains_of_the_file_are_ours_too(files: Files) -> None:
    files.write(
        files.domains, "# our customers\n\nOne.example  # since 2020\n.two.example\r\nbücher.example\n"
    )
    guard = await files.start("example.org")

    for mailbox in ("b@example.org", "b@one.example", "b@a.two.example", "b@xn--bcher-kva.example"):
        assert ask(guard, mailbox) == proceed()
    for mailbox in ("b@two.example", "b@since.example", "b@a.one.example"):
        assert ask(guard, mailbox) == DENIED


async def test_only_recipients_of_the_file_exist(files: Files) -> None:
    files.write(
        files.recipients,
        '# all\nB@example.org\n"c d"@Example.org # quoted\nü@bücher.example\n"e"@example.org\n',
    )
    guard = await files.start("example.org", "bücher.example")

    for mailbox in (
        "b@example.org",
        "B@EXAMPLE.org",
        '"b"@example.org',
        '"c d"@example.org',
        "e@example.org",
    ):
        assert ask(guard, mailbox) == proceed()
    assert ask(guard, "Ü@xn--bcher-kva.example") == proceed()
    for mailbox in ("d@example.org", "b@bücher.example", "all@example.org"):
        assert ask(guard, mailbox) == UNKNOWN


async def test_a_recipient_of_the_file_need_not_be_ours(files: Files) -> None:
    files.write(files.recipients, "b@elsewhere.example\n")

    assert ask(await files.start("example.org"), "b@elsewhere.example") == DENIED


async def test_postmaster_exists_in_each_of_our_domains(files: Files) -> None:
    files.write(files.recipients, "")
    guard = await files.start("example.org")

    for mailbox in (
        "postmaster",
        "postmaster@example.org",
        "PostMaster@example.org",
        '"postmaster"@example.org',
    ):
        assert ask(guard, mailbox) == proceed()
    assert ask(guard, "postmaster@elsewhere.example") == DENIED


async def test_trusted_clients_are_not_held_to_the_recipients_file(files: Files) -> None:
    files.write(files.recipients, "")

    assert ask(await files.start("example.org"), "b@example.org", Trust.TRUSTED) == proceed()


async def test_files_are_read_again_when_they_changed_and_no_more_often_than_every_5_s(files: Files) -> None:
    files.write(files.domains, "one.example\n")
    files.write(files.recipients, "b@one.example\nb@two.example\n")
    guard = await files.start()
    assert ask(guard, "b@one.example") == proceed()

    files.write(files.domains, "two.example\n")
    files.write(files.recipients, "c@two.example\n")
    assert ask(guard, "b@one.example") == proceed()
    assert ask(guard, "b@two.example") == DENIED
    files.later()

    assert ask(guard, "b@one.example") == DENIED
    assert ask(guard, "b@two.example") == UNKNOWN
    assert ask(guard, "c@two.example") == proceed()
    assert files.errors == []


async def test_domains_of_the_configuration_stay_when_the_file_changes(files: Files) -> None:
    files.write(files.domains, "one.example\n")
    guard = await files.start("example.org")
    files.write(files.domains, "# none\n")
    files.later()

    assert ask(guard, "b@one.example") == DENIED
    assert ask(guard, "b@example.org") == proceed()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("one.example\nno domain\n", r"domains:2: 'no domain' is no domain"),
        ("b@one.example\n", "domains:1: "),
        ("\x00", "domains:1: "),
    ],
)
async def test_a_file_that_became_wrong_changes_nothing_and_is_logged(
    files: Files, text: str, error: str
) -> None:
    files.write(files.domains, "one.example\n")
    guard = await files.start()

    files.write(files.domains, text)
    files.later()

    assert ask(guard, "b@one.example") == proceed()
    assert len(files.errors) == 1
    assert error in files.errors[0]
    files.write(files.domains, "two.example\n")
    files.later()
    assert ask(guard, "b@two.example") == proceed(), "repaired"


async def test_a_file_that_is_gone_changes_nothing_and_is_logged(files: Files) -> None:
    files.write(files.recipients, "b@example.org\n")
    guard = await files.start("example.org")

    files.recipients.unlink()
    files.later()

    assert ask(guard, "b@example.org") == proceed()
    assert ask(guard, "c@example.org") == UNKNOWN
    assert len(files.errors) == 1
    assert "No such file" in files.errors[0]


async def test_a_file_that_is_no_text_changes_nothing_and_is_logged(files: Files) -> None:
    files.write(files.domains, "one.example\n")
    guard = await files.start()

    files.domains.write_bytes(b"\xff\xfe")
    files.later()

    assert ask(guard, "b@one.example") == proceed()
    assert len(files.errors) == 1


@pytest.mark.parametrize("name", ["domains", "recipients"])
async def test_does_not_start_with_a_wrong_file(files: Files, name: str) -> None:
    files.write(getattr(files, name), "fine.example\n" if name == "domains" else "b@fine.example\n")
    guard = await files.start()
    files.write(getattr(files, name), "good.example\n!\n" if name == "domains" else "b@good.example\n!\n")
    with pytest.raises(ListError, match=f"{name}:2: "):
        await guard.start()

    getattr(files, name).unlink()
    with pytest.raises(FileNotFoundError):
        await guard.start()


# --- the policy ---------------------------------------------------------------------------------------------


def test_fails_closed_and_speaks_at_rcpt_only() -> None:
    assert RelayGuard.on_error is OnError.DEFER
    assert RelayGuard.stages() == {Stage.RCPT}
    assert RelayGuard.name == "relay_guard"


def test_is_ours_knows_domains_only() -> None:
    guard = guard_of("example.org")

    assert guard.is_ours(Domain("example.org"))
    assert not guard.is_ours("example.org")
    assert not guard.is_ours(None)
