"""The watches of one message: what sees the body while it arrives, of policies (`Policy.on_header`) and for them.

None of them can touch the content: what one raises, or that it keeps the loop busy for longer than its deadline, is
kept here as a failure that counts at EOM, and the watch gets no more blocks. The pipeline makes it, the gatekeeper
feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gateway.smtp.content import Unstuffer

if TYPE_CHECKING:
    from gateway.mail.digest import BodyDigests
    from gateway.policy import Watch

T = TypeVar("T")


class Failure(NamedTuple):
    """How a policy failed: a label of mxgate_policy_failures_total, and the text for the log."""

    how: str
    error: str


class Watching:
    """The watches of one message, each by the key of its policy.

    `failures` are those that failed so far. `on_step` is told how many seconds each call took.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_step: Callable[[Any, float], None],
        *,
        is_stuffed: bool,
    ) -> None:
        self.failures: dict[Hashable, Failure] = {}
        self._clock = clock
        self._on_step = on_step
        self._watches: dict[Hashable, Watch] = {}
        self._left_s: dict[Hashable, float] = {}
        self._digests: BodyDigests | None = None
        # the body begins at the start of a line
        self._unstuffer = Unstuffer() if is_stuffed else None

    def add(self, key: Hashable, limit_s: float, make: Callable[[], Watch | None]) -> None:
        """Ask one policy; its watch may keep the loop busy for `limit_s` seconds in all."""
        self._left_s[key] = limit_s
        watch = self._call(key, make)
        if watch is None or key in self.failures:
            return
        if all(callable(getattr(watch, method, None)) for method in ("block", "end")):
            self._watches[key] = watch
        else:
            self.failures[key] = Failure("verdict", f"on_header returned {type(watch).__name__}")

    def add_digests(self, digests: BodyDigests) -> None:
        """Feed the digests of the message where all who were asked want some of them."""
        if digests.is_wanted:
            self._digests = digests

    def __bool__(self) -> bool:
        """Whether there is anything to feed, or a watch that failed."""
        return bool(self._watches or self.failures or self._digests)

    def feed(self, block: bytes) -> None:
        """The next block of the body, as it came on the wire."""
        if self._unstuffer is not None:
            block = self._unstuffer.feed(block)
        if not block:
            return
        if self._digests is not None:
            self._hash(self._digests.block, block)
        for key, watch in tuple(self._watches.items()):
            self._call(key, watch.block, block)

    def end(self) -> None:
        """The body is complete."""
        if self._digests is not None:
            self._hash(self._digests.end)
        for key, watch in tuple(self._watches.items()):
            self._call(key, watch.end)

    def _hash(self, function: Callable[..., None], *args: bytes) -> None:
        try:
            function(*args)
        except Exception:  # noqa: BLE001  # a defect of ours; whoever wants a digest finds none and fails for it
            self._digests = None

    def _call(self, key: Hashable, function: Callable[..., T], *args: bytes) -> T | None:
        begun = self._clock()
        result = None
        failure = None
        try:
            result = function(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # noqa: BLE001  # the barrier around a stranger's code
            failure = Failure("exception", repr(exc))
        took_s = self._clock() - begun
        self._left_s[key] -= took_s
        self._on_step(key, took_s)
        if failure is None and self._left_s[key] < 0:
            failure = Failure("timeout", "its watch kept the loop busy for longer than its deadline")
        if failure is not None:
            self.failures[key] = failure
            self._watches.pop(key, None)
        return result
