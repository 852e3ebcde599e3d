# make demo: real models answer and are compared (ARGS=--full: on the whole library). make test: the fast tests. Both begin with make setup.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes on two cores: each takes one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: setup demo test test-all lint bench docs clean

setup: .venv/installed
	@$(BIN)/craton pull smollm2-135m-instruct && $(BIN)/craton pull minilm-l6-v2 \
	    || echo "The default models could not be fetched: the demo needs them, tests that need them skip."

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard src/craton/inference/native/cpp/*)
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e .[dev]
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py $(ARGS)

test: setup .venv/installed-dev
	$(PYTEST) -m "not slow and not network and not gpu"

test-all: setup .venv/installed-dev
	$(PYTEST) -m "not gpu"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup .venv/installed-dev
	$(BIN)/python benchmarks/run_all.py

docs: .venv/installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build src/*.egg-info
