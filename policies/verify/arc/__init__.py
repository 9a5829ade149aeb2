"""ARC (RFC 8617): read the sets of a message, validate the chain, and say whose word an operator takes for it."""
