"""SPF (RFC 7208): record.py and macro.py parse, check.py evaluates, inquiry.py asks, result.py tells."""

from policies.verify.spf.check import check_host, identity
from policies.verify.spf.inquiry import SpfLimits
from policies.verify.spf.names import a_labels, is_checkable
from policies.verify.spf.received import received_spf
from policies.verify.spf.result import SpfResult, Step

__all__ = [
    "SpfLimits",
    "SpfResult",
    "Step",
    "a_labels",
    "check_host",
    "identity",
    "is_checkable",
    "received_spf",
]
