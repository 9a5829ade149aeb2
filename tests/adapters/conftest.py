"""In which event loops the tests of the adapters run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
# Both loops differ in what becomes of a socket that had an error.
_IN_BOTH = {"test_dns_contract.py", "test_dns_stub.py"}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asked by pytest-asyncio for each test."""
    return LOOPS if item.path.name in _IN_BOTH else {"asyncio": asyncio.new_event_loop}
