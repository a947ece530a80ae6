# `make demo`: train, watch and report one real run. `make test`: all checks. Both set up .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
TORCH := torch==2.13.0
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# small operations on few cores are fastest without threads of their own in each test process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
DOORS := tests/callbacks tests/promises tests/records

.PHONY: help demo test lint bench faults reproduce pictures clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train the code transformer with diagnostics and report on it (about 4 minutes)"
	@echo "make test    ruff, mypy, doctests and all tests, under both Lightning packages"
	@echo "make lint    ruff and mypy alone"
	@echo "make bench   measure what the diagnostics cost; writes benchmarks/RESULTS.md"
	@echo "make faults  train all planted faults and healthy runs; writes tests/faults/RESULTS.md"
	@echo "make reproduce  train transformer, graph net and their fusion with three seeds each, and aggregate them"
	@echo "make pictures  take the pictures of README.md anew, in headless Chromium (about 3 minutes)"
	@echo "make clean   remove .venv, caches and build folders; runs/ stays"

# what training, reporting and the live page need
$(RUNS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@echo "installing lightning-diag and what it runs on (a minute or so)"
	@$(PIP) --constraint constraints.txt --editable '.[recipes,monitor]'
	@touch $@

# what the tests need besides
$(READY): $(RUNS)
	@echo "installing all extras, and what tests it (a minute or so)"
	@$(PIP) --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

# threads that wait asleep: on a machine that is busy, waiting in a loop makes a step ten times slower
demo: $(RUNS)
	@echo "to see it while it trains, in a second terminal: $(BIN)/lightning-diag monitor $(DEMO)"
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/lightning-diag train experiment=code_transformer callbacks=full run_dir=$(DEMO) \
	  callbacks.gradient_health.every_n_steps=10
	@$(BIN)/lightning-diag report $(DEMO) --no-fail

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: lint
	@echo "tests under pytorch_lightning, and doctests"
	@LIGHTNING_DIAG_TEST_PACKAGE=pytorch_lightning $(PYTEST) --doctest-modules tests lightning_diag
	@echo "callbacks, promises and records again, under lightning.pytorch"
	@LIGHTNING_DIAG_TEST_PACKAGE=lightning.pytorch $(PYTEST) $(wildcard $(DOORS))

bench: $(READY)
	@$(BIN)/python -m benchmarks.moments --write
	@$(BIN)/python -m benchmarks.gradient_health --write
	@$(BIN)/python -m benchmarks.suite --write
	@$(BIN)/python -m benchmarks.lr_cache --write

# how right the rules are: some ten minutes for each hundred runs
faults: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --write

# nine runs; started again, it goes on where it was cut
reproduce: $(RUNS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m recipes.code.reproduce --out runs/reproduce

# a run of two minutes, its live page and its report
pictures: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pictures

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
