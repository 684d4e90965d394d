"""Spoilt files and settings: Hypothesis on what `tests.support.fuzz` has by seed, and what fuzzing found.

A case ends as a result or as one of the project's own errors; `fuzz.outcome` raises for anything else.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_init import config
from tests.support import fuzz, spoilt

MANY = settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
READ = sorted(name for name in spoilt.corpus() if not name.startswith("artifact/"))

payloads = st.sampled_from(spoilt.NUMBERS + spoilt.PIECES) | st.binary(max_size=40)
kinds = st.sampled_from(["flip", "set", "insert", "remove", "repeat", "cut"])
changes = st.lists(st.tuples(kinds, st.integers(0, 1 << 30), payloads, st.integers(1, 64)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return fuzz.Bench(tmp_path_factory.mktemp("fuzz"))


@given(name=st.sampled_from(READ), changed=changes, option=st.integers(0, 15))
@MANY
def test_spoilt_files_are_read_or_refused(bench, name, changed, option):
    fuzz.outcome(lambda: bench.read(name, spoilt.spoilt(bench.files[name], changed), option))


@pytest.mark.parametrize("name", READ)
def test_files_cut_short_or_with_a_flipped_bit_are_read_or_refused(bench, name):
    data = bench.files[name]
    assert fuzz.outcome(lambda: bench.read(name, data)) == "result"
    rng = np.random.default_rng(0)
    for size in {0, 1, len(data) - 1, *rng.integers(0, len(data), 10).tolist()}:
        fuzz.outcome(lambda size=size: bench.read(name, data[:size]))
    for bit in rng.integers(0, 8 * len(data), 30).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        fuzz.outcome(lambda flipped=flipped: bench.read(name, bytes(flipped)))


@pytest.mark.slow
def test_every_byte_of_an_artifact_with_a_flipped_bit_is_caught(bench):
    rng = np.random.default_rng(0)
    for name in bench.names["artifact"]:
        for at in range(len(bench.files[name])):
            flipped = bytearray(bench.files[name])
            flipped[at] ^= 1 << int(rng.integers(8))
            assert fuzz.outcome(lambda name=name, data=bytes(flipped): bench.read(name, data)) == "InputError"


@given(text=st.lists(st.sampled_from(spoilt.WORDS) | st.text(max_size=5), max_size=12).map(" ".join) | st.text())
@MANY
def test_any_condition_is_taken_or_refused(bench, text):
    fuzz.outcome(lambda: bench.rows(text))


values = st.sampled_from(spoilt.VALUES) | st.text(max_size=20)
toml_values = st.sampled_from(spoilt.TOML_VALUES) | st.integers().map(str) | st.floats().map(str)
names = st.sampled_from([key.name for key in config.KEYS])
given_before = {"interactions": "a.csv", "out": "b", "features": "image=f4.npy"}


@given(found=st.dictionaries(names, values, max_size=4), variables=st.booleans())
@MANY
def test_any_flags_and_variables_are_taken_or_refused(found, variables):
    found = given_before | found
    environ = {f"GPU_INIT_{name.upper()}": value for name, value in found.items()} if variables else {}
    fuzz.outcome(lambda: config.load(None, environ, {} if variables else found))


@given(lines=st.lists(st.tuples(names, toml_values), max_size=4), cut=st.integers(0, 40))
@MANY
def test_any_job_file_is_taken_or_refused(bench, lines, cut):
    before = spoilt.toml_lines()[cut % 16 :] if cut < 32 else spoilt.toml_lines()
    text = "\n".join([*(f"{name} = {value}" for name, value in lines), *before])
    fuzz.outcome(lambda: bench.read("config/job.toml", text.encode("utf-8", "replace")))


@pytest.mark.parametrize("cases", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_cases_by_seed_in_a_process_of_their_own(cases):
    counts, peak, wrong = fuzz.in_processes(cases, seed=1)
    assert wrong == []
    assert sum(counts.values()) == cases
    assert sum(count for name, count in counts.items() if name.endswith("result")) > cases / 20
    assert peak < 1024


@pytest.mark.parametrize("cases", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_cases_by_command(cases):
    command = [sys.executable, "-m", "tests.support.fuzz", "--cases=0", f"--command={cases}", "--seed=1"]
    done = subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    [peak] = re.findall(rf"by command: {cases} cases, at most ([0-9]+) MiB, 0 wrong", done.stdout)
    assert 20 < int(peak) < 1024
