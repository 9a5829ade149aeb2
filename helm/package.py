"""Packs the chart for a release: `python -m helm.package DIRECTORY [--image REPOSITORY] [--home URL]`.

Where an image and a project are published is known to the one who publishes, so that the tree names neither. With
`--image` the packed chart takes that image unless its values say otherwise; that and `--home` go to Artifact Hub too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gateway import __version__
from helm.generate import CHART

_NO_IMAGE = (
    'image:\n  # -- Where the image is; needed. It is built from deploy/Dockerfile.\n  repository: ""\n'
)


def main() -> None:
    """Pack it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image", default="")
    parser.add_argument("--home", default="")
    given = parser.parse_args()
    package(given.directory, image=given.image, home=given.home)


def package(directory: Path, *, image: str = "", home: str = "") -> None:
    """Write the chart's package into a directory."""
    with tempfile.TemporaryDirectory() as scratch:
        # links are followed: the package has the dashboards themselves
        chart = Path(shutil.copytree(CHART, Path(scratch, CHART.name)))
        if image:
            _put_image(chart / "values.yaml", image)
        about = chart / "Chart.yaml"
        about.write_text(about.read_text("utf-8") + _annotations(image, home), "utf-8")
        # `./dev setup` puts helm beside the interpreter
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        program = shutil.which("helm", path=path)
        if program is None:
            sys.exit("helm.package: there is no helm on the PATH")
        subprocess.run([program, "package", "--destination", str(directory), str(chart)], check=True)


def _put_image(values: Path, image: str) -> None:
    text = values.read_text("utf-8")
    assert text.count(_NO_IMAGE) == 1
    values.write_text(text.replace(_NO_IMAGE, _NO_IMAGE.replace('""', f'"{image}"')), "utf-8")


def _annotations(image: str, home: str) -> str:
    """Lines for the end of Chart.yaml, where its annotations are."""
    lines = []
    if image:
        lines += ["  artifacthub.io/images: |", f'    - {{name: mxgate, image: "{image}:{__version__}"}}']
    if home:
        lines += ["  artifacthub.io/links: |", f'    - {{name: source, url: "{home}"}}', f'home: "{home}"']
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
