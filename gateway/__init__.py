"""The engine of mxgate, an inbound SMTP security gateway; its built-in policies are the package `policies`.

Who wants to know how a message travels reads listener, smtp.server, gatekeeper, pipeline and relay, in this order.
Who writes a policy reads policy.py first and imports from gateway.api only.
"""

# The one source of the version: hatchling reads it from here.
__version__ = "0.1.0"
