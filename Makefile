# make demo    an unmodified Mixtral trains on 4 local ranks (ep=2, tp=2), on the standard library's own source
# make test    the test suite; make test-slow: what takes long (compiled graphs, more of a kind)
# make test-all  both
# make lint    ruff: format at 110 columns, and its checks; pyright: types
# make parity  every model on every mesh against the single device; writes docs/parity.md
# make fuzz    random small programs against the single device: ARGS="--count 2000 --first 1000" (that is the default); ARGS="17 --trace" is one of them
#
# Each does its own set-up in .venv. PYTHON=python3.12 picks the interpreter, ARGS="..." is handed on.

PYTHON ?= python3
ARGS ?=
# test files at a time; each may hold eight rank processes, and waits for them now and then
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin

# One intra-op thread per rank: the ranks share the cores. Models are made from configs, nothing is fetched.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-slow test-all lint parity fuzz clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(VENV)/.stamp

# torch first and pinned; without CUDA, PIP_EXTRA_INDEX_URL can point pip at the smaller CPU build.
$(VENV)/.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "tedfx: $(PYTHON) not found; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tedfx: needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "tedfx: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0 -e '.[dev]'
	@touch $@

demo: $(VENV)/.stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node 4 examples/pretrain.py --mesh ep=2,tp=2 --out out/demo $(ARGS)

PYTEST = $(BIN)/python -m pytest -q --timeout 600 -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.stamp
	$(PYTEST) -m "not slow" --durations=40 $(ARGS)

# inductor's C++ takes minutes on a busy machine
test-slow: JOBS = 2
test-slow: $(VENV)/.stamp
	TEDFX_TEST_TIMEOUT=280 $(PYTEST) --timeout 900 -m slow $(ARGS)

test-all:
	$(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-slow

lint: $(VENV)/.stamp
	$(BIN)/ruff format --check --quiet . || { echo 'run: $(BIN)/ruff format .' >&2; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

parity: $(VENV)/.stamp
	$(BIN)/python benchmarks/parity.py $(ARGS)

fuzz: $(VENV)/.stamp
	$(BIN)/python -m tests.fuzz $(or $(ARGS),--count 2000 --first 1000)

clean:
	rm -rf $(VENV) build dist out *.egg-info
