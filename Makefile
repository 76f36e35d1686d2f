# Everything happens in .venv, which each target sets up for itself. `make help` lists the targets.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
INPUTS  := pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
# Test processes, and the threads of each. On 2 cores 2 x 1 is the fastest, and 2 x 2 is many times slower than either.
JOBS    ?= 2
THREADS ?= 1

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test slow demo lint format docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/installed-dev  ## create .venv with all that development needs

test: $(VENV)/installed-dev  ## run the tests (ARGS="..." goes to pytest)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

slow: $(VENV)/installed-dev  ## run the slow remainder of the tests
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadgroup $(ARGS)

demo: $(VENV)/installed-demo  ## run the demonstration (ARGS="..." goes to structmat demo)
	$(BIN)/structmat demo $(ARGS)

lint: $(VENV)/installed-dev  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/installed-docs  ## build the documentation into build/site
	$(BIN)/mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

bench: $(VENV)/installed-dev  ## run the benchmarks (ARGS="..." goes to them)
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "structmat needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	    echo "Name another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# One stamp for each extra (demo, dev, docs), so that pip runs again only when the dependencies changed.
# dev contains demo.
$(VENV)/installed-%: $(INPUTS) | $(BIN)/python
	@echo "installing structmat[$*] into $(VENV): a minute or two the first time"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(VENV)/installed-demo)
