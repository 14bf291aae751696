# Two commands: `make demo` and `make test`. Both make the environment first (.venv; needs Python 3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# accelerate gives a process one thread unless it is told otherwise
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

env: $(VENV)/ready  ## the environment in .venv

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch $@

demo: env  ## teacher, distilled student and twin on the built-in data set, in $(DEMO); goes on where it was stopped
	test -f $(DEMO)/teacher/results.json || $(LAUNCH) scripts/finetune.py --config scripts/recipes/demo_teacher.yaml --resume_from_checkpoint true
	$(LAUNCH) scripts/distill.py --config scripts/recipes/demo.yaml --resume_from_checkpoint true

test: env  ## the default tests: CPU, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

test-all: env  ## slow tests too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto -m 'not gpu and not hub'

lint: env  ## ruff, as CI runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) $(DEMO)
