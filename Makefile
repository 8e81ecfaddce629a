# The commands of this repository. They need Python 3.11 or newer, make and a package index.
#
#   make demo     analyse the Python files of this machine on a fabric of its own cores
#   make test     run the tests                (make test ARGS="tests/unit -k name" for some)
#   make test-all the same with Dask, xarray, joblib and others installed, so that their tests run
#   make lint     ruff, mypy on floors 0-2, the floors test
#   make bench    measure tasks                (make bench ARGS="--peers pool,distributed")
#   make faults   only the tests that kill, stop and cut things
#   make faults-distributed  100 rounds of Dask clusters on zmq:// whose workers die
#
# Everything lives in .venv, which the first command makes. PYTHON=python3.12 chooses another one.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench faults faults-distributed coverage clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.run
	@$(BIN)/zfabric demo $(ARGS)

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.integrations
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet tests/test_floors.py

bench: $(VENV)/.run
	@$(BIN)/python -m benchmarks tasks $(ARGS)

faults: $(VENV)/.test
	@FAULT_SECONDS=60 $(BIN)/python -m pytest -m fault $(ARGS)
	@$(BIN)/python -m zfabric.testing.fuzz -n 1000000

faults-distributed: $(VENV)/.integrations
	@ZMQ_COMM_ROUNDS=100 ZMQ_COMM_KILLS=25 ZMQ_CLUSTER_ROUNDS=100 $(BIN)/python -m pytest \
	    -m fault tests/integrations/test_distributed_cluster.py $(ARGS)

coverage: $(VENV)/.test
	@$(PIP) install coverage
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "$(PYTHON) is not on the PATH. Install Python 3.11 or newer," \
	         "or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "zfabric needs Python 3.11 or newer; $(PYTHON) is" \
	         "$$($(PYTHON) --version 2>&1). Name another one:" \
	         "make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "$(PYTHON) cannot make a virtual environment;" \
	         "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# Editable, so that a changed source file counts at once, in every process that a test starts.
$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "installing zfabric into $(VENV)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing zfabric and its test tools into $(VENV)"
	@$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.integrations: pyproject.toml | $(BIN)/python
	@echo "installing zfabric, its test tools and the libraries that it works with into $(VENV)"
	@$(PIP) install --editable '.[test,integrations]'
	@touch $@ $(VENV)/.test $(VENV)/.run

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	@echo "installing zfabric and its lint tools into $(VENV)"
	@$(PIP) install --editable '.[test,lint]'
	@touch $@ $(VENV)/.test $(VENV)/.run
