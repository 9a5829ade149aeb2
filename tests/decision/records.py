"""Records for tests, of fresh objects as they come from the wire."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from gateway.decision import Decision, Judged, RcptAnswer
from gateway.session import Envelope, Recipient, Session, TlsInfo
from gateway.smtp.address import Mailbox, parse_forward_path
from gateway.smtp.reply import Reply
from gateway.verdict import Stage, proceed

DENIED = Reply(550, "5.7.1", "Relaying denied")


def mailbox(text: str) -> Mailbox:
    return parse_forward_path(f"<{text}>", smtputf8=True)


def session(number: int = 1, client: str = "192.0.2.7") -> Session:
    return Session(
        f"1m80vxzckjnp{number:03}",
        ip_address(client),
        30_000 + number,
        f"mail{number}.example.net",
        esmtp=True,
        tls=TlsInfo("TLSv1.3", f"TLS_AES_256_GCM_SHA384_{number}"),
    )


def decision(
    number: int = 1,
    *,
    client: str = "192.0.2.7",
    mail_from: str = "you@example.net",
    rcpts: Sequence[str] = ("ann@example.org",),
    action: str = "accepted",
    judged: Sequence[Judged] = (),
    header: bytes = b"",
    shared: Session | None = None,
    answer: Reply | None = None,
    policy: str = "",
    error: str = "",
) -> Decision:
    """The `number`-th record: its id, its time and its texts hold that number."""
    of = shared or session(number, client)
    mailboxes = [Recipient(mailbox(rcpt)) for rcpt in rcpts]
    return Decision(
        id=f"{of.id}-{number}",
        time=1_000_000_000.0 + number,
        session=of,
        envelope=Envelope(mailbox(mail_from) if mail_from else None, tuple(mailboxes)),
        rcpts=[
            RcptAnswer(
                rcpt, answer or Reply.from_downstream(250, f"2.1.5 Ok {number} {at}"), policy, "downstream"
            )
            for at, rcpt in enumerate(mailboxes)
        ],
        action=action,
        stage=Stage.EOM,
        reply=answer or Reply.from_downstream(250, f"2.0.0 queued as {number}"),
        policy=policy,
        reason="",
        duration_s=0.01 * number,
        judged=judged,
        delivered=action == "accepted",
        error=error,
        route="route1",
        header=header,
        size_bytes=4000 + number,
        timings=(("policies", 0.001 * number),),
    )


def plain(number: int = 1, policy: str = "spf") -> Judged:
    return Judged(policy, Stage.EOM, "enforce", proceed(), None, 0.001 * number, "")
