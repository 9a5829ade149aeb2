"""The built-in policies: thin hooks on the public API of `gateway.api`, found by the engine through entry points."""
