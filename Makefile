# Start with `make demo` and `make test`; both set up the environment.

# the newest suitable Python that runs: a name alone may be a shim of an absent version
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# processes of `make test`
WORKERS ?= 2
VENV := .venv
# the oldest transformers that is supported, in an environment on top of the other
HF_VERSION := 5.23.0
HF_VENV := .venv-hf
HF_READY := $(HF_VENV)/.ready-$(HF_VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# idle OpenMP threads that spin slow every other process on a small machine
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-hf test-hard mutants test-install install-matrix audit hostile chaos soak lint format bench bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; if it has another name, run make PYTHON=/path/to/python"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) (once; PyTorch is the large part)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(READY)

setup: $(READY)  ## create the virtual environment

demo: $(READY)  ## train looped and dense models on chains, Sudokus and text, and compare depths (6 minutes)
	@$(BIN)/python -m experiments demo

test: $(READY)  ## every invariant at a small size (5 minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		-m "not slow and not chaos and not gpu and not network"

test-slow: $(READY)  ## slow tests: real training runs, the demo, all sizes
	@$(BIN)/python -m pytest -m "slow and not chaos and not gpu and not network"

$(HF_READY): $(READY)
	@$(BIN)/python -m venv $(HF_VENV)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" > "$$($(HF_VENV)/bin/python -c "$$site")/packages.pth"
	@$(HF_VENV)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(HF_VERSION)
	@touch $(HF_READY)

test-hf: $(HF_READY)  ## the classes for transformers with the oldest version that is supported (2 minutes)
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(HF_VENV)/bin/python -m pytest tests/hf -n $(WORKERS) --dist worksteal \
		-m "not slow and not gpu and not network"

test-install: $(READY)  ## build the package, install it in an empty environment, run every command (10 minutes)
	@$(BIN)/python -m tests.install

install-matrix: $(READY)  ## the same, with other Pythons and the oldest allowed dependencies (30 minutes)
	@$(BIN)/python -m tests.install matrix

audit: $(READY)  ## known vulnerabilities of the installed packages (needs the network)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	@$(BIN)/python -m pip_audit --skip-editable --progress-spinner off

hostile: $(READY)  ## every file that a command reads, made hostile in every way (22 minutes)
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m tests.hostile

chaos: $(READY)  ## failure injection: crashes, corruption, divergence (10 minutes)
	@$(BIN)/python -m pytest tests/chaos -m "not short" --chaos-json chaos.json

# what shells, job runners and small terminals do to a process
test-hard: $(READY)  ## commands, server, signals, pages: SIGINT ignored, LC_ALL=C, 40 columns, another time zone (3 minutes)
	@trap '' INT; LC_ALL=C COLUMNS=40 TZ=Pacific/Chatham OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		-n $(WORKERS) --dist worksteal -m "not slow and not chaos and not gpu and not network" \
		tests/cli tests/inference/server tests/chaos/test_signals.py tests/chaos/test_command.py \
		tests/train/test_trainer.py tests/reports tests/docs tests/experiments tests/test_errors.py tests/test_files.py

mutants: $(READY)  ## changed code must be noticed: 165 one-place changes, each by the tests named for it (15 minutes)
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m mutants --json mutants.json --page docs/mutants.md

soak: $(READY)  ## the server under mixed load: memory, books, errors, a canary (30 minutes)
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos.serving.soak

lint: $(READY)  ## formatter, linter, type checker
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# benchmark with the default OpenMP wait policy, as users do
bench: $(READY)  ## speed against reference implementations, dense models and the roofline (19 minutes, two idle cores)
	@env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks; status=$$?; \
		$(BIN)/python -m benchmarks.report && exit $$status

bench-gpu: $(READY)  ## the same on one NVIDIA GPU of 80 GB or more (8 minutes)
	@env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks --device cuda; status=$$?; \
		$(BIN)/python -m benchmarks.report && exit $$status

clean:  ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) $(HF_VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
