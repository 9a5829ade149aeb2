"""gateway.pytest_fixtures: they are there for whoever runs pytest beside mxgate, and cost nothing until then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gateway.api import NoSettings, Policy, Transaction, Verdict, proceed
from gateway.testing import FakeClock, FakeServices, Harness, Zone


class Stops(Policy[NoSettings]):
    name = "stops"
    stopped = 0

    async def on_mail(self, tx: Transaction) -> Verdict:
        return proceed()

    async def stop(self) -> None:
        type(self).stopped += 1


def test_a_harness_is_made_with_what_the_test_wants(mxgate_harness: Callable[..., Harness[Any]]) -> None:
    harness = mxgate_harness(Stops, zone='example.org. 60 IN TXT "x"')
    assert harness.deliver().reply.code == 250
    assert [*harness.zone.nodes] == ["example.org", "org"]


def test_harnesses_are_closed_with_their_test(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        "from tests.testing.test_fixtures import Stops\n"
        "def test_one(mxgate_harness):\n"
        "    mxgate_harness(Stops).deliver()\n"
        "def test_two():\n"
        "    assert Stops.stopped == 1\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:randomly", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-c", str(root / "pyproject.toml"), str(test)],
        cwd=root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout


def test_zone_clock_and_services_come_apart_too(
    mxgate_zone: Callable[[str], Zone], mxgate_services: FakeServices, mxgate_clock: FakeClock
) -> None:
    assert mxgate_zone("example.org. 60 IN A 192.0.2.1").nodes
    assert mxgate_services.clock is mxgate_clock


def test_to_be_offered_costs_no_import_of_the_gateway() -> None:
    (point,) = entry_points(group="pytest11", name="mxgate")
    count = "len([name for name in sys.modules if name.startswith('gateway')])"
    code = f"import sys, {point.module}; print({count})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) == 2
