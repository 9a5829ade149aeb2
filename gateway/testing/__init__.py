"""The kit for those who test policies."""

from gateway.testing.zone import Zone

__all__ = ["Zone"]
