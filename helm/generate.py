"""Writes values.schema.json, README.md and the versions of the chart, from its values.yaml and from the gateway.

values.yaml is the one place where a value of the chart is described: a comment that begins with `# --` stands above
its key, and its default gives its type. A table with such comments inside takes the keys that it has and no others; one
without is passed on to Kubernetes as it is. What a default cannot say stands in `_MORE` here. The value `config`
is what `mxgate config schema` prints, unchanged: the settings of the built-in policies too. `./dev chart` runs this; a
test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gateway import __version__
from gateway.config.render import json_schema
from gateway.plugins import configurable

CHART = Path(__file__).parent / "mxgate"
_CONFIG = "config"
_KEY = re.compile(r"( *)([A-Za-z][A-Za-z0-9_]*):")
# The chart's version is the gateway's, and the image's tag is too unless it is said otherwise.
_VERSION = re.compile(r"^((?:version: |appVersion: \"))[^\"\n]+(\"?)$", re.MULTILINE)
_COMMENT = re.compile(r" *# ?(-- )?(.*)")

Key = tuple[str, ...]

_PORT = {"minimum": 1, "maximum": 65535}
_NETWORKS = {"items": {"type": "string", "pattern": "^[0-9A-Fa-f.:]+/[0-9]{1,3}$"}}
# What the default of a key does not say about it.
_MORE: dict[str, Mapping[str, object]] = {
    "image.repository": {"minLength": 1},
    "image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "workload": {"enum": ["Deployment", "DaemonSet"]},
    "replicaCount": {"minimum": 0},
    "minReadySeconds": {"minimum": 0},
    "revisionHistoryLimit": {"minimum": 0},
    "onConfigChange": {"enum": ["roll", "reload"]},
    "preStop.sleepSeconds": {"minimum": 0, "maximum": 600},
    "autoscaling.minReplicas": {"minimum": 1},
    "autoscaling.maxReplicas": {"minimum": 1},
    "autoscaling.targetCPUUtilizationPercentage": {"minimum": 0},
    "autoscaling.targetOpenConnections": {"minimum": 0},
    "keda": {
        "if": {"properties": {"enabled": {"const": True}}},
        "then": {
            "anyOf": [
                {"properties": {"triggers": {"minItems": 1}}},
                {"properties": {"prometheusAddress": {"minLength": 1}}},
            ]
        },
    },
    "keda.minReplicas": {"minimum": 1},
    "keda.maxReplicas": {"minimum": 1},
    "keda.prometheusAddress": {"pattern": "^(https?://.+)?$"},
    "keda.targetOpenConnections": {"minimum": 1},
    "podDisruptionBudget.maxUnavailable": {"type": ["integer", "string"], "pattern": "^[0-9]+%$"},
    "podAddresses": {"items": {"enum": ["0.0.0.0", "::"]}, "minItems": 1, "uniqueItems": True},
    "service.type": {"enum": ["LoadBalancer", "NodePort", "ClusterIP"]},
    "service.port": _PORT,
    "service.smtpsPort": _PORT,
    "service.submissionPort": _PORT,
    "service.submissionsPort": _PORT,
    "service.nodePort": {"minimum": 0, "maximum": 65535},
    "service.externalTrafficPolicy": {"enum": ["Local", "Cluster"]},
    "service.loadBalancerSourceRanges": _NETWORKS,
    "service.ipFamilyPolicy": {"enum": ["", "SingleStack", "PreferDualStack", "RequireDualStack"]},
    "service.ipFamilies": {"items": {"enum": ["IPv4", "IPv6"]}},
    "hostPort.port": _PORT,
    # Without the ranges everybody could claim any address, and the gateway would expect no header.
    "proxyProtocol": {
        "if": {"properties": {"enabled": {"const": True}}},
        "then": {"properties": {"trustedRanges": {"minItems": 1}}},
    },
    "proxyProtocol.trustedRanges": {
        "items": {"type": "string", "not": {"pattern": "/0$"}, "pattern": "^[0-9A-Fa-f.:]+/[0-9]{1,3}$"}
    },
    "tls.certManager": {
        "if": {"properties": {"enabled": {"const": True}}},
        "then": {"properties": {"issuerRef": {"required": ["name"]}}},
    },
    "networkPolicy.redisPorts": {"items": {"type": "integer", **_PORT}},
    "dnsPolicy": {"enum": ["", "ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    "fullnameOverride": {"maxLength": 52},
}
# Beyond the gateway's own schema: what has a default there that no pod may have, and what no default can give.
# Without `server.hostname` the gateway would take the pod's name.
_CONFIG_NEEDS: Mapping[str, object] = {
    "required": ["server", "relay"],
    "properties": {
        "server": {"required": ["hostname"]},
        "relay": {
            "required": ["routes"],
            "properties": {"routes": {"minItems": 1}},
            "anyOf": [{"required": ["domains"]}, {"required": ["domains_file"]}],
        },
    },
}


def main() -> None:
    """Write all of them."""
    for name, text in generated().items():
        (CHART / name).write_text(text, "utf-8")


def generated() -> dict[str, str]:
    """The files by their name in the chart, as they have to be."""
    text = (CHART / "values.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    said = dict(descriptions(text))
    schema = json.dumps(values_schema(values, said), indent=2) + "\n"
    about = _VERSION.sub(rf"\g<1>{__version__}\g<2>", (CHART / "Chart.yaml").read_text("utf-8"))
    return {"values.schema.json": schema, "README.md": readme(values, said), "Chart.yaml": about}


def descriptions(text: str) -> Iterator[tuple[Key, str]]:
    """Each key of values.yaml with a description, and that."""
    path: list[tuple[int, str]] = []
    words: list[str] | None = None
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            if comment[1]:
                words = []
            if words is not None:
                words.append(comment[2])
        elif key := _KEY.match(line):
            path = [*(each for each in path if each[0] < len(key[1])), (len(key[1]), key[2])]
            if words is not None:
                yield tuple(name for _, name in path), " ".join(words)
            words = None


def values_schema(values: Mapping[str, Any], said: Mapping[Key, str]) -> dict[str, Any]:
    """The JSON schema of the chart's values."""
    policies, errors = configurable()
    assert not errors, errors
    gateway = json_schema(policies)
    definitions = gateway.pop("$defs")
    dialect = gateway.pop("$schema")
    schema = _schema(values, (), said)
    schema["properties"][_CONFIG] = {
        "description": said[_CONFIG,],
        "allOf": [{"$ref": "#/$defs/Config"}, _CONFIG_NEEDS],
    }
    # Helm puts it beside the values of a chart's own for those of its parents.
    schema["properties"]["global"] = {"type": "object"}
    return {"$schema": dialect, **schema, "$defs": {**definitions, "Config": gateway}}


