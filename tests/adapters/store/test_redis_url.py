"""URLs of Redis: every form that is documented, and what is said about the others."""

from __future__ import annotations

import pytest

from gateway.adapters.store.redis_url import RedisUrl, Topology, parse_redis_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", RedisUrl(Topology.SINGLE, (("h", 6379),))),
        ("redis://h:1/2", RedisUrl(Topology.SINGLE, (("h", 1),), db=2)),
        ("redis://[2001:db8::1]:1/", RedisUrl(Topology.SINGLE, (("2001:db8::1", 1),))),
        ("redis://:p%40w@h", RedisUrl(Topology.SINGLE, (("h", 6379),), password="p@w")),
        ("redis://u:a:b@h", RedisUrl(Topology.SINGLE, (("h", 6379),), username="u", password="a:b")),
        (
            "rediss://u:p@h?ca_file=/ca.pem&cert_file=/c.pem&key_file=/k.pem",
            RedisUrl(
                Topology.SINGLE,
                (("h", 6379),),
                username="u",
                password="p",
                has_tls=True,
                ca_file="/ca.pem",
                cert_file="/c.pem",
                key_file="/k.pem",
            ),
        ),
        ("redis+unix:///run/r.sock?db=3", RedisUrl(Topology.UNIX, path="/run/r.sock", db=3)),
        (
            "redis+unix://u:p@/run/r.sock",
            RedisUrl(Topology.UNIX, path="/run/r.sock", username="u", password="p"),
        ),
        (
            "redis+sentinel://u:p@a,b:1/main/4?sentinel_username=su&sentinel_password=sp",
            RedisUrl(
                Topology.SENTINEL,
                (("a", 26379), ("b", 1)),
                service="main",
                db=4,
                username="u",
                password="p",
                sentinel_username="su",
                sentinel_password="sp",
            ),
        ),
        (
            "rediss+sentinel://a/main",
            RedisUrl(Topology.SENTINEL, (("a", 26379),), service="main", has_tls=True),
        ),
        ("redis+cluster://a:1,b", RedisUrl(Topology.CLUSTER, (("a", 1), ("b", 6379)))),
        ("rediss+cluster://a/", RedisUrl(Topology.CLUSTER, (("a", 6379),), has_tls=True)),
    ],
)
def test_a_url_says(url: str, expected: RedisUrl) -> None:
    assert parse_redis_url(url) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://hunter2@h", "user:password"),
        ("redis://a,b", "several hosts"),
        ("redis://h:port", "host:port"),
        ("redis://h:0", "host:port"),
        ("redis://:hunter2@:6379", "host:port"),
        ("redis://h/x", "is a number"),
        ("redis://h/-1", "is a number"),
        ("redis://h?ca_file=/x", "it has none"),
        ("rediss://h?verify=no", "ca_file, cert_file, key_file"),
        ("redis+cluster://a/0", "no databases"),
        ("redis+sentinel://a", "must name the service"),
        ("redis+sentinel://a/main/x", "is a number"),
        ("redis+unix://h/run/r.sock", "must name a socket"),
        ("redis+unix:///", "must name a socket"),
    ],
)
def test_a_bad_url_is_explained_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_redis_url(url)
    assert "hunter2" not in str(raised.value)


def test_what_is_printed_has_no_password() -> None:
    assert "secret" not in repr(parse_redis_url("redis+sentinel://u:secret@h/m?sentinel_password=secret"))
