"""Is it us? Why a transaction ended as it did, in a sentence for who is on call, and whose doing that is.

`ours` is the short answer: `no` (the sender, the client or the downstream), `rule` (a policy or limit of ours did what
it is told to), `trouble` (something of ours, or between us and the downstream, is broken: look at it now), and nothing
where nothing was refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.smtp import reply

if TYPE_CHECKING:
    from gateway.decision.record import Decision


class Why(NamedTuple):
    """The short answer, and the sentence."""

    ours: str
    text: str


NO, RULE, TROUBLE = "no", "rule", "trouble"

_AGAIN: Final = "; the sender brings it again in a transaction of its own, which is no fault"

WHYS: Final = {
    "client": Why(NO, "the client gave it up, or its connection was lost, before it had our answer"),
    "downstream": Why(NO, "the downstream said so of the recipient, and its words were passed on"),
    "refused": Why(NO, "the downstream refused the message, and its words were passed on"),
    "partial": Why(
        NO, "the downstream refused some recipients that it had taken before; the next attempt learns which"
    ),
    "route": Why(NO, "the downstream is known not to take such a message (its SIZE or SMTPUTF8)"),
    "line_end": Why(
        NO, "the content holds bare CR, bare LF or NUL: a broken sender, or an attempt to smuggle mail"
    ),
    "long_line": Why(RULE, "the content has a line above server.max_line_bytes"),
    "too_big": Why(RULE, "the message is above server.max_message_bytes"),
    "header": Why(RULE, "the header is above server.max_header_bytes or max_header_fields, or no header"),
    "hops": Why(NO, "the message has passed server.max_received hosts: it goes in a circle"),
    "other_route": Why(RULE, f"the recipient has another route than the first one{_AGAIN}"),
    "other_group": Why(RULE, f"the recipient's domain has other policies than the first one's{_AGAIN}"),
    "route_recipients": Why(RULE, f"the route takes no more recipients at once{_AGAIN}"),
    "no_route": Why(TROUBLE, "no [[relay.routes]] takes this recipient: the configuration has a gap"),
    "spool": Why(TROUBLE, "the content could not be kept: the disk of server.spool_dir is full or broken"),
    "quarantine": Why(TROUBLE, "the route of quarantine.route did not take the message"),
    "policy_failed": Why(TROUBLE, "a policy failed; the log has policy.failed with the cause"),
    "internal": Why(TROUBLE, "something of ours failed; the log has the cause"),
    "connect": Why(TROUBLE, "no downstream of the route could be reached"),
    "tls": Why(
        TROUBLE, "TLS with the downstream failed: look at its certificate and at the route's tls keys"
    ),
    "banner": Why(TROUBLE, "the downstream did not greet us as an SMTP server that takes mail"),
    "ehlo": Why(TROUBLE, "the downstream did not answer our EHLO well"),
    "identity": Why(
        TROUBLE, "the downstream does not take the client's identity (XCLIENT): look at its settings"
    ),
    "busy": Why(
        TROUBLE, "all relay.max_connections_per_host connections to the downstream were in use for too long"
    ),
    "timeout": Why(TROUBLE, "the downstream did not answer in time"),
    "closed": Why(TROUBLE, "the downstream closed the connection"),
    "protocol": Why(TROUBLE, "what the downstream said was no SMTP"),
    "final_lost": Why(
        TROUBLE, "the downstream's answer to the whole message was lost; it may have the message"
    ),
    "smtputf8": Why(TROUBLE, "the downstream no longer offers SMTPUTF8, which the message needs"),
}
"""By the reasons that the engine itself gives."""

# At RCPT the relay has one reply for all its troubles, and the reason is the downstream's all the same.
_TROUBLE_AT_RCPT: Final = {
    reply.DOWNSTREAM_TROUBLE: Why(
        TROUBLE, "no downstream of the route could be reached to ask about the recipient"
    ),
    reply.INTERNAL: Why(TROUBLE, "the downstream could not be asked about the recipient"),
}


def why(decision: Decision) -> Why:
    """Why this transaction ended as it did."""
    policy, reason = decision.policy, decision.reason
    match decision.action:
        case "accepted":
            return Why("", "the downstream has it")
        case "quarantined":
            return Why("", f"the downstream has it, quarantined by our policy {policy}: {reason}")
    answer = decision.reply
    if not policy and reason == "downstream" and answer in _TROUBLE_AT_RCPT:
        return _TROUBLE_AT_RCPT[answer]
    if not policy or reason == "quarantine":
        return WHYS.get(reason, Why(RULE, f"the gateway said {reason}"))
    if reason == "policy_failed" or any(
        judged.failure and (judged.policy, judged.verdict.reason) == (policy, reason)
        for judged in decision.judged
    ):
        return Why(TROUBLE, f"our policy {policy} failed; the log has policy.failed with the cause")
    did = "deferred" if answer is not None and answer.is_transient else "refused"
    return Why(RULE, f"our policy {policy} {did} it: {reason}")
