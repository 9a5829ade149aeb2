"""stepping: the first step is synchronous, and the coroutine cannot tell."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from gateway.stepping import Timed, step

PLACE = contextvars.ContextVar("PLACE", default="outside")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Runs a coroutine function on one of the two loops."""

    def run_on_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return run_on_loop


Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def step_here(coro: Coroutine[Any, Any, Any]) -> Any:
    return step(coro, asyncio.get_running_loop())


def step_and_suspend(coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = step_here(coro)
    assert isinstance(task, asyncio.Task)
    return task


def test_gives_the_result_at_once_when_nothing_suspends(run: Run) -> None:
    async def main() -> None:
        async def work() -> int:
            return 1

        before = asyncio.all_tasks()
        assert step_here(work()) == 1
        assert asyncio.all_tasks() == before

    run(main)


def test_raises_at_once_when_nothing_suspends(run: Run) -> None:
    async def main() -> None:
        async def work() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            step_here(work())

    run(main)


def test_goes_on_as_a_task_when_it_suspends(run: Run) -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def work() -> int:
            return await future + 1

        task = step_and_suspend(work())
        assert not task.done()
        future.set_result(1)
        assert await task == 2

    run(main)


def test_goes_on_after_a_bare_yield(run: Run) -> None:
    async def main() -> None:
        async def work() -> int:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return 2

        assert await step_and_suspend(work()) == 2

    run(main)


def test_a_future_that_fails_is_raised_in_the_coroutine(run: Run) -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        second: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def work() -> int:
            try:
                return await future
            except KeyError:
                return await second

        task = step_and_suspend(work())
        future.set_exception(KeyError("x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.set_result(3)
        assert await task == 3

    run(main)


def test_an_exception_after_the_first_step_is_the_tasks(run: Run) -> None:
    async def main() -> None:
        async def work() -> None:
            await asyncio.sleep(0)
            raise KeyError("x")

        with pytest.raises(KeyError):
            await step_and_suspend(work())

    run(main)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_cancellation_reaches_the_coroutine(run: Run, turns: int) -> None:
    async def main() -> None:
        seen = []
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            try:
                await future
            except asyncio.CancelledError:
                seen.append("cancelled")
                await asyncio.sleep(0)
                seen.append("cleaned up")
                raise

        task = step_and_suspend(work())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled", "cleaned up"]

    run(main)


def test_a_coroutine_may_cancel_itself_in_its_first_step(run: Run) -> None:
    async def main() -> None:
        async def work(*, suspends: bool) -> None:
            task = asyncio.current_task()
            assert task is not None
            assert task.cancel()
            assert task.cancelling() == 1
            if suspends:
                await asyncio.sleep(0)

        with pytest.raises(asyncio.CancelledError):
            step_here(work(suspends=False))
        task = step_and_suspend(work(suspends=True))
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


@pytest.mark.parametrize("suspends", [False, True])
def test_current_task_is_one_and_the_same_throughout(run: Run, suspends: bool) -> None:
    async def main() -> None:
        outer = asyncio.current_task()
        seen = []

        async def inner() -> None:
            seen.append(asyncio.current_task())

        async def work() -> None:
            seen.append(asyncio.current_task())
            step_here(inner())
            seen.append(asyncio.current_task())
            if suspends:
                await asyncio.sleep(0)
            seen.append(asyncio.current_task())

        result = step_here(work())
        assert asyncio.current_task() is outer
        if suspends:
            assert isinstance(result, asyncio.Task)
            await result
            assert result is seen[0]
        assert seen[0] is seen[2] is seen[3]
        assert len({id(task) for task in (outer, *seen)}) == 3

    run(main)


def test_steps_outside_of_any_task(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        results: asyncio.Future[Any] = loop.create_future()

        async def work() -> bool:
            return asyncio.current_task() is not None

        def callback() -> None:
            assert asyncio.current_task() is None
            results.set_result(step(work(), loop))
            assert asyncio.current_task() is None

        loop.call_soon(callback)
        assert await results is True

    run(main)


@pytest.mark.parametrize("suspends", [False, True])
def test_timeout_in_the_first_step(run: Run, suspends: bool) -> None:
    async def main() -> None:
        async def in_time() -> int:
            async with asyncio.timeout(60):
                if suspends:
                    await asyncio.sleep(0)
            return 1

        result = step_here(in_time())
        assert (await result if suspends else result) == 1

        async def too_late() -> str:
            if suspends:
                await asyncio.sleep(0)
            try:
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
            except TimeoutError:
                task = asyncio.current_task()
                assert task is not None
                return f"timed out {task.cancelling()}"
            return ""

        assert await step_and_suspend(too_late()) == "timed out 0"

    run(main)


@pytest.mark.parametrize("suspends", [False, True])
def test_task_group_in_the_first_step(run: Run, suspends: bool) -> None:
    async def main() -> None:
        async def fails() -> None:
            raise KeyError("x")

        async def work() -> str:
            if suspends:
                await asyncio.sleep(0)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fails())
                    await asyncio.Event().wait()
            except* KeyError:
                pass
            await asyncio.sleep(0)  # no cancellation is left over
            return "went on"

        assert await step_and_suspend(work()) == "went on"

    run(main)


def test_has_its_own_context_throughout(run: Run) -> None:
    async def main() -> None:
        async def work(*, suspends: bool) -> None:
            token = PLACE.set("inside")
            if suspends:
                await asyncio.sleep(0)
            assert PLACE.get() == "inside"
            PLACE.reset(token)

        step_here(work(suspends=False))
        task = step_and_suspend(work(suspends=True))
        assert PLACE.get() == "outside"
        await task

    run(main)


def test_leaves_nothing_behind(run: Run) -> None:
    async def main() -> None:
        tasks = []

        async def work() -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(weakref.ref(task))

        step_here(work())
        gc.collect()
        assert tasks[0]() is None

    run(main)


def test_measures_the_steps_behind_the_first(run: Run) -> None:
    async def main() -> None:
        now = 100.0

        async def work() -> str:
            nonlocal now
            now += 7  # whoever steps can measure that
            await asyncio.sleep(0)
            now += 2
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                now += 3
            await asyncio.sleep(0)
            return "done"

        stepped = step(work(), asyncio.get_running_loop(), lambda: now)
        assert isinstance(stepped, asyncio.Task)
        timed = stepped.get_coro()
        assert isinstance(timed, Timed)
        assert (timed.busy_s, timed.longest_s) == (0, 0)
        for _ in range(3):
            await asyncio.sleep(0)
        stepped.cancel()
        assert await stepped == "done"
        assert (timed.busy_s, timed.longest_s) == (5, 3)

    run(main)


def test_nothing_is_measured_of_what_does_not_suspend(run: Run) -> None:
    async def main() -> None:
        async def work() -> str:
            return "done"

        assert step(work(), asyncio.get_running_loop(), lambda: 0.0) == "done"

    run(main)


def test_what_is_measured_can_be_closed_and_not_awaited() -> None:
    async def work() -> None:
        return

    timed = Timed(work(), lambda: 0.0)
    with pytest.raises(TypeError, match="stepped by a task"):
        timed.__await__()
    timed.close()
