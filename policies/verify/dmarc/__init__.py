"""DMARC (RFC 9989): `record` parses, `judge` finds the record and evaluates, `override` says when it is not applied."""
