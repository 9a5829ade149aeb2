"""The policy contract: the page that plugin authors read first.

A policy is a class with hooks named after the stages of an SMTP session. Each hook returns a Verdict; the
engine merges the verdicts of all policies, the strictest wins. Override only the hooks that are needed: only
those are planned.

    class NoMailOnSunday(Policy[SundaySettings]):
        name = "no_mail_on_sunday"
        Settings = SundaySettings

        async def on_mail(self, tx):
            return defer("sunday", Reply(451, "4.7.1", "Come back on Monday")) if ... else proceed()

One object serves all sessions: keep nothing about a message in attributes, use a Slot. Expected failures are
results; an exception means a bug or a dependency that is down, and the engine handles it (`on_error`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from gateway.verdict import Stage, Verdict, proceed

if TYPE_CHECKING:
    from gateway.mail.message import Header
    from gateway.services import Services
    from gateway.session import Recipient, Session, Transaction, Trust
    from gateway.smtp.reply import Reply

S = TypeVar("S")


class Mode(StrEnum):
    """What becomes of a policy's verdicts: they count, they are recorded only, or the policy is not run."""

    ENFORCE = "enforce"
    OBSERVE = "observe"
    OFF = "off"


class OnError(StrEnum):
    """What becomes of mail when a policy fails: it goes on without that policy, or the client gets a 4xx."""

    CONTINUE = "continue"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class NoSettings:
    """For a policy that has none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the client was told at the end of a transaction, and whether the downstream has the message."""

    reply: Reply
    delivered: bool


class Watch(Protocol):
    """Sees the body of one message while it arrives, without I/O and in no more time than it needs.

    Keep what it found for `on_eom` with a Slot. An exception of it is a failure of its policy at EOM.
    """

    def block(self, data: bytes) -> None:
        """The next octets of the body as the sender meant them (dot-stuffing undone); cut anywhere, at most 64 KiB."""

    def end(self) -> None:
        """The body is complete. Not called where the content is refused before any policy judges it."""


class Policy(Generic[S]):
    """Base of every policy. The class attributes are its declaration."""

    name: ClassVar[str]
    """Entry-point name, `[policy.NAME]`, metric label: [a-z][a-z0-9_]*."""
    Settings: ClassVar[type] = NoSettings
    """A frozen dataclass; each field is documented with `field(metadata={"doc": ...})`."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Policies that must be in the plan and run earlier."""
    after: ClassVar[tuple[str, ...]] = ()
    """Policies that run earlier where they are in the plan. "recipient" is the downstream's own answer at RCPT."""
    method: ClassVar[str | None] = None
    """RFC 8601 method; lets the engine record temperror when the policy fails."""
    on_error: ClassVar[OnError] = OnError.CONTINUE
    """Default for the operator's key of this name."""
    exempt: ClassVar[tuple[Trust, ...]] = ()
    """Default for the operator's key of this name: whom the policy says nothing about."""
    timeout_s: ClassVar[float] = 10.0
    """Default for the operator's key of this name: seconds for one hook."""
    needs_store: ClassVar[bool] = False
    """Whether it uses `services.store`; a store is opened only where a policy of the plan does."""
    needs_http: ClassVar[bool] = False
    """Whether it uses `services.http`; the client is loaded only where a policy of the plan does."""
    calls_out: ClassVar[bool] = False
    """Whether it asks a service by connections of its own. Such a policy, and one with `needs_http`, is not asked again
    where mail is judged from a record or with a zone for the world (`mxgate explain`)."""
    own_fields: ClassVar[tuple[str, ...]] = ()
    """Names of header fields, "X-Mxgate-...", that this policy alone writes. Where it is enforced, one that comes in is
    forged, and is taken out of all mail, also where the policy fails or says nothing."""

    def __init__(self, settings: S, services: Services) -> None:
        self.settings = settings
        self.services = services

    async def start(self) -> None:
        """Runs before the first session. An exception stops the start."""

    async def stop(self) -> None:
        """Runs after the last session."""

    async def on_connect(self, session: Session) -> Verdict:
        """A client has connected; nothing was said yet."""
        return proceed()

    async def on_ehlo(self, session: Session) -> Verdict:
        """EHLO or HELO was given."""
        return proceed()

    async def on_mail(self, tx: Transaction) -> Verdict:
        """MAIL was given: the reverse-path is known."""
        return proceed()

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """RCPT was given; the verdict binds this recipient only, so its results and edits are left out of account."""
        return proceed()

    def on_header(self, tx: Transaction) -> Watch | None:
        """The header is complete and the body begins: who wants to see it arrive returns a Watch. No I/O.

        The place for `tx.message.digests.want(...)` and `services.dns.prefetch(...)`.
        """

    async def on_eom(self, tx: Transaction) -> Verdict:
        """The whole message is here; `tx.results` has what those found that this policy `requires` or comes `after`."""
        return proceed()

    async def on_send(self, tx: Transaction, header: Header) -> Verdict:
        """The message is accepted and leaves with this header, edits of all policies and our own fields included.

        The last word of the stage EOM, for who signs: what its verdict adds stands above all that is signed, and
        nothing is changed behind it. The body is the one whose digests were wanted in `on_header`.
        """
        return proceed()

    async def on_outcome(self, tx: Transaction, outcome: Outcome) -> None:
        """After the reply; cannot change it."""

    @classmethod
    def stages(cls, settings: S | None = None) -> frozenset[Stage]:  # noqa: ARG003 - for those that override it
        """The stages whose hook this policy overrides; on_header and on_send belong to EOM.

        A policy whose settings choose the stage overrides this, so that it takes no time from others elsewhere.
        """
        hooks = {stage for stage in Stage if has_hook(cls, f"on_{stage}")}
        is_at_eom = has_hook(cls, "on_header") or has_hook(cls, "on_send")
        return frozenset(hooks | {Stage.EOM} if is_at_eom else hooks)


def has_hook(policy: type[Policy[Any]], hook: str) -> bool:
    """Whether the hook of this name is the policy's own."""
    return getattr(policy, hook) is not getattr(Policy, hook)
