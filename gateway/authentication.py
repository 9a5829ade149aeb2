"""Who a client of submission is: credentials go to a back-end, and whoever guesses is slowed, counted and cut.

No passwords are kept here. A back-end says who the user is, that it is nobody, or that it cannot say (454, never 535).

- A failure takes time: its reply is due a whole number of `failure_delay_s` behind the attempt, so that neither the
  reply nor its time tells whether there is such a user.
- Attempts are counted in the store by client and by user before the back-end is asked, and taken back unless it
  refuses: attempts at the same moment, or that are given up, cannot slip through. Beyond a limit the back-end is not
  asked any more, the client gets 421, and the session ends.
- A user who has logged in from a network keeps that for 30 days: from there neither what others do to the user's name
  nor what others do behind the same address locks the user out. The failures of that user there have a count of
  their own, behind the back-end's answer, so that many sessions may begin at once.

Names are kept in the store as digests only, since people type passwords into the wrong box.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address, ip_network
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

from gateway.errors import GatewayError
from gateway.policy import OnError
from gateway.session import AddressSource
from gateway.smtp import reply
from gateway.store import StoreDownError

if TYPE_CHECKING:
    from gateway.services import Instruments
    from gateway.session import Session
    from gateway.smtp.reply import Reply
    from gateway.smtp.sasl import Credentials
    from gateway.store import Keyspace, Operation

# Part of the keys in the store, so never to be changed.
STORE_NAME = "auth"
_KNOWN_TTL_S = 30 * 86_400.0
_IPV6_PREFIX = 64
# What the log shows of a name
_LOGGED_CHARACTERS = 64
_OUTCOMES = ("accepted", "refused", "limited", "unavailable")


class AuthUnavailableError(GatewayError):
    """The back-end cannot say now; the text is for the log and holds nothing of the credentials."""


class Backend(Protocol):
    """Where passwords are known."""

    async def check(self, credentials: Credentials, session: Session) -> str | None:
        """The user's name in the back-end's form, None when it refuses. Raises AuthUnavailableError."""


@dataclass(frozen=True, slots=True)
class AuthenticationSettings:
    """What the operator decides; see docs/configure.md, [submission.auth]."""

    timeout_s: float = 20.0
    failure_delay_s: float = 2.0
    failure_window_s: float = 3600.0
    max_failures_per_client: int = 20
    max_failures_per_user: int = 20


@dataclass(frozen=True, slots=True)
class Judged:
    """The answer to an attempt: `user` is None unless it succeeded; `close` ends the session behind the reply."""

    reply: Reply
    user: str | None = None
    close: bool = False


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt: whether there were too many before, and what the store is told of its end."""

    is_over: bool
    when_right: tuple[Operation[Any], ...] = ()
    when_wrong: tuple[Operation[Any], ...] = ()
    when_unknown: tuple[Operation[Any], ...] = ()


