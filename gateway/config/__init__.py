"""Typed models of the whole configuration: load it, explain what is wrong, render its documentation.

    config = load(Path("mxgate.toml"), environ=os.environ)
    check_files(config)

Reading order: model (the schema), load, sources (layers and origins), check, explain, locate, render.
"""

from gateway.config.check import check_files, check_state_file
from gateway.config.errors import ConfigError, KeyPath, Origin, Problem, dotted
from gateway.config.explain import print_problems
from gateway.config.load import load
from gateway.config.model import (
    Admin,
    Auth,
    AuthBackend,
    Config,
    Dns,
    Identity,
    Log,
    LogFormat,
    OnOutage,
    Pipeline,
    PolicySection,
    Protocol,
    Quarantine,
    Relay,
    Route,
    RouteTls,
    Server,
    ServerTls,
    State,
)
from gateway.config.values import HostPort, Network
from gateway.policy import Mode

__all__ = [
    "Admin",
    "Auth",
    "AuthBackend",
    "Config",
    "ConfigError",
    "Dns",
    "HostPort",
    "Identity",
    "KeyPath",
    "Log",
    "LogFormat",
    "Mode",
    "Network",
    "OnOutage",
    "Origin",
    "Pipeline",
    "PolicySection",
    "Problem",
    "Protocol",
    "Quarantine",
    "Relay",
    "Route",
    "RouteTls",
    "Server",
    "ServerTls",
    "State",
    "check_files",
    "check_state_file",
    "dotted",
    "load",
    "print_problems",
]
