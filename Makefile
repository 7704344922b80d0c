# Everything runs in .venv, which is made once and again only when the dependencies change.

# The first interpreter that is new enough; `make demo PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
IN_VENV := .venv/bin/python
STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-test

.PHONY: help demo test test-slow lint format bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

$(STAMP): setup.py pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "dpir_jax needs Python 3.11 or newer$(if $(PYTHON),; $(PYTHON) is not,: none was found)." \
		     "Install one, then: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Installing into .venv (once; a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(IN_VENV) -m pip install -qq --disable-pip-version-check --editable .
	@touch $@

$(TEST_STAMP): $(STAMP)
	@echo "Installing what the tests need (PyTorch and diffusers among it) ..."
	@$(IN_VENV) -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(STAMP)  ## restore the photos that ship with the project
	@$(IN_VENV) -m dpir_jax.demo

test: $(TEST_STAMP)  ## the test suite
	@$(IN_VENV) -m pytest

test-slow: $(TEST_STAMP)  ## the tests that take minutes
	@$(IN_VENV) -m pytest -m slow

lint: $(TEST_STAMP)  ## ruff: rules and format
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) -m ruff format --check .

format: $(TEST_STAMP)  ## let ruff put the code in order
	@$(IN_VENV) -m ruff check --fix .
	@$(IN_VENV) -m ruff format .

bench: $(TEST_STAMP)  ## speed measurements, written to docs/performance.md (a quarter of an hour on two quiet cores)
	@$(IN_VENV) benchmarks/page.py docs/performance.md

clean:  ## remove .venv and everything that was generated
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
