# `make train` in a fresh clone installs what is needed and trains the quickstart model.

PYTHON ?= python3
VENV ?= .venv
# Worker processes of pytest, each on one thread; 0: none. Tests that start ranks of their own keep two cores busy alone.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
CORE := $(VENV)/installed-core
DEV := $(VENV)/installed-dev
EVAL := $(VENV)/installed-eval

.PHONY: help train test test-slow lint bench install clean
.DELETE_ON_ERROR:

help:
	@echo "make train      install, prepare a corpus and train configs/quickstart.yaml (continues an interrupted run)"
	@echo "make test       the tests that take seconds each"
	@echo "make test-slow  the others, and those of lm-eval, which it installs"
	@echo "make lint       ruff and pyright"
	@echo "make bench      the layer, the training step, experts over two ranks; results go to bench/results/"
	@echo "make install    everything the targets above need"
	@echo "make clean      remove build products and caches of tools (keeps $(VENV) and runs/)"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS)"

train: $(CORE)
	$(BIN)/moesaic train configs/quickstart.yaml --resume

test: $(DEV)
	$(PYTEST) -m "not slow and not multigpu" -n $(WORKERS) --dist worksteal

test-slow: $(EVAL)
	$(PYTEST) -m "slow"
	$(PYTEST) tests/test_train_lm_eval.py

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV)
	$(BIN)/python bench/moe_layer.py
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/expert_parallel.py

install: $(DEV)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# pip is the last thing that a new environment gets, so it marks a complete one.
$(BIN)/pip:
	@$(PYTHON) -c "" 2>/dev/null || { \
	  echo "error: '$(PYTHON)' does not run; name a Python 3.11 or newer, such as: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), and moesaic needs 3.11 or newer;" \
	       "name one, such as: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot create virtual environments: it lacks venv or ensurepip;" \
	       "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) torch
	$(PIP) --quiet -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) --quiet -e ".[dev,bench]"
	@touch $@

$(EVAL): $(DEV)
	$(PIP) --quiet -e ".[eval]"
	@touch $@
