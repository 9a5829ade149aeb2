"""The pod that the chart renders, as a process of this checkout: it serves, and drains as kubelet ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.downstream import Downstream
from tests.e2e.pod import Pod, assert_drains, assert_serves, objects_for, secrets_for, start_by_hand

pytestmark = pytest.mark.e2e


@pytest.fixture
def running(sink: Downstream, tls: Tls, tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(objects_for(sink.address), secrets_for(tls), tmp_path, start_by_hand)
    yield pod
    pod.close()


def test_serves(running: Pod, sink: Downstream, tls: Tls) -> None:
    assert_serves(running, sink, tls)


def test_drains(running: Pod, sink: Downstream) -> None:
    assert_drains(running, sink)
