"""The author domain: the one domain of the From field that DMARC judges (RFC 5322 3.6.2, RFC 9989 4.2)."""

from __future__ import annotations

from enum import StrEnum

from gateway.errors import GatewayError
from gateway.mail.message import Header
from gateway.smtp.address import Domain


class AuthorFault(StrEnum):
    """Why a message has no one author domain; the token is the reason of the verdict."""

    NO_FROM = "no_from"
    SEVERAL_FROM = "several_from"
    SYNTAX = "from_syntax"
    SEVERAL_DOMAINS = "from_several_domains"


class AuthorError(GatewayError):
    """The header has no one author domain."""

    def __init__(self, fault: AuthorFault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


def author_domain(header: Header) -> Domain:
    """The author domain of a message. Raises AuthorError."""
    raise NotImplementedError
