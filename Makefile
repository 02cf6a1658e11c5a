# Needs make and Python >= 3.11; everything else comes from PyPI into .venv. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first Python that is new enough; name another with `make PYTHON=python3.12 ...`.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
BUILD := build_backend/pellucid_build.py
NATIVE_SOURCES := $(shell find native cmake -type f) CMakeLists.txt $(BUILD)
CXX_FILES := $(shell find native -name '*.h' -o -name '*.cpp')
RECORD := src/pellucid/backends/cpu/BUILD_FAILED.txt
DEFAULT_MODEL := smollm2-135m-instruct

# $(value) leaves `$$`, quotes and backslashes of the prompt alone; the shell then reads it from the environment.
ifndef PROMPT
PROMPT := What is the capital of France?
endif
run: export MAKE_PROMPT := $(value PROMPT)
unexport PROMPT

PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help run test check parity bench format dev build clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

run: build ## answer PROMPT="..." with the default model
	@$(BIN)/pellucid generate -- "$$MAKE_PROMPT"

test: dev ## run the tests; PYTEST_ARGS="..." is passed on
	@if [ -f $(RECORD) ]; then cat $(RECORD); [ "$$PELLUCID_NATIVE" = off ] || exit 1; fi
	$(BIN)/pellucid pull $(DEFAULT_MODEL)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: dev ## ruff, mypy --strict, clang-format, compiler warnings as errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python $(BUILD) check

parity: dev ## compare live with torch and transformers, and the goldens with what they give today
	$(PIP) install --no-build-isolation -e '.[parity]'
	$(BIN)/pellucid pull $(DEFAULT_MODEL)
	$(BIN)/python -m pytest tests/parity tests/tokenizer/test_parity.py $(PYTEST_ARGS)

bench: build ## measure prefill, decode, cold start and memory; BENCH_ARGS="..." is passed on
	$(BIN)/pellucid bench $(BENCH_ARGS)

format: dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

dev: build $(VENV)/.dev ## install everything that tests and checks need

build: $(VENV)/.installed $(VENV)/.native ## install Pellucid into .venv, in place

clean: ## remove what was built
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/pellucid/backends/cpu/_native*.so $(RECORD) $(VENV)/.native
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# Each step leaves a stamp in .venv, so that a second run does only what changed.

$(VENV)/.created:
	@[ -n "$(PYTHON)" ] || { echo "Pellucid needs Python 3.11 or later; found: $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW_ENOUGH)' || { echo "$(PYTHON) is older than Python 3.11." >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null \
		|| $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
		|| $(PYTHON) -m virtualenv --quiet --clear $(VENV) 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) \
			&& $(PYTHON) -m pip --quiet --python $(BIN)/python install pip; } \
		|| { echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
			exit 1; }
	@touch $@

$(VENV)/.requires: $(VENV)/.created pyproject.toml $(BUILD)
	@echo "Fetching what the build needs"
	@$(BIN)/python $(BUILD) requires > $@.txt
	@$(PIP) install -r $@.txt
	@touch $@

$(VENV)/.native: $(VENV)/.requires $(NATIVE_SOURCES)
	@echo "Building the native core"
	@$(BIN)/python $(BUILD)
	@touch $@

$(VENV)/.installed: pyproject.toml $(BUILD) | $(VENV)/.native
	@echo "Installing Pellucid and its dependencies into $(VENV)"
	@$(PIP) install --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.installed
	@echo "Installing the development tools"
	@$(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@
