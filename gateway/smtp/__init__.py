"""The SMTP protocol (RFC 5321 and its extensions) as pure state machines: bytes in, events and bytes out.

No sockets, no clock, no tasks. The adapters own those.
"""
