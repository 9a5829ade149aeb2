"""Keys of a configuration with submission."""

SUBMISSION = """
[[relay.routes]]
name = "out"
domains = []
downstream = ["127.0.0.1:10"]
[submission]
listen = ["192.0.2.1:587"]
route = "out"
auth.address = "unix:/run/dovecot/auth-client"
"""
"""The least that it needs; further keys of [submission] may follow."""
