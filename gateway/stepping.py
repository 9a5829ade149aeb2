"""A coroutine is stepped once, here and now, and becomes a task only if it suspends.

Most hooks of most policies finish without waiting for anything; a task and a turn of the loop for each of them
would cost more than the hooks themselves. The pipeline and the gatekeeper call `step`.

What a coroutine sees is the same whether it suspends or not: its own context, and one task from its first line to its
last as asyncio.current_task(), so that asyncio.timeout(), TaskGroup, aiohttp and redis-py work in it.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")


class Timed(Coroutine[Any, Any, T]):
    """A coroutine that measures how long its steps kept the loop busy, but for the first `skip` of them.

    `busy_s` is the sum, `longest_s` the longest; seconds of the clock.
    """

    __slots__ = ("_clock", "_coro", "_skip", "busy_s", "longest_s")

    def __init__(self, coro: Coroutine[Any, Any, T], clock: Callable[[], float], *, skip: int = 0) -> None:
        self._coro = coro
        self._clock = clock
        self._skip = skip
        self.busy_s = self.longest_s = 0.0

    def send(self, value: Any) -> Any:
        begun = self._clock()
        try:
            return self._coro.send(value)
        finally:
            self._took(self._clock() - begun)

    def throw(self, *exc: Any) -> Any:
        begun = self._clock()
        try:
            return self._coro.throw(*exc)
        finally:
            self._took(self._clock() - begun)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("it is stepped by a task")

    def _took(self, seconds: float) -> None:
        if self._skip:
            self._skip -= 1
            return
        self.busy_s += seconds
        self.longest_s = max(self.longest_s, seconds)


if sys.version_info >= (3, 12):

    def step(
        coro: Coroutine[Any, Any, T],
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] | None = None,
    ) -> T | asyncio.Task[T]:
        """Run the first step of `coro` on the running `loop`.

        Returns its result if it has finished, and a task that goes on with it if it suspended; raises what it raised.
        (A result that is itself a task cannot be told apart: no coroutine that is stepped returns one.) With a
        `clock`, get_coro() of the task is a Timed that measures its further steps.
        """
        task = asyncio.Task(Timed(coro, clock, skip=1) if clock else coro, loop=loop, eager_start=True)
        return task.result() if task.done() else task

else:
    # What asyncio.current_task() reads. It is private, and there to stay: 3.11 gets security fixes only.
    from asyncio.tasks import _current_tasks  # type: ignore[attr-defined]  # typeshed leaves private names out

    def step(
        coro: Coroutine[Any, Any, T],
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] | None = None,
    ) -> T | asyncio.Task[T]:
        """Run the first step of `coro` on the running `loop`.

        Returns its result if it has finished, and a task that goes on with it if it suspended; raises what it raised.
        (A result that is itself a task cannot be told apart: no coroutine that is stepped returns one.) With a
        `clock`, get_coro() of the task is a Timed that measures its further steps.
        """
        # Python 3.11 has no eager tasks. This one is allocated, so that it can be the current task, but it takes no
        # part in the loop before __init__, which is called only if the coroutine suspends.
        task: asyncio.Task[T] = asyncio.Task.__new__(asyncio.Task)
        outer = _current_tasks.get(loop)
        _current_tasks[loop] = task
        context = copy_context()
        try:
            awaited = context.run(coro.send, None)
        except StopIteration as stop:
            if task._must_cancel:  # type: ignore[attr-defined]  # noqa: SLF001  # as above
                # It cancelled itself and did not suspend any more: a cancellation, as in asyncio.
                raise asyncio.CancelledError from None
            result: T = stop.value
            return result
        finally:
            if outer is None:
                del _current_tasks[loop]
            else:
                _current_tasks[loop] = outer
        requests = task.cancelling()
        rest: Coroutine[Any, Any, T] = _rest(coro, awaited)
        rest.send(None)
        if clock is not None:
            rest = Timed(rest, clock)
        task.__init__(rest, loop=loop, context=context)  # type: ignore[misc]  # see above
        for _ in range(requests):
            task.cancel()
        return task

    @types.coroutine
    def _rest(coro: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
        """The rest of a coroutine that already yielded `awaited`; its own first step does nothing.

        So it has begun when the task gets it, and a cancellation before the task's first step reaches the coroutine.
        """
        result: T
        to_yield = None
        while True:
            try:
                yield to_yield
            except BaseException as exc:  # noqa: BLE001  # whatever it is, it is the coroutine's
                try:
                    awaited = to_yield = coro.throw(exc)
                except StopIteration as stop:
                    result = stop.value
                    return result
            else:
                if to_yield is awaited:
                    result = yield from coro
                    return result
                to_yield = awaited
