"""The kit for those who test policies."""

from gateway.testing.store import FakeStore
from gateway.testing.zone import Zone

__all__ = ["FakeStore", "Zone"]
