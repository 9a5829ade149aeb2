"""The relay: hands mail to the downstreams and asks them about recipients (DESIGN.md section 6).

SmtpRelay implements gateway.relaying.Relay. In reading order: relay.py (the two operations), route.py (which host is
next, what a route takes), host.py (one downstream, its health), dialogue.py (the dialogues on a connection), cache.py
(remembered recipients), pool.py (connections of a host), opening.py (making one), names.py (addresses), connection.py
(one of them), outgoing.py (content), settings.py. What SMTP says is in gateway/smtp/client.py; here is the I/O.

What it promises beside the interface: nothing is tried again once content was sent; trouble is 4yz; memory does not
grow with the message; a deadline stands behind every wait.
"""

from gateway.adapters.relay.relay import SmtpRelay
from gateway.adapters.relay.settings import (
    HostSettings,
    Identity,
    Protocol,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
    TlsMode,
)

__all__ = [
    "HostSettings",
    "Identity",
    "Protocol",
    "RelaySettings",
    "RelaySettingsError",
    "RouteSettings",
    "SmtpRelay",
    "TlsMode",
]
