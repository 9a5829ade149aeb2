"""Who keeps a worker's loop busy: read out of a stack as faulthandler writes it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest

from gateway.blocked import StackPipe, culprit, places
from gateway.policy import NoSettings, Policy
from gateway.session import Transaction
from gateway.verdict import Verdict, proceed
from tests.e2e.net import wait_until
from tests.fakes import FakeServices


def helper() -> None:
    raise NotImplementedError


class First(Policy[NoSettings]):
    name = "first"

    async def on_mail(self, tx: Transaction) -> Verdict:
        return next(proceed() for _ in range(3))

    async def on_eom(self, tx: Transaction) -> Verdict:
        helper()
        return proceed()


class Heir(First):
    name = "heir"

    async def on_eom(self, tx: Transaction) -> Verdict:
        return await super().on_eom(tx)


FILE = __file__
HEAD = "Stack (most recent call first):\n"


def frame(line: int, function: str = "on_eom", file: str = FILE) -> str:
    return f'  File "{file}", line {line} in {function}\n'


def line_of(function: Callable[..., object]) -> int:
    return function.__code__.co_firstlineno


FIRST = places([First(NoSettings(), FakeServices())])
MAIL, EOM = line_of(First.on_mail) + 1, line_of(First.on_eom) + 1


def test_a_hook_is_told_with_its_stage() -> None:
    stack = HEAD + frame(7, "sleep", "/usr/lib/time.py") + frame(EOM) + frame(1, "run", "/x/pipeline.py")
    found = culprit(stack, FIRST)
    assert (found.policy, found.stage) == ("first", "eom")
    assert found.frames == ("/usr/lib/time.py:7 sleep", f"{FILE}:{EOM} on_eom", "/x/pipeline.py:1 run")
    assert culprit(HEAD + frame(MAIL), FIRST).stage == "mail"


def test_what_a_hook_calls_in_its_own_file_is_its_own() -> None:
    found = culprit(HEAD + frame(line_of(helper) + 1, "helper") + frame(EOM), FIRST)
    assert (found.policy, found.stage) == ("first", "eom")


def test_a_watch_is_told_by_its_file_only() -> None:
    assert culprit(HEAD + frame(1, "block"), FIRST)[:2] == ("first", "")


def test_a_hook_that_is_inherited_is_of_the_policy_that_runs() -> None:
    known = places([Heir(NoSettings(), FakeServices())])
    assert culprit(HEAD + frame(EOM), known)[:2] == ("heir", "eom")


@pytest.mark.parametrize(
    "stack", ["", HEAD, "nonsense", HEAD + frame(1, "run", "/x/app.py"), HEAD + "  ...\n"]
)
def test_nobody_is_named_where_nobody_stands(stack: str) -> None:
    assert culprit(stack, FIRST)[:2] == ("", "")


def test_many_frames_are_not_all_shown() -> None:
    assert len(culprit(HEAD + frame(EOM) * 100, FIRST).frames) < 10


def test_a_process_says_where_it_is_in_the_middle_of_a_regular_expression() -> None:
    pipe = StackPipe()
    pid = os.fork()
    if pid == 0:
        pipe.offer()
        pipe.theirs.send(b"ready\n")
        re.match(r"(a+)+$", "a" * 60 + "b")
        os._exit(1)
    try:
        assert wait_until(pipe.read, within_s=10, what="the child is ready").startswith("ready")
        deadline, found = time.monotonic() + 10, ""
        while "match" not in found and time.monotonic() < deadline:
            os.kill(pid, signal.SIGUSR2)
            found += wait_until(pipe.read, within_s=10, what="its stack")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pipe.theirs.close()
        pipe.close()
    assert "in test_a_process_says_where_it_is" in found
