"""Everything that a policy may import. Nothing else of `gateway` but `gateway.testing` is public."""

from gateway.policy import NoSettings, OnError, Outcome, Policy, Watch
from gateway.services import Clock, Log, Metrics, Services
from gateway.session import AddressSource, Envelope, Recipient, Session, Slot, Transaction, Trust
from gateway.smtp.address import AddressError, AddressLiteral, Domain, Mailbox, parse_forward_path
from gateway.smtp.reply import Reply
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    HeaderEdit,
    RemoveFields,
    Result,
    Stage,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)

__all__ = [
    "Action",
    "AddField",
    "AddressError",
    "AddressLiteral",
    "AddressSource",
    "AuthResult",
    "Clock",
    "Domain",
    "Envelope",
    "HeaderEdit",
    "Log",
    "Mailbox",
    "Metrics",
    "NoSettings",
    "OnError",
    "Outcome",
    "Policy",
    "Recipient",
    "RemoveFields",
    "Reply",
    "Result",
    "Services",
    "Session",
    "Slot",
    "Stage",
    "Transaction",
    "Trust",
    "Verdict",
    "Watch",
    "defer",
    "parse_forward_path",
    "proceed",
    "quarantine",
    "reject",
]
