"""How a real Redis is reached: TLS, a user with few rights, a password, a database, a socket; and a key's time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from gateway.store import Keyspace, StoreError
from tests.adapters.store.conftest import redis_store
from tests.e2e.net import LOOPBACK, free_port
from tests.e2e.redis import RedisServer

pytestmark = pytest.mark.e2e

TTL_S = 600.0
# docs/operate.md says so, too
RIGHTS = "+get +set +del +eval +incrby +pttl +pexpire +scan +select"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With a CA and a server's certificate."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = ca.issue_cert(LOOPBACK)
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(tmp_path / "cert.pem"), append=True)
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    return tmp_path


@pytest.fixture
def server(directory: Path) -> Iterator[RedisServer]:
    """One that has it all; its plain port is for the test."""
    tls_port = free_port()
    made = RedisServer(
        f"user mx on >p@ss ~mxgate:* -@all {RIGHTS}",
        f"unixsocket {directory}/redis.sock",
        f"tls-port {tls_port}",
        f"tls-cert-file {directory}/cert.pem",
        f"tls-key-file {directory}/key.pem",
        f"tls-ca-cert-file {directory}/ca.pem",
        "tls-auth-clients no",
    )
    made.tls_port = tls_port
    yield made
    made.close()


async def assert_works(url: str) -> None:
    store = redis_store(url)
    keys = Keyspace(store, "mxgate:t:")
    try:
        await keys.ask(keys.delete("a"))
        assert await keys.ask(keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
        assert await keys.ask_together(keys.add("a", ttl_s=TTL_S), keys.get("a")) == (2, b"2")
        assert await keys.ask(keys.replace("a", b"2", b"3", ttl_s=TTL_S))
    finally:
        await store.close()


async def reason(url: str) -> str:
    store = redis_store(url)
    keys = Keyspace(store, "mxgate:t:")
    try:
        with pytest.raises(StoreError) as raised:
            await keys.ask(keys.put("a", b"1", ttl_s=TTL_S))
    finally:
        await store.close()
    return raised.value.reason


async def test_a_user_with_few_rights_is_enough(server: RedisServer) -> None:
    await assert_works(f"redis://mx:p%40ss@{LOOPBACK}:{server.port}/0")


async def test_a_user_without_the_right_to_a_key(server: RedisServer) -> None:
    store = redis_store(f"redis://mx:p%40ss@{LOOPBACK}:{server.port}/0")
    keys = Keyspace(store, "other:")
    with pytest.raises(StoreError, match="auth"):
        await keys.ask(keys.get("a"))
    await store.close()


async def test_a_wrong_password(server: RedisServer) -> None:
    assert await reason(f"redis://mx:wrong@{LOOPBACK}:{server.port}/0") == "auth"


async def test_a_database_and_a_socket(server: RedisServer, directory: Path) -> None:
    await assert_works(f"redis+unix://mx:p%40ss@{directory}/redis.sock?db=3")
    assert "db3:keys=1" in server.ask("INFO", "keyspace")


async def test_tls(server: RedisServer, directory: Path) -> None:
    url = f"rediss://mx:p%40ss@{LOOPBACK}:{server.tls_port}/0"
    await assert_works(f"{url}?ca_file={directory}/ca.pem")
    # a certificate that is not valid is refused
    assert await reason(f"{url}?ca_file={directory}/other.pem") == "connect"
    assert await reason(url) == "connect"


async def test_every_key_ends(redis_server: RedisServer) -> None:
    """Whatever sets a key gives it its time."""
    store = redis_store(redis_server.url)
    keys = Keyspace(store, "mxgate:ends:")
    await keys.ask_together(
        keys.put("put", b"1", ttl_s=TTL_S),
        keys.put_if_absent("absent", b"1", ttl_s=TTL_S),
        keys.add("add", ttl_s=TTL_S),
        keys.add("renewed", ttl_s=TTL_S, renew=True),
        keys.put("replaced", b"1", ttl_s=TTL_S),
        keys.replace("replaced", b"1", b"2", ttl_s=TTL_S),
    )
    # somebody else's key without an end gets one when it is counted
    redis_server.ask("SET", "mxgate:ends:foreign", "5")
    assert await keys.ask(keys.add("foreign", ttl_s=TTL_S)) == 6
    for key in ("put", "absent", "add", "renewed", "replaced", "foreign"):
        left = re.fullmatch(r":(-?\d+)\r\n", redis_server.ask("TTL", f"mxgate:ends:{key}"))
        assert left is not None
        assert TTL_S - 20 < int(left[1]) <= TTL_S, key
    await store.close()
