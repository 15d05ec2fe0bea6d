# `make demo` and `make test` are all that a new user needs; each makes a virtual environment in .venv first.
# It wants only Python 3.11 or later with venv, and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-guest check bench clean

help:
	@echo "make demo        real traffic through a VMBus NIC owned by user space, then attacks on its host"
	@echo "make test        the tests, some three minutes on two cores"
	@echo "make test-guest  tests with QEMU and Linux guests, whose programs are fetched from Debian's mirror (a quarter of an hour)"
	@echo "make check       lint, types, import rules"
	@echo "make bench       measurements against C yardsticks: table, build/bench/results.json and a plot"
	@echo "make clean       remove .venv, build and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vfio-vmbus needs Python 3.11 or later; say which: make PYTHON=python3.11" >&2; exit 2; }
	@echo "making a virtual environment in $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[bench]'
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run
	@$(BIN)/vfio-vmbus demo

# By folders, not by numbers of tests: the files that take longest have the fewest, and the last one would run alone.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

test-guest: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/guest

bench: $(VENV)/.bench
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
