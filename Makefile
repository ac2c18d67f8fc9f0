# make demo   set up and run the whole path on handwritten digits, with a report at the end
# make demo-causal   the same teacher made causal, distilled and streamed
# make test   set up and run linters, types and tests
# make bench   measure on this machine's CPU (docs/benchmarks.md); make bench-gpu   on its GPU
# make triton-oldest   fetch the oldest supported triton (188 MB), on which kernels are compiled too
# Variables: PYTHON (3.11 or 3.12), TORCH (the torch requirement), TESTS (what pytest runs).

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
TESTS ?= tests
BIN := .venv/bin
READY := .venv/.ready
OLDEST_TRITON := 3.6.0

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-causal test lint pytest bench bench-gpu docs setup triton-oldest clean
.DEFAULT_GOAL := test

demo: setup
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/megagen demo

demo-causal: setup
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/megagen demo-causal

test: lint pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: setup triton-oldest
	$(BIN)/pytest $(TESTS)

bench: setup
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --threads 2 --part vsa --seconds 10
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.fastgen
	$(BIN)/python -m benchmarks.dmd2_memory

bench-gpu: setup
	$(BIN)/python -m benchmarks.kernels --device gpu

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

# Beside the installed one, in a folder of its own: tests compile with it, nothing runs on it.
OLDEST_READY := .venv/triton-oldest/triton-$(OLDEST_TRITON).dist-info/METADATA
triton-oldest: setup $(OLDEST_READY)

$(OLDEST_READY): | $(READY)
	rm -rf .venv/triton-oldest
	$(BIN)/pip install --quiet --no-deps --target .venv/triton-oldest triton==$(OLDEST_TRITON)

clean:
	rm -rf build *.egg-info megagen/_c*.so megagen/_cuda_build.txt runs .pytest_cache .mypy_cache .ruff_cache $(READY)
