"""sender_login: reverse-path and authors belong to the user, by the name or by the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.api import ListError, Reply, Stage, Trust
from gateway.testing import Client, Harness, PolicyContract
from gateway.testing.mail import compose
from policies.sender_login import (
    NO_AUTHOR,
    NOT_OWN_AUTHOR,
    NOT_OWN_SENDER,
    SenderLogin,
    SenderLoginSettings,
)

ANN = Client(trust=Trust.AUTHENTICATED, user="ann@example.org")


class TestContract(PolicyContract):
    policy = SenderLogin


def client(user: str) -> Client:
    return Client(trust=Trust.AUTHENTICATED, user=user)


def answer(
    user: str, mail_from: str, author: str | bytes | None = None, settings: SenderLoginSettings | None = None
) -> Reply | None:
    """What the policy refuses it with, None when nothing. `author` is the From field, or the whole message."""
    message = author if isinstance(author, bytes) else compose(author or mail_from)
    with Harness(SenderLogin, settings) as harness:
        played = harness.deliver(message, client=client(user), mail_from=mail_from)
    return None if played.message is not None else played.reply


@pytest.mark.parametrize(
    ("user", "mail_from"),
    [
        ("ann@example.org", "ann@example.org"),
        ("Ann@Example.ORG", "ann@example.org"),
        ("ann@example.org", "ANN@EXAMPLE.org"),
        ("j\u00fcrgen@example.org", "J\u00dcRGEN@example.org"),
        ("ann@b\u00fccher.example", "ann@xn--bcher-kva.example"),
        ('"a b"@example.org', '"a b"@example.org'),
        ("a.b@example.org", '"a.b"@example.org'),
    ],
)
def test_the_address_that_equals_the_name_is_the_users(user: str, mail_from: str) -> None:
    assert answer(user, mail_from) is None


@pytest.mark.parametrize(
    ("user", "mail_from"),
    [
        ("ann@example.org", "bob@example.org"),
        ("ann@example.org", "ann@example.net"),
        ("ann@example.org", "ann@sub.example.org"),
        ("ann@example.org", "ann+tag@example.org"),
        ("ann", "ann@example.org"),
        ("example.org", "ann@example.org"),
        ("@example.org", "ann@example.org"),
        ("ann@example.org,bob@example.org", "bob@example.org"),
        ("postmaster", "ann@example.org"),
        ("weiss@example.org", "wei\u00df@example.org"),
        ("wei\u00df@example.org", "weiss@example.org"),
        ("ann@example.org", "a\u017f@example.org"),
    ],
)
def test_every_other_is_not(user: str, mail_from: str) -> None:
    assert answer(user, mail_from) == NOT_OWN_SENDER


def test_a_name_without_a_domain_has_the_default_one() -> None:
    settings = SenderLoginSettings(default_domain="example.org")
    assert answer("ann", "ann@example.org", settings=settings) is None
    assert answer("ann", "ann@example.net", settings=settings) == NOT_OWN_SENDER
    assert answer("ann@example.net", "ann@example.org", settings=settings) == NOT_OWN_SENDER


def test_the_null_reverse_path_is_everybodys_and_the_author_is_not() -> None:
    assert answer("ann@example.org", "", "ann@example.org") is None
    assert answer("ann@example.org", "", "bob@example.org") == NOT_OWN_AUTHOR


@pytest.mark.parametrize(
    ("author", "refusal"),
    [
        ("Ann <ann@example.org>", None),
        ('"bob@example.org" <ann@example.org>', None),
        ("ann@example.org, Ann <ANN@example.org>", None),
        ("bob@example.org", NOT_OWN_AUTHOR),
        ("ann@example.org, bob@example.org", NOT_OWN_AUTHOR),
        ("bob@example.net, ann@example.org", NOT_OWN_AUTHOR),
        ("ann@example.org <bob@example.org>", NO_AUTHOR),
        ("team: ann@example.org;", NO_AUTHOR),
        (b"Subject: x\r\n\r\n", NO_AUTHOR),
        (b"From: ann@example.org\r\nFrom: bob@example.org\r\n\r\n", NO_AUTHOR),
        (b"From : bob@example.org\r\n\r\n", NO_AUTHOR),
    ],
)
def test_all_authors_are_the_users(author: str | bytes, refusal: Reply | None) -> None:
    assert answer("ann@example.org", "ann@example.org", author) == refusal


def test_authors_are_not_looked_at_where_the_operator_says_so() -> None:
    settings = SenderLoginSettings(check_from=False)
    assert answer("ann@example.org", "ann@example.org", "bob@example.org", settings) is None


def test_who_has_not_authenticated_is_not_its_business() -> None:
    with Harness(SenderLogin) as harness:
        played = harness.deliver(compose("bob@example.org"), mail_from="ann@example.net")
    assert played.message is not None


MAP = """\
# who may write as whom
Info@Example.org    ann@example.org  Bob@example.org
bob@example.org     ann@example.org         # not Bob any more
@example.net        ann@example.org
boss@example.net    bob@example.org
info@example.org    carl
"""


@pytest.fixture
def mapped(tmp_path: Path) -> SenderLoginSettings:
    file = tmp_path / "map"
    file.write_text(MAP, encoding="utf-8")
    return SenderLoginSettings(map_file=file)


@pytest.mark.parametrize(
    ("user", "mail_from", "is_own"),
    [
        ("ann@example.org", "info@example.org", True),
        ("bob@example.org", "INFO@example.org", True),
        ("carl", "info@example.org", True),
        ("dan@example.org", "info@example.org", False),
        ("ann@example.org", "ann@example.org", True),
        # a line for an address says all about it
        ("bob@example.org", "bob@example.org", False),
        ("ann@example.org", "bob@example.org", True),
        # one for a domain adds to what is each user's own
        ("ann@example.org", "anybody@example.net", True),
        ("ann@example.org", "boss@example.net", False),
        ("bob@example.org", "boss@example.net", True),
        ("dan@example.net", "dan@example.net", True),
        ("ann@example.org", "x@sub.example.net", False),
    ],
)
def test_the_file_says_who_owns_what(
    mapped: SenderLoginSettings, user: str, mail_from: str, is_own: bool
) -> None:
    assert (answer(user, mail_from, settings=mapped) is None) is is_own


def test_the_file_is_read_again(mapped: SenderLoginSettings) -> None:
    assert mapped.map_file is not None
    with Harness(SenderLogin, mapped) as harness:

        def is_own(mail_from: str) -> bool:
            harness.clock.advance(10)
            played = harness.deliver(compose(mail_from), client=ANN, mail_from=mail_from)
            return played.message is not None

        assert is_own("info@example.org")
        mapped.map_file.write_text("info@example.org bob\n", encoding="utf-8")
        os.utime(mapped.map_file, (1, 1))
        assert not is_own("info@example.org")
        # a bad file changes nothing
        mapped.map_file.write_text("info@example.org\n", encoding="utf-8")
        assert not is_own("info@example.org")
        assert is_own("ann@example.org")
        assert [line.event for line in harness.log.of("error")] == ["list.reload_failed"] * 2


@pytest.mark.parametrize(
    "line", ["info@example.org", "info ann", "@ ann", "@a..b ann", "a@b@c ann", "<a@b> ann"]
)
def test_a_line_that_says_nothing_is_told(tmp_path: Path, line: str) -> None:
    file = tmp_path / "map"
    file.write_text(f"ok@example.org ann\n{line}\n", encoding="utf-8")
    with (
        Harness(SenderLogin, SenderLoginSettings(map_file=file)) as harness,
        pytest.raises(ListError) as caught,
    ):
        harness.deliver()
    assert str(caught.value).startswith(f"{file}:2: ")


def test_a_default_domain_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="default_domain"):
        SenderLoginSettings(default_domain="a b")


def test_the_refusal_of_a_sender_is_a_verdict_at_mail() -> None:
    with Harness(SenderLogin) as harness:
        played = harness.deliver(client=ANN, mail_from="bob@example.org")
    assert played.verdict(Stage.MAIL).reason == "not_own_sender"
