# Each target sets itself up; a fresh machine needs python3 (3.11 or newer), its venv module and make.
#
#   make demo        makes a data set, runs the job on it and shows the result
#   make test        the tests that take minutes          make test-slow   the long proofs
#   make lint        ruff and mypy                        make bench       the benchmarks of speed and memory, rows to benchmarks/results
#   make test-gpu    the tests that need a CUDA device    make bench-gpu   the benchmarks that need one
#   make pins        the versions in the images, resolved anew
#   make clean       removes what the others made

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
BENCHMARKS = $(filter-out $(addprefix benchmarks/,common.py baselines.py gpu.py quality.py mmrec_runs.py ranking.py same_bytes.py small_model.py tune.py interactions.py),$(wildcard benchmarks/*.py))
# cuda12 or cuda13, by what the driver serves; make CUDA=cuda12 ... chooses
CUDA ?= $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *1\([0-9]\).*/1\1/p' | sed 's/1[3-9]/13/; s/^/cuda/')

.PHONY: demo test test-slow test-gpu lint bench bench-gpu pins clean
.SECONDARY:

demo: $(VENV)/core.stamp
	$(VENV)/bin/gpu-init demo

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m slow

test-gpu: $(VENV)/gpu.stamp
	$(VENV)/bin/python -m pytest tests/gpu

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy gpu_init
	cd benchmarks && MYPYPATH=.. $(abspath $(VENV))/bin/mypy --config-file ../pyproject.toml --follow-imports=silent *.py

bench: $(VENV)/bench.stamp
	for script in $(BENCHMARKS); do $(VENV)/bin/python $$script; done

bench-gpu: $(VENV)/gpu.stamp
	$(VENV)/bin/python benchmarks/gpu.py

pins: $(VENV)/python.stamp
	$(VENV)/bin/python docker/pin.py

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew when pyproject.toml changes; an interrupted install is taken up again.
$(VENV)/python.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: on Debian or Ubuntu, apt-get install python3 python3-venv." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gpu-init needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: on Debian or Ubuntu, apt-get install python3-venv." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core.stamp: $(VENV)/python.stamp
	$(PIP) --editable .
	@touch $@

$(VENV)/gpu.stamp: $(VENV)/python.stamp
	@test -n "$(CUDA)" || { echo "nvidia-smi names no CUDA driver. Where there is one all the same: make CUDA=cuda12 $(MAKECMDGOALS), or cuda13" >&2; exit 1; }
	$(PIP) --editable '.[$(CUDA),test,bench]'
	@touch $@

$(VENV)/%.stamp: $(VENV)/python.stamp
	$(PIP) --editable '.[$*]'
	@touch $@
