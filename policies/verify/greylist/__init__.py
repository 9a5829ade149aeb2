"""Greylisting (RFC 6647) without I/O: whose attempts count as one, and what a record of them means now."""