class Authenticator:
    """All attempts of a worker. `sleep` is asyncio's but in tests."""

    def __init__(
        self,
        settings: AuthenticationSettings,
        backend: Backend,
        store: Keyspace,
        instruments: Instruments,
        *,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._store = store
        self._log = instruments.log
        self._clock = instruments.clock.monotonic
        self._sleep = sleep
        attempts = instruments.metrics.counters(
            "mxgate_auth_attempts_total", "Attempts to authenticate by what came of them", ("outcome",)
        )
        self._attempts = {outcome: attempts.labels(outcome) for outcome in _OUTCOMES}

    async def judge(self, credentials: Credentials, session: Session) -> Judged:
        """Whether the client is who it says; takes its time when it is not."""
        begun = self._clock()
        outcome, error, user = "unavailable", "", None
        try:
            attempt = await self._count(credentials, session)
        except StoreDownError as exc:
            attempt, error = _Attempt(is_over=False), f"state: {exc}"
        if attempt.is_over:
            outcome = "limited"
            # an attempt that nobody looked at is no failure, least of all of the user's name
            await self._record(attempt.when_unknown)
        elif not error:
            try:
                user = await self._ask(credentials, session)
                outcome = "refused" if user is None else "accepted"
                await self._record(attempt.when_wrong if user is None else attempt.when_right)
            except AuthUnavailableError as exc:
                error = str(exc)
                await self._record(attempt.when_unknown)
        self._attempts[outcome].inc()
        if user is not None:
            self._log.info(
                "auth.accepted",
                session=session.id,
                client=str(session.client),
                user=user[:_LOGGED_CHARACTERS],
            )
            return Judged(reply.AUTH_OK, user)
        who = {
            "session": session.id,
            "client": str(session.client),
            "user": credentials.user[:_LOGGED_CHARACTERS],
        }
        if error:
            self._log.error("auth.unavailable", **who, error=error)
            return Judged(reply.AUTH_UNAVAILABLE)
        if attempt.is_over:
            self._log.warning("auth.limited", **who)
            await self._pause(begun)
            return Judged(reply.TOO_MANY_AUTH_FAILURES, close=True)
        self._log.warning("auth.refused", **who)
        await self._pause(begun)
        return Judged(reply.AUTH_REFUSED)

    async def _ask(self, credentials: Credentials, session: Session) -> str | None:
        # RFC 4616 2: nobody acts for somebody else here. Refused like a wrong password.
        if not credentials.user or credentials.authzid not in ("", credentials.user):
            return None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._backend.check(credentials, session) or None
        except TimeoutError as exc:
            raise AuthUnavailableError("it did not answer in time") from exc
        except AuthUnavailableError:
            raise
        except Exception as exc:  # a defect of ours is no failure of the user's
            # without its text, in which nobody has looked for the password
            raise AuthUnavailableError(f"defect: {type(exc).__name__}") from exc

    async def _count(self, credentials: Credentials, session: Session) -> _Attempt:
        """Count the attempt, and find out whether there were too many. Raises StoreDownError."""
        settings, store = self._settings, self._store
        user = _digest(credentials.user.casefold())
        # an address that hides its clients is nobody's: it has no count, and no user is known from there
        is_hidden = session.address_source is AddressSource.HIDDEN
        place = "" if is_hidden else _network(session)
        known, pair = f"known:{user}:{place}", f"pair:{user}:{place}"
        limits = {f"user:{user}": settings.max_failures_per_user}
        if place:
            limits[f"client:{place}"] = settings.max_failures_per_client
        keep = (store.put(known, b"1", ttl_s=_KNOWN_TTL_S),) if place else ()

        def add(key: str, amount: int = 1) -> Operation[int]:
            return store.add(key, amount, ttl_s=settings.failure_window_s)

        try:
            if place:
                is_known, failures = await store.ask_together(store.get(known), store.get(pair))
                if is_known is not None:
                    is_over = int(failures or b"0") >= settings.max_failures_per_user
                    return _Attempt(is_over, keep, (add(pair),))
            counts = await store.ask_together(*map(add, limits))
        except StoreDownError as exc:
            if exc.on_outage is OnError.DEFER:
                raise
            return _Attempt(is_over=False)
        is_over = any(count > most for count, most in zip(counts, limits.values(), strict=True))
        back = tuple([add(key, -1) for key in limits])
        return _Attempt(is_over, (*back, *keep), (), back)

    async def _record(self, operations: tuple[Operation[Any], ...]) -> None:
        """Tell the store; one that is out of reach now changes nothing for the client."""
        if not operations:
            return
        try:
            await self._store.ask_together(*operations)
        except StoreDownError as exc:
            self._log.warning("auth.not_recorded", error=str(exc))

    async def _pause(self, begun: float) -> None:
        """Wait until a whole number of delays is over since the attempt began."""
        delay_s = self._settings.failure_delay_s
        if delay_s:
            spent_s = self._clock() - begun
            await self._sleep(delay_s * max(1, ceil(spent_s / delay_s)) - spent_s)


def _network(session: Session) -> str:
    """Whose attempts are counted together: an IPv4 address, an IPv6 /64."""
    client = session.client
    if isinstance(client, IPv4Address):
        return str(client)
    return str(ip_network((client, _IPV6_PREFIX), strict=False))


def _digest(name: str) -> str:
    return blake2b(name.encode(), digest_size=16).hexdigest()
