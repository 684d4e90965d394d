"""Whether two checkouts of the project make the same bytes: the same jobs with both, compared array by array.

TikTok (where ../shared/data is there) and the demo's data, six settings each, in one process and over two Dask workers.
Prints one line for each job. The exit code is 1 where any array differs. ``GPU_INIT_KERNELS`` chooses the kernels.

    python benchmarks/same_bytes.py OLD_CHECKOUT [NEW_CHECKOUT]

Each checkout is run by the environment in its folder ``.venv``, as ``make test`` makes it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "defaults": [],
    "sym, float16": ["--weighting=sym", "--clusters=16", "--dtype=float16"],
    "shrink, scaled": ["--lambda=shrink", "--scale=items"],
    "attention": ["--lambda=attention", "--seed=3"],
    "items, projected": ["--cluster-on=items", "--dim=32", "--whiten", "--lambda=0.5"],
    "interactions, auto": ["--cluster-on=interactions", "--clusters=auto"],
}
PROCESSES = {"one process": [], "two workers": ["--scheduler=local"]}


def data_sets(folder: Path) -> dict[str, list[str]]:
    """Name of each data set to the flags that name its files."""
    demo = folder / "demo"
    features = [f"--features=image={demo}/image.npy", f"--features=text={demo}/text.parquet"]
    found = {"demo": [f"--interactions={demo}/interactions.parquet", *features]}
    tiktok = ROOT.parent / "shared/data/tiktok"
    if tiktok.is_dir():
        features = [f"--features={name}={tiktok}/{name}_feat.npy" for name in ("image", "audio")]
        found["TikTok"] = [f"--interactions={tiktok}/tiktok.inter", "--where=x_label == 0", *features]
    return found


def call(checkout: Path, *words: str) -> None:
    """Run the command of a checkout."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    command = [str(checkout.resolve() / ".venv/bin/python"), "-m", "gpu_init", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")


def difference(old: Path, new: Path) -> str:
    """Which arrays of two artifacts differ, and by how much at most; empty where none does."""
    names = [sorted(str(path.relative_to(one)) for path in one.rglob("*.npy")) for one in (old, new)]
    if names[0] != names[1]:
        return f"other files: {set(names[0]) ^ set(names[1])}"
    said = []
    for name in names[0]:
        if (old / name).read_bytes() != (new / name).read_bytes():
            one, other = np.load(old / name), np.load(new / name)
            most = float(abs(one.astype(float) - other).max()) if one.shape == other.shape else float("nan")
            said.append(f"{name} by {most:.3g}")
    return "; ".join(said)


def main() -> int:
    """Compare, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", default="", help="part of the name of a setting")
    given = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call(given.old, "demo", f"--folder={folder}/demo")
        for data, files in data_sets(folder).items():
            for setting, flags in SETTINGS.items():
                for processes, more in PROCESSES.items():
                    if given.only not in setting:
                        continue
                    outs = [folder / f"{data}-{which}" for which in ("old", "new")]
                    for checkout, out in zip((given.old, given.new), outs, strict=True):
                        words = [*files, *flags, *more, f"--out={out}", "--overwrite"]
                        call(checkout, "run", *words)
                    said = difference(*outs)
                    different += bool(said)
                    print(f"{data:8} {setting:20} {processes:12} {said or 'the same bytes'}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
