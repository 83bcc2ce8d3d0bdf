# `make demo` and `make test` need nothing but Python 3.11 and the package index.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ARTIFACT := out/lfm2-tiny-int8
STORY := Tell me a story about a dog and a ball.
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo demo-smollm2 test test-all lint format types docs package clean FORCE

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed ## Export the bundled model, write a story with the file, measure it
	@echo; echo "== edgekit export lfm2-tiny --target executorch --int8"
	@mkdir -p $(dir $(ARTIFACT))
	@$(BIN)/edgekit export lfm2-tiny --target executorch --int8 --force -o $(ARTIFACT)
	@echo; echo "== edgekit run $(ARTIFACT) \"$(STORY)\""
	@$(BIN)/edgekit run $(ARTIFACT) "$(STORY)" --seed 1 --max-tokens 200
	@echo; echo "== edgekit bench $(ARTIFACT) -p 256 -n 64 -r 3"
	@$(BIN)/edgekit bench $(ARTIFACT) -p 256 -n 64 -r 3

demo-smollm2: $(VENV)/.installed-dev ## A real model to three engines, beside llama.cpp's formats
	@examples/smollm2.sh

test: $(VENV)/.installed-dev ## Run the fast tests
	$(PYTEST) -n 2 -m "not slow"

test-all: $(VENV)/.installed-dev ## Run all tests
	$(PYTEST) -n 2

lint: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## Check types, strictly
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Build the documentation's pages into out/site
	$(BIN)/mkdocs build --quiet --strict

package: $(VENV)/.installed-dev ## Build wheel and sdist in a temporary folder and check them
	$(PYTEST) tests/test_packaging.py

clean: ## Remove what these targets made, the virtual environment included
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for all targets. A stamp records what was installed; pyproject.toml renews it.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"edgekit needs Python 3.11 or later, found " + sys.version.split()[0] + ": make PYTHON=...")'
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing edgekit with torch and ExecuTorch into $(VENV): some minutes, once."
	@$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.llama-build | $(BIN)/python
	@echo "Installing edgekit, every engine and the development tools into $(VENV): llama.cpp is"
	@echo "compiled, which takes some minutes, once."
	@flags="$$(sed -n 's/^flags=//p' $(VENV)/.llama-build)"; \
	export CFLAGS="$$flags $$CFLAGS" CXXFLAGS="$$flags $$CXXFLAGS"; \
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" $(BIN)/python -m pip install -qq --editable ".[all,dev]"
	@touch $@ $(VENV)/.installed

# What llama.cpp is compiled for and by which flags (runtime/engines/gguf/build.py). Where that is not what
# this environment's was compiled by, and where AMX makes it matter, it is compiled anew: pip would
# keep what is installed, and in its cache has wheels that it made by other flags.
$(VENV)/.llama-build: FORCE | $(BIN)/python
	@$(BIN)/python -m edgekit.runtime.engines.gguf.build >$@.new
	@if ! cmp -s $@.new $@; then \
		if test -e $@ || grep -q '^amx=yes' $@.new; then \
			$(BIN)/python -m pip uninstall -qq --yes llama-cpp-python; \
			$(BIN)/python -m pip cache remove -qq llama_cpp_python || true; \
		fi; \
		cp $@.new $@; \
	fi
	@rm -f $@.new

FORCE:
