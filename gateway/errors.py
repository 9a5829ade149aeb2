"""The one error hierarchy of the gateway; foreign exceptions are mapped to it in adapters/."""


class GatewayError(Exception):
    """Something that the gateway itself understands went wrong."""
