"""Write docker/requirements-TARGET.txt: the version of every package in an image, as pip resolves them today.

`make pins` runs it, by the Python of the base image, since versions depend on that; arguments name some targets alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 11)
PROJECTS = {"cpu": ".[dask,s3]", "cuda": ".[cuda12,dask-cuda,s3]"}


def resolved(project: str) -> list[str]:
    """Exact requirements of the project with its extras, itself left out."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = subprocess.run([*command, project], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in json.loads(report)["install"]}
    del found["gpu-init"]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main() -> None:
    """Write the files of the targets that are named."""
    version = ".".join(map(str, PYTHON))
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"the images have Python {version}: make PYTHON=python{version} VENV=build/pins pins")
    for target in sys.argv[1:] or PROJECTS:
        lines = [f"# What {PROJECTS[target]} needs on Python {version}; `make pins` writes it anew."]
        lines += resolved(PROJECTS[target])
        (ROOT / "docker" / f"requirements-{target}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
