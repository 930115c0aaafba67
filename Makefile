# sg_local: `make run` tries it, `make test` tests it. Everything is installed into .venv from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SG := $(BIN)/sg-local
TASK ?= support-inbox
MODEL ?= smollm2-135m

# A lean llama.cpp: no image models, no tools. Add to it, e.g. EXTRA_CMAKE_ARGS=-DGGML_CUDA=on for an NVIDIA GPU.
export CMAKE_ARGS := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.ci/llama-lean.cmake $(EXTRA_CMAKE_ARGS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# llama.cpp is built for this processor, with these options. pip's cache of built wheels knows neither, so each kind of
# build has one of its own.
LLAMA_BUILD = $(shell { echo '$(EXTRA_CMAKE_ARGS)'; cat .ci/llama-lean.cmake; c++ --version; \
	grep -m1 '^flags' /proc/cpuinfo 2>/dev/null || uname -m; } | cksum | cut -d ' ' -f 1)

INSTALL_LLAMA = PIP_CACHE_DIR="$$($(BIN)/pip cache dir)/llama-$(LLAMA_BUILD)" $(BIN)/pip install --quiet --no-deps \
	--force-reinstall "$$(grep '^llama-cpp-python==' requirements.lock)" && echo '$(LLAMA_BUILD)' > $(VENV)/llama-build

.DEFAULT_GOAL := help
.PHONY: help install run test check lint fmt test-unit test-model bench readme tables lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# With other EXTRA_CMAKE_ARGS than .venv was made with, llama.cpp is built anew; without any it stays as it is.
install: $(VENV)/installed ## install everything into .venv (once; builds llama.cpp, some minutes)
	@[ -z '$(EXTRA_CMAKE_ARGS)' ] || [ "$$(cat $(VENV)/llama-build 2>/dev/null)" = '$(LLAMA_BUILD)' ] || { \
		echo 'building llama.cpp with $(EXTRA_CMAKE_ARGS): 2 to 6 minutes, more with CUDA'; $(INSTALL_LLAMA); }

$(VENV)/installed: requirements.lock pyproject.toml .ci/llama-lean.cmake
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed to build llama.cpp: install g++ or clang"; exit 1; }
	@echo "[1/4] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch: with CUDA where PyPI's wheel has it"
	@$(BIN)/pip install --quiet --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	@echo "[3/4] installing the other packages and building llama.cpp: 2 to 6 minutes"
	@$(INSTALL_LLAMA)
	@$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	@echo "[4/4] installing sg-local"
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

run: install ## try it: a quick run of a shipped task (TASK=... MODEL=...)
	@$(SG) models pull $(MODEL)
	@$(SG) run $(TASK) --model $(MODEL) --preset quick

test: install ## all tests: unit (no model) and model (a real small GGUF)
	@echo "unit tests (3 minutes on two cores), then tests with a real model (20 minutes)"
	@$(BIN)/pytest -q -n auto tests/unit
	@$(BIN)/pytest tests/model --durations=10

check: lint test-unit ## format, lint, types, unit tests; changes nothing

lint: install ## format, lint, types; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fmt: install ## format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test-unit: install ## unit tests alone
	@$(BIN)/pytest -q -n auto tests/unit

test-model: install ## tests with a real model alone
	@$(BIN)/pytest tests/model --durations=10

bench: install ## measure side by side with peers: start-up, generation (half an hour; installs xllamacpp)
	@$(BIN)/python tests/benchmarks/startup.py
	@$(BIN)/pip install --quiet --no-deps xllamacpp==2026.10.11549
	@$(BIN)/python tests/benchmarks/engine.py

readme: install ## run the shipped task, and write README's transcript and all tables (minutes)
	@$(BIN)/python .ci/readme.py

tables: install ## write README's table of commands and SETTINGS.md from the program
	@$(BIN)/python .ci/readme.py --tables

lock: ## resolve requirements.lock anew (needs the network)
	@$(PYTHON) .ci/lock.py

clean: ## remove .venv, caches and build leftovers; runs/ stays
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
