"""The chart as helm renders it: objects to look at, and what helm says when it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.machine import require

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "mxgate"
CI = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))}
RELEASE = "mail"

Object = Mapping[str, Any]


class RefusedError(Exception):
    """Helm did not render; the text is what it said."""


def helm(*arguments: str, chart: Path = CHART) -> str:
    """What `helm COMMAND CHART ARGUMENT...` prints. Raises RefusedError."""
    # `./dev setup` puts it beside the interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which("helm", path=path) or "helm"
    require(program=program)
    command, *rest = arguments
    subcommand, rest = (rest[:1], rest[1:]) if command == "show" else ([], rest)
    release = (RELEASE,) if command == "template" else ()
    words = [program, command, *subcommand, *release, str(chart), *rest]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RefusedError(done.stdout + done.stderr)
    return done.stdout


@cache
def render(ci: str, *settings: str, chart: Path = CHART) -> Sequence[Object]:
    """The objects that the values of a ci/ file make, with `--set-json` settings `key=value` over them."""
    words = [word for setting in settings for word in ("--set-json", setting)]
    return manifests(helm("template", "--values", str(CI[ci]), *words, chart=chart))


def manifests(text: str) -> Sequence[Object]:
    return [each for each in yaml.safe_load_all(text) if each]


def one(objects: Sequence[Object], kind: str, name: str = "mail-mxgate") -> Object:
    """The only object of this kind and name."""
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def kinds(objects: Sequence[Object]) -> set[str]:
    return {each["kind"] for each in objects}


def pod(objects: Sequence[Object]) -> Any:
    """The pod's specification in the Deployment or the DaemonSet."""
    (workload,) = [each for each in objects if each["kind"] in {"Deployment", "DaemonSet"}]
    return workload["spec"]["template"]["spec"]


def container(objects: Sequence[Object]) -> Any:
    return pod(objects)["containers"][0]


def configuration(objects: Sequence[Object]) -> dict[str, Any]:
    """The gateway's configuration file."""
    config = json.loads(one(objects, "ConfigMap")["data"]["mxgate.json"])
    assert isinstance(config, dict)
    return config
