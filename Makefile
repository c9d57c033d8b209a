# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

.PHONY: help demo test test-slow lint clean

help:
	@echo "make demo       train a 2-bit language model next to full precision, QuEST and LSQ (about 10 minutes on 2 cores)"
	@echo "make test       run the test suite"
	@echo "make test-slow  run the slow checks"
	@echo "make lint       ruff and mypy"

# Torch first and by its exact version: a range may resolve to another build, with gigabytes of GPU libraries.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitbell needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/bitbell demo --out $(OUT)

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