def _schema(value: object, path: Key, said: Mapping[Key, str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": said[path]} if path in said else {}
    match value:
        case bool():
            schema["type"] = "boolean"
        case int():
            schema["type"] = "integer"
        case str():
            schema["type"] = "string"
        case list():
            schema["type"] = "array"
        case dict():
            schema["type"] = "object"
            if _is_table(path, said):
                schema["properties"] = {key: _schema(each, (*path, key), said) for key, each in value.items()}
                schema["additionalProperties"] = False
                # Helm takes a key away whose value is null; the templates look into each table.
                tables = [key for key in value if _is_table((*path, key), said)]
                if tables:
                    schema["required"] = tables
    return {**schema, **_MORE.get(".".join(path), {})}


def _is_table(path: Key, said: Mapping[Key, str]) -> bool:
    """Whether a table's own keys are described."""
    return any(len(key) > len(path) and key[: len(path)] == path for key in said)


def readme(values: Mapping[str, Any], said: Mapping[Key, str]) -> str:
    """README.md: its introduction, and a table of all values."""
    rows = "\n".join(_rows(values, (), said))
    head = (Path(__file__).parent / "README.head.md").read_text("utf-8")
    return f"{head}\n## Values\n\n| value | default | meaning |\n|---|---|---|\n{rows}\n"


def _rows(values: Mapping[str, Any], path: Key, said: Mapping[Key, str]) -> Iterator[str]:
    for key, value in values.items():
        below = (*path, key)
        is_table = isinstance(value, dict) and _is_table(below, said)
        if below in said:
            default = "" if is_table else f"`{json.dumps(value)}`"
            yield f"| `{'.'.join(below)}` | {default} | {said[below]} |".replace("|  |", "| |")
        if is_table:
            yield from _rows(value, below, said)


if __name__ == "__main__":
    main()
