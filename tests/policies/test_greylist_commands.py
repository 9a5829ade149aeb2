"""mxgate greylist: what it shows and changes, on a store that the test owns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import pytest
from click.testing import CliRunner, Result

from gateway.cli import cli
from gateway.store import Keyspace
from gateway.testing import FakeStore
from policies.greylist_commands import greylist
from policies.verify.greylist.ledger import Ledger
from policies.verify.greylist.state import RECENT_S, Timing
from tests.fakes import FakeClock

T = TypeVar("T")
NET, DOMAIN = "192.0.2.0/24", "example.com"


class Context:
    """What the command line gives: a store, and the greylist that works on it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.fake = FakeStore(self.clock)
        self.keys = Keyspace(self.fake, "mxgate:greylist:")
        self.ledger = Ledger(self.keys, Timing())
        self.asked_for = ""

    def store(self, policy: str) -> Context:
        self.asked_for = policy
        return self

    def run(self, use: Callable[[Keyspace], Awaitable[T]]) -> T:
        async def used() -> T:
            return await use(self.keys)

        return asyncio.run(used())

    def attempt(self, origin: str, sender: str, rcpt: str = "bob@example.org") -> None:
        key = f"t {origin} {sender} {rcpt}"

        async def attempted() -> None:
            await self.ledger.attempts(await self.ledger.standings([origin]), [key], self.clock.now())

        asyncio.run(attempted())


@pytest.fixture
def context() -> Context:
    """Two that wait, one that passed, and what it earned."""
    made = Context()
    made.attempt(NET, "ann@example.net")
    made.clock.advance(300)
    made.attempt(NET, "ann@example.net")
    made.attempt(NET, "dan@example.net", "carl@example.org")
    made.attempt(DOMAIN, "news@example.com")
    return made


def run(context: Context, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(greylist, [*arguments], obj=context, standalone_mode=False)
    if isinstance(result.exception, click.UsageError):
        assert code == 64, result.exception.format_message()
        return result
    assert result.exception is None, result.exception
    assert result.return_value == code, result.output
    return result


def listed(context: Context, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(context, *arguments, "--json", code=code).stdout)
    return found


def test_list_shows_who_waits_who_passed_and_who_is_known(context: Context) -> None:
    assert {each["sender"] for each in listed(context, "list", "--waiting")} == {
        "dan@example.net",
        "news@example.com",
    }
    (passed,) = listed(context, "list", "--passed")
    assert (passed["first"], passed["rcpt"]) == ("2023-11-14T22:13:20Z", "bob@example.org")
    (known,) = listed(context, "list", "--known")
    assert (known["origin"], known["passes"], known["allowed"]) == (NET, 1, False)
    assert len(listed(context, "list")) == 4
    assert len(listed(context, "list", "--limit", "2")) == 2
    assert context.asked_for == "greylist"
    text = run(context, "list").stdout
    assert "ann@example.net to bob@example.org  first attempt 2023-11-14T22:13:20Z" in text
    assert f"known    {NET}  1 came back in time  ends in {35 * 86_400} s" in text


@pytest.mark.parametrize(
    ("who", "senders"),
    [
        ("192.0.2.77", {"ann@example.net", "dan@example.net"}),
        ("192.0.2.0/28", {"ann@example.net", "dan@example.net"}),
        ("mail.example.com", {"news@example.com"}),
        ("dan@example.net", {"dan@example.net"}),
        ("bob@example.org", {"ann@example.net", "news@example.com"}),
        ("BOB@example.org", {"ann@example.net", "news@example.com"}),
    ],
)
def test_show_tells_what_is_known_of_somebody(context: Context, who: str, senders: set[str]) -> None:
    assert {each["sender"] for each in listed(context, "show", who) if "sender" in each} == senders


def test_show_and_forget_tell_scripts_that_nothing_is_there(context: Context) -> None:
    assert listed(context, "show", "203.0.113.1", code=1) == []
    run(context, "forget", "example.net", code=1)


def test_what_is_allowed_is_shown_and_ends(context: Context) -> None:
    run(context, "allow", "www.example.com", "--days", "3")
    (known,) = [each for each in listed(context, "show", DOMAIN) if each["state"] == "known"]
    assert (known["allowed"], known["ends_in_s"]) == (True, 3 * 86_400)
    context.clock.advance(3 * 86_400 + 1)
    assert [each for each in listed(context, "show", DOMAIN, code=1) if each["state"] == "known"] == []


@pytest.mark.parametrize(
    "who", ["ann@example.net", "co.uk", "0.0.0.0/0", "192.0.0.0/16", "2001:db8::/48", "not a domain", "a@b@c"]
)
def test_what_anybody_could_say_or_be_is_not_allowed(context: Context, who: str) -> None:
    before = context.fake.entries
    run(context, "allow", who, code=64)
    assert context.fake.entries == before


def test_forget_makes_a_first_attempt_of_the_next_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[tuple[float, int]] = []

    async def sleep(seconds: float) -> None:
        waited.append((seconds, len(context.fake.entries)))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    before = len(context.fake.entries)
    assert run(context, "forget", "192.0.2.1").stdout == "3 entries forgotten\n"
    assert [each["origin"] for each in listed(context, "list")] == [DOMAIN]
    # behind it no worker has the network in mind
    assert waited == [(RECENT_S, before - 3)]
    run(context, "forget", "bob@example.org")
    assert len(waited) == 1  # triplets are never kept in mind


def test_stats_count_by_day_who_came_back(context: Context) -> None:
    found = json.loads(run(context, "stats", "--json").stdout)
    day = {"day": "2023-11-14", "first": 3, "back": 1}
    assert found == {"waiting": 2, "passed": 1, "known": 1, "days": [day]}
    assert "2023-11-14  first attempts 3, came back in time 1" in run(context, "stats").stdout


def test_no_terminal_is_written_to_by_strangers(context: Context) -> None:
    context.attempt(NET, "b\x9b31m\u202ed@example.net")
    assert run(context, "list").stdout.isascii()


def cli_with(tmp_path: Path, url: str) -> Result:
    file = tmp_path / "mxgate.toml"
    file.write_text(
        'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'
        f'relay.routes = [{{downstream = ["192.0.2.5:25"]}}]\nstate.url = "{url}"\n'
    )
    return CliRunner().invoke(cli, ["--config", str(file), "greylist", "list"])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory:", "state.url is memory:, which is inside of each worker"),
        ("sqlite://{}/state.db", "is not there yet"),
        ("redis://127.0.0.1:1/0", "connect"),
    ],
)
def test_a_store_that_cannot_be_looked_into_is_said_with_1(tmp_path: Path, url: str, said: str) -> None:
    result = cli_with(tmp_path, url.format(tmp_path))
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert not (tmp_path / "state.db").exists()
