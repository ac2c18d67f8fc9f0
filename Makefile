# make demo   set up and run the whole path on handwritten digits, with a report at the end
# make test   set up and run linters, types and tests
# Variables: PYTHON (3.11 or 3.12), TORCH (the torch requirement), TESTS (what pytest runs).

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
TESTS ?= tests
BIN := .venv/bin
READY := .venv/.ready

export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint pytest bench docs setup clean
.DEFAULT_GOAL := test

demo: setup
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/megagen demo

test: lint pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: setup
	$(BIN)/pytest $(TESTS)

bench: setup
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.fastgen
	$(BIN)/python -m benchmarks.dmd2_memory

docs: setup
	$(BIN)/python docs/config_reference.py

setup: $(READY)

# torch comes first and exactly: a looser request would take whatever build is newest.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt setuptools pybind11
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e '.[demo,dev]'
	touch $(READY)

clean:
	rm -rf build *.egg-info megagen/_cpu*.so runs .pytest_cache .mypy_cache .ruff_cache $(READY)
