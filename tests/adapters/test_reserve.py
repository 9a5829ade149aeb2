"""gateway.adapters.reserve: what is used is known, also where there is no /proc."""

import os
import socket

import pytest

from gateway.adapters import reserve
from gateway.adapters.reserve import MAX_RESERVE, Reserve


@pytest.mark.parametrize("has_proc", [True, False])
def test_descriptors_that_are_used_count(has_proc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_proc:

        def listdir(path: str) -> list[str]:
            raise FileNotFoundError(path)

        monkeypatch.setattr(os, "listdir", listdir)
    own = Reserve(10)
    before = reserve._descriptors()
    sockets = [socket.socket() for _ in range(20)]
    try:
        assert reserve._descriptors() >= before + 10
        own.look()
        assert own.short_of == ""
        for _ in range(own.limit):
            own.taken()
        assert own.short_of == "descriptors"
        own.look()
        assert own.short_of == ""
    finally:
        for sock in sockets:
            sock.close()
    assert own.limit > MAX_RESERVE
