"""What is shipped, what may import what, and what a fresh machine is told."""

import ast
import email
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gpu_init

ROOT = Path(__file__).parents[2]

# Floors from the ground up. A module imports what lies on its own floor or below, and nothing in a circle.
FLOORS = (
    ("errors", "version", "settings", "ids", "where", "memory"),
    ("files",),
    ("kernels",),
    ("backend",),
    ("method",),
    ("artifact", "inputs", "show", "config"),
    ("budget", "manifest", "parts", "tasks", "site"),
    ("run", "assign", "tune", "api"),
    ("cluster",),
    ("torch", "mmrec"),
    ("demo", "cli", "__main__"),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
DEVICE_LIBRARIES = ("cudf", "cuml", "cupy", "cupyx", "numba", "rmm", "sklearn.cluster")
MOST_LINES = 600


def sources():
    """Each module's dotted name below `gpu_init`, and its file; but for `gpu_init/__init__.py`, which has no floor."""
    top = ROOT / "gpu_init"
    found = {
        ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (*top.rglob("*.py"), *(top / "kernels").glob("*.py"))
    }
    return {module: path for module, path in found.items() if module != "__init__"}


def imports(path, module):
    """Give the absolute dotted names that a file imports, those inside functions too."""
    package = ["gpu_init", *module.split(".")][: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def own(name, modules):
    """Module of this package that a dotted name means, or None for others' packages and `gpu_init` itself."""
    first, *parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((one for one in names if one in modules), None) if first == "gpu_init" else None


def graph():
    """Each module, and the others that it imports."""
    modules = sources()
    return {
        module: {own(name, modules) for name in imports(path, module)} - {None, module}
        for module, path in modules.items()
    }


def test_every_module_has_its_floor():
    assert {module.split(".")[0] for module in sources()} == set(FLOOR), "keep FLOORS in step with the modules"


def test_no_import_runs_upward():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if FLOOR[other.split(".")[0]] > FLOOR[module.split(".")[0]]
    ]
    assert not wrong


def test_no_import_runs_in_a_circle():
    assert len(list(graphlib.TopologicalSorter(graph()).static_order())) == len(sources())


def test_devices_are_known_to_backend_and_kernels_only():
    wrong = [
        f"{module} imports {name}"
        for module, path in sources().items()
        if module.split(".")[0] not in ("backend", "kernels")
        for name in imports(path, module)
        if any(f"{name}.".startswith(f"{library}.") for library in DEVICE_LIBRARIES)
    ]
    assert not wrong


def test_no_module_is_long():
    files = [*sources().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MOST_LINES}


def test_the_reading_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import cupy.linalg\nfrom . import run\nfrom .config import load\nfrom gpu_init.ids import normalize\n"
        "def f():\n    from sklearn import cluster\n    importlib.import_module('cudf')\n"
    )
    names = set(imports(path, "x"))
    assert names == {
        "cupy.linalg",
        "gpu_init.run",
        "gpu_init.config.load",
        "gpu_init.ids.normalize",
        "sklearn.cluster",
        "cudf",
    }
    assert {own(name, sources()) for name in names} == {None, "run", "config", "ids"}
    path.write_text("from gpu_init.errors import InputError\nfrom .csr import Csr\nfrom ..backend import select\n")
    found = {own(name, sources()) for name in imports(path, "kernels.x")}
    assert found == {"errors", "kernels.csr", "backend.select"}


def test_the_root_of_a_checkout_has_the_whole_package():
    """Whichever way the project is installed: in the root, Python finds the folder ``gpu_init`` first."""
    code = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'ditable' not in repr(one)]\n"
    code += "import gpu_init.kernels.reference; print(gpu_init.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == ROOT / "gpu_init" / "kernels" / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # setuptools builds inside the tree it is given, so it gets a copy
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("gpu_init", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    try:
        ready = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        ready = False
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation"] * ready + ["--wheel-dir", str(folder), str(tree)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_the_kernels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"gpu_init-{gpu_init.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"gpu_init", info}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gpu_init").rglob("*.py")}
    kernels = {
        f"gpu_init/kernels/{path.name}"
        for path in (ROOT / "kernels").iterdir()
        if path.suffix in (".py", ".cu", ".cuh")
    }
    assert {name for name in names if name.startswith("gpu_init/")} == modules | kernels | {"gpu_init/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_says_what_it_is_and_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"gpu_init-{gpu_init.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == gpu_init.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "gpu-init = gpu_init.cli:program" in entry_points
    core = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert not [need for need in core if re.match("cu|torch|rmm", need)]
    assert {"cuda12", "cuda13", "torch", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_wheel_in_a_fresh_environment_runs_the_demo(wheel, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*command):
        done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-m", "venv", "fresh")
    call("fresh/bin/python", "-m", "pip", "install", "--quiet", str(wheel))
    call("fresh/bin/gpu-init", "demo", "--users", "1000", "--items", "200")
    assert "matches its hash" in call("fresh/bin/gpu-init", "inspect", "demo/vectors", "--verify")


NO_ENSUREPIP = 'case "$2" in *ensurepip*) exit 1;; esac'
OLD_PYTHON = 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac'


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, ["is not installed", "apt-get install python3 python3-venv"]),
        (OLD_PYTHON, ["needs Python 3.11 or newer", "is Python 3.9.2", "make PYTHON=python3.12 demo"]),
        (NO_ENSUREPIP, ["cannot make virtual environments", "apt-get install python3-venv"]),
    ],
)
def test_make_says_what_is_missing(tmp_path, script, said):
    python = tmp_path / "python3"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--silent", "-C", str(ROOT), "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert all(words in done.stderr for words in said), done.stderr
    assert not (tmp_path / "venv").exists()


def test_no_path_of_somebodys_home():
    home = re.compile(r"/(?:(?:home|Users)/\w+|root)/")
    files = [
        ROOT / "README.md",
        *(path for folder in ("gpu_init", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*")),
    ]
    text = {
        path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".cu", ".md", ".csv")
    }
    if shutil.which("git") and (ROOT / ".git").exists():
        log = subprocess.run(["git", "log", "--format=%B"], cwd=ROOT, check=False, capture_output=True, text=True)
        text["commit messages"] = log.stdout
    assert not {name: home.findall(content) for name, content in text.items() if home.search(content)}
