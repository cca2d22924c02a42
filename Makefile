# `make serve` opens the chat page; `make test` runs every test. All of it happens in .venv, which `make venv` makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More words for `make serve` and `make test`: make serve ARGS="--port 9000"
ARGS ?=

.PHONY: help venv serve test lint check format bench docs browser clean

help:
	@echo "make serve   start the server and open the chat page"
	@echo "make test    run the tests"
	@echo "make check   format, lint, types, tests: what CI runs"
	@echo "make format  put the code into its format"
	@echo "make bench   measure start-up, and throughput beside the peers that are installed"
	@echo "make docs    rewrite the generated pages of docs/"
	@echo "make venv    make .venv with everything these need"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loraserve needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

serve: venv
	$(BIN)/loraserve serve --open $(ARGS)

test: venv browser
	$(BIN)/python -m pytest $(ARGS)

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/loraserve bench start
	$(BIN)/loraserve bench serve

docs: venv
	$(BIN)/python docs/generate.py

# The chat page's test drives a real Chromium. It is installed where that needs no question; elsewhere the test skips.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium for the test of the chat page"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	    >/dev/null || echo "chromium could not be installed: the test of the chat page will be skipped"; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
