"""gateway.open_store: which store a configuration becomes, for which policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import State
from gateway.open_store import WorkerStore
from gateway.policy import NoSettings, Policy
from gateway.store import StoreError
from tests.fakes import FakeServices

TTL_S = 600.0


class Forgets(Policy[NoSettings]):
    name = "forgets"


class Remembers(Policy[NoSettings]):
    name = "remembers"
    needs_store = True


class RemembersToo(Remembers):
    name = "remembers_too"


def make(url: str, *policies: type[Policy[NoSettings]], **keys: str) -> WorkerStore:
    return WorkerStore(State.model_validate({"url": url, **keys}), policies, FakeServices())


async def test_nothing_is_opened_where_no_policy_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = make(f"sqlite://{path}", Forgets)
    await store.start()
    assert not path.exists()
    assert store.detail() is None
    keys = store.for_policy(Forgets)
    with pytest.raises(RuntimeError, match="needs_store"):
        await keys.ask(keys.get("a"))
    with pytest.raises(RuntimeError, match="needs_store"):
        await keys.scan()
    await store.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_each_policy_has_its_own_part(tmp_path: Path, kind: str) -> None:
    url = "memory:" if kind == "memory" else f"sqlite://{tmp_path}/state.db"
    store = make(url, Remembers, RemembersToo, Forgets, key_prefix="mx1:")
    await store.start()
    first, second = (store.for_policy(each) for each in (Remembers, RemembersToo))
    await first.ask(first.put("a", b"1", ttl_s=TTL_S))
    assert await second.ask(second.get("a")) is None
    await second.ask(second.put("a", b"2", ttl_s=TTL_S))
    assert [(entry.key, entry.value) for entry in (await first.scan()).entries] == [("a", b"1")]
    assert store.detail() == {"kind": kind, "up": True, "last_error": ""}
    assert store._store is not None
    found = (await store._store.scan("mx1:remembers:", "", 10)).entries
    assert [entry.key for entry in found] == ["mx1:remembers:a"]
    with pytest.raises(RuntimeError):
        await store.for_policy(Forgets).scan()
    await store.close()


async def test_a_file_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    store = make(f"sqlite://{tmp_path}/nowhere/state.db", Remembers)
    with pytest.raises(StoreError, match=r"nowhere/state\.db: No such file"):
        await store.start()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+cluster://127.0.0.1:1"])
async def test_redis_that_is_not_there_is_none(url: str) -> None:
    store = make(url, Remembers)
    await store.start()
    assert store.detail() == {"kind": url.partition(":")[0], "up": False, "last_error": "connect"}
    keys = store.for_policy(Remembers)
    assert await keys.ask(keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
    assert await keys.ask(keys.get("a")) == b"1"
    await store.close()


def test_limits_of_keys_values_and_times() -> None:
    keys = make("memory:", Remembers).for_policy(Remembers)
    room = 512 - len("mxgate:remembers:")
    keys.get("x" * room)
    for key in ("x" * (room + 1), "ä" * (room // 2 + 1), "\ud800"):
        with pytest.raises(ValueError, match=r"512 octets|surrogates"):
            keys.get(key)
    with pytest.raises(ValueError, match="4096 octets"):
        keys.put("a", b"x" * 4097, ttl_s=TTL_S)
    for ttl_s in (0, -1, float("nan"), float("inf"), 400 * 86_400):
        with pytest.raises(ValueError, match="1 ms to 366 days"):
            keys.add("a", ttl_s=ttl_s)
