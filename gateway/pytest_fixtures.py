"""The kit's fixtures for pytest; they come by the entry point group pytest11 where mxgate is installed.

    def test_defers_on_sunday(mxgate_harness):
        played = mxgate_harness(NoMailOnSunday).deliver()

Every run of pytest beside mxgate imports this module, so it stands outside `gateway.testing` and imports the gateway
only when a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gateway.testing import FakeClock, FakeServices, Harness, Zone


@pytest.fixture
def mxgate_zone() -> Callable[[str], Zone]:
    """DNS from zone text: `mxgate_zone('example.org. 60 IN TXT "v=spf1 -all"')`."""
    from gateway.testing import Zone  # noqa: PLC0415  # runs of pytest that never ask for it do not pay

    return Zone.parse


@pytest.fixture
def mxgate_services() -> FakeServices:
    """Services of one's own, for a policy without a harness."""
    from gateway.testing import FakeServices  # noqa: PLC0415  # as above

    return FakeServices()


@pytest.fixture
def mxgate_clock(mxgate_services: FakeServices) -> FakeClock:
    """The clock of `mxgate_services`."""
    return mxgate_services.clock


@pytest.fixture
def mxgate_harness() -> Iterator[Callable[..., Harness[Any]]]:
    """Makes harnesses (see gateway.testing.Harness) that are closed with the test."""
    from gateway.testing import Harness  # noqa: PLC0415  # as above

    made: list[Harness[Any]] = []

    def make(*args: Any, **kwargs: Any) -> Harness[Any]:
        made.append(Harness(*args, **kwargs))
        return made[-1]

    yield make
    for harness in made:
        harness.close()
