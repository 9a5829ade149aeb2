"""Back-ends of submission: where a user's password is known (gateway.authentication.Backend).

dovecot.py asks the auth socket of a Dovecot, downstream.py a mail server's own submission port. Each attempt has a
connection of its own: there is one for a session, and nothing of it is left behind.
"""

from gateway.adapters.auth.dovecot import DovecotBackend
from gateway.adapters.auth.downstream import DownstreamBackend, DownstreamSettings, DownstreamSettingsError

__all__ = ["DovecotBackend", "DownstreamBackend", "DownstreamSettings", "DownstreamSettingsError"]
