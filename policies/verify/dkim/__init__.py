"""DKIM (RFC 6376, 8301, 8463, 8616): parse the signatures of a message, judge each of them."""
