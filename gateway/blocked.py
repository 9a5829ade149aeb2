"""Which policy keeps a worker's loop busy: the supervisor asks for the stack of a worker that says nothing.

A signal makes the worker write where it is, by faulthandler: in C, so that it works in the middle of a regular
expression or of another library too, and costs nothing while all is well. The worker has said before which lines
belong to which hook of which policy; the innermost of them that stands in the stack names the policy.
"""

from __future__ import annotations

import faulthandler
import inspect
import re
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from gateway.policy import Policy

SIGNAL = signal.SIGUSR2
# As faulthandler writes it, the innermost first; what is not ASCII in a name is escaped
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_MAX_STACK_BYTES = 64 * 1024
# Enough for the way from a policy to what it waits for
_SHOWN_FRAMES = 6


class Place(NamedTuple):
    """Lines of a file that belong to a policy, and its stage when they are a hook's ("" for all the rest)."""

    policy: str
    stage: str
    file: str
    first: int
    last: int


class Frame(NamedTuple):
    """A line that a worker is at, or came by."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


class Culprit(NamedTuple):
    """What keeps a worker busy: a policy and its stage, both "" when it is none; the innermost frames."""

    policy: str
    stage: str
    frames: tuple[str, ...]


class StackPipe:
    """The way of a worker's stack to the supervisor; made before the fork."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        # a signal handler must not wait for a reader
        self.theirs.setblocking(False)

    def offer(self) -> None:
        """In the worker: answer the signal from now on."""
        faulthandler.register(SIGNAL, file=self.theirs.fileno(), all_threads=False, chain=False)

    def close(self) -> None:
        """In the supervisor: the worker has ended."""
        self.ours.close()

    def read(self) -> str:
        """What a worker wrote; "" when it wrote nothing yet."""
        try:
            return self.ours.recv(_MAX_STACK_BYTES).decode("ascii", "replace")
        except OSError:
            return ""


def places(policies: Iterable[Policy[Any]]) -> list[Place]:
    """The lines of each policy: of its hooks, and of its whole file."""
    found: list[Place] = []
    for policy in policies:
        of_class = type(policy)
        for base in of_class.__mro__:
            if base in (Policy, object):
                continue
            found += [
                Place(
                    policy.name,
                    name.removeprefix("on_"),
                    _ascii(code.co_filename),
                    code.co_firstlineno,
                    max(_lines(code)),
                )
                for name, value in vars(base).items()
                if name.startswith("on_") and isinstance(value, FunctionType)
                for code in [value.__code__]
            ]
        try:
            file = inspect.getfile(of_class)
        except (OSError, TypeError):  # made at run time, by exec or in C
            continue
        found.append(Place(policy.name, "", _ascii(file), 0, 2**31))
    return found


def culprit(stack: str, known: Sequence[Place]) -> Culprit:
    """Who stands in the stack."""
    frames = [Frame(file, int(line), function) for file, line, function in _FRAME.findall(stack)]
    shown = tuple(map(str, frames[:_SHOWN_FRAMES]))
    hooks = [place for place in known if place.stage]
    for candidates in (hooks, known):
        for frame in frames:
            for place in candidates:
                if place.file == frame.file and place.first <= frame.line <= place.last:
                    return Culprit(place.policy, place.stage, shown)
    return Culprit("", "", shown)


def _lines(code: CodeType) -> Iterator[int]:
    yield code.co_firstlineno
    yield from (line for _, _, line in code.co_lines() if line is not None)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _lines(inner)


def _ascii(file: str) -> str:
    return file.encode("ascii", "backslashreplace").decode("ascii")
