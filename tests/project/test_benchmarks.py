import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = {
    "kernels": {"seconds", "gb_per_s", "share_of_copy", "times_ours"},
    "kmeans": {"sklearn_s", "sklearn_with_making_s", "factored_s", "factored_inertia"},
    "initialize": {"seconds", "baseline_s", "speedup", "inertia_ratio"},
    "job": {"seconds", "baseline_s", "floor_s", "speedup", "times_floor", "inertia_ratio", "peak_mib"},
    "scale": {"seconds", "us_per_interaction", "peak_mib"},
    "memory": {"seconds", "peak_mib", "promised_mib"},
    "distributed": {"seconds", "ratio", "process_peak_mib"},
}


@pytest.mark.parametrize(
    "name", [name if name in ("kmeans", "initialize") else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_a_benchmark_appends_rows_and_draws_its_plot(tmp_path, name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--results", str(tmp_path)]
    if name in ("kmeans", "initialize", "job"):
        command += ["--features", "groups"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert row["date"]
        assert row["numpy"]
        assert all(float(row[column]) > 0 for column in ROWS[name])
        for column in ROWS[name] & {"factored_inertia", "inertia_ratio"}:
            assert 0.9 < float(row[column]) < 1.1
    assert (tmp_path / f"{name}.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
