"""Everything that a policy may import. Nothing else of `gateway` but `gateway.testing` is public."""

from gateway.list_file import ListError, ListFile
from gateway.lookup import BUDGET, Answer, Asked, Found, Lookup, Mx, Question, RRType, ask
from gateway.mail.author import Author, AuthorError, AuthorFault, author_domain, authors
from gateway.mail.authres import ReadResult, ReadResults
from gateway.mail.authres import parse as parse_results
from gateway.mail.digest import BodyDigest, BodyDigests, Canonicalization
from gateway.mail.message import Field, Header, Message
from gateway.policy import NoSettings, OnError, Outcome, Policy, Watch
from gateway.services import Clock, Log, Metrics, Resolver, Services, Store
from gateway.session import AddressSource, Envelope, Recipient, Role, Session, Slot, Transaction, Trust
from gateway.smtp.address import AddressError, AddressLiteral, Domain, Mailbox, parse_forward_path
from gateway.smtp.reply import Reply
from gateway.store import Entry, Keyspace, NotACounterError, Operation, Page, StoreDownError, StoreError
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    Evidence,
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
    "BUDGET",
    "Action",
    "AddField",
    "AddressError",
    "AddressLiteral",
    "AddressSource",
    "Answer",
    "Asked",
    "AuthResult",
    "Author",
    "AuthorError",
    "AuthorFault",
    "BodyDigest",
    "BodyDigests",
    "Canonicalization",
    "Clock",
    "Domain",
    "Entry",
    "Envelope",
    "Evidence",
    "Field",
    "Found",
    "Header",
    "HeaderEdit",
    "Keyspace",
    "ListError",
    "ListFile",
    "Log",
    "Lookup",
    "Mailbox",
    "Message",
    "Metrics",
    "Mx",
    "NoSettings",
    "NotACounterError",
    "OnError",
    "Operation",
    "Outcome",
    "Page",
    "Policy",
    "Question",
    "RRType",
    "ReadResult",
    "ReadResults",
    "Recipient",
    "RemoveFields",
    "Reply",
    "Resolver",
    "Result",
    "Role",
    "Services",
    "Session",
    "Slot",
    "Stage",
    "Store",
    "StoreDownError",
    "StoreError",
    "Transaction",
    "Trust",
    "Verdict",
    "Watch",
    "ask",
    "author_domain",
    "authors",
    "defer",
    "parse_forward_path",
    "parse_results",
    "proceed",
    "quarantine",
    "reject",
]
