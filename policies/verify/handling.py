"""What becomes of mail: the values of the policies' settings named `on_X`, one type for each stage and kind of finding.

Temporary trouble of two values, `continue` or `defer`, is gateway.api.OnError.
"""

from __future__ import annotations

from enum import StrEnum


class Handling(StrEnum):
    """At EOM."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"
    REJECT = "reject"


class TemporaryHandling(StrEnum):
    """At EOM, while DNS is in trouble; never a 5xx."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"


class EarlyHandling(StrEnum):
    """Before there is a message, which could be put apart."""

    CONTINUE = "continue"
    DEFER = "defer"
    REJECT = "reject"
