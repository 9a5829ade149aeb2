"""arrivals: when a balancer is seen that hides its clients."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from gateway.arrivals import SourceWatch, origin_of
from tests.fakes import FakeClock

BALANCER = ip_address("10.0.0.1")


class Watched:
    """A watch whose clock a test owns."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.watch = SourceWatch(self.clock.monotonic)

    def see(self, client: IPv4Address | IPv6Address, times: int = 1) -> None:
        for _ in range(times):
            self.watch.saw(client, origin_of(client))

    def see_public(self, times: int) -> None:
        for number in range(times):
            self.see(IPv4Address(0xC6336400 + number % 256))


@pytest.fixture
def watched() -> Watched:
    return Watched()


# --- the source watch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "172.31.0.1", "192.168.9.9", "100.64.0.1", "169.254.1.1", "fd00::1", "fe80::1"],
)
def test_a_private_address_that_most_clients_come_from_hides_them(watched: Watched, address: str) -> None:
    watched.see(ip_address(address), 99)
    assert watched.watch.hidden_by is None
    assert watched.watch.share == 0.0

    watched.see(ip_address(address))

    assert watched.watch.hidden_by == ip_address(address)
    assert watched.watch.share == 1.0


@pytest.mark.parametrize("address", ["192.0.2.1", "172.32.0.1", "100.128.0.1", "2001:db8::1"])
def test_a_public_address_hides_nobody(watched: Watched, address: str) -> None:
    watched.see(ip_address(address), 2000)

    assert watched.watch.hidden_by is None
    assert watched.watch.share == 0.0


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.2.1", "::1"])
def test_loopback_is_not_counted(watched: Watched, address: str) -> None:
    watched.see(ip_address(address), 2000)
    assert watched.watch.hidden_by is None

    watched.see(BALANCER, 90)
    watched.see_public(10)

    assert watched.watch.share == 0.9


def test_it_begins_at_90_percent_and_ends_below_80(watched: Watched) -> None:
    watched.see_public(11)
    watched.see(BALANCER, 98)
    assert watched.watch.hidden_by is None
    watched.see(BALANCER)
    assert watched.watch.hidden_by == BALANCER  # 99 of 110

    watched.see_public(13)
    assert watched.watch.hidden_by == BALANCER  # 99 of 123
    watched.see_public(1)
    assert watched.watch.hidden_by is None  # 99 of 124


def test_many_private_clients_are_clients(watched: Watched) -> None:
    for number in range(2000):
        watched.see(IPv4Address(0x0A000000 + number % 20))

    assert watched.watch.hidden_by is None
    assert watched.watch.share == 0.05


def test_only_the_last_1000_count(watched: Watched) -> None:
    watched.see_public(5000)
    watched.see(BALANCER, 899)
    assert watched.watch.hidden_by is None

    watched.see(BALANCER)
    assert watched.watch.look() == BALANCER
    assert watched.watch.share == 0.9

    watched.see(BALANCER, 5000)
    watched.see_public(200)
    assert watched.watch.hidden_by == BALANCER
    watched.see_public(1)
    assert watched.watch.hidden_by is None
    watched.see_public(1000)
    assert watched.watch.share == 0.0
    assert watched.watch._counts == {}


def test_another_balancer_takes_over(watched: Watched) -> None:
    other = ip_address("fd00::2")
    watched.see(BALANCER, 1000)

    watched.see(other, 899)
    assert watched.watch.hidden_by is None
    watched.see(other)

    assert watched.watch.hidden_by == other


def test_a_day_of_silence_ends_it_and_the_next_client_begins_it_again(watched: Watched) -> None:
    watched.see(BALANCER, 200)
    watched.clock.advance(86_400)
    assert watched.watch.look() == BALANCER

    watched.clock.advance(1)
    assert watched.watch.look() is None
    assert watched.watch.look() is None

    watched.see(BALANCER)
    assert watched.watch.look() == BALANCER


def test_clients_that_come_keep_it(watched: Watched) -> None:
    for _ in range(300):
        watched.see(BALANCER)
        watched.clock.advance(80_000)
        watched.watch.look()

    assert watched.watch.hidden_by == BALANCER
