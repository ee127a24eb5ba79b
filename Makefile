# Every target installs what it needs first, into .venv, once.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test test-all lint type imports check docs wheel-test format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS=\"...\" is passed on by run and test,"
	@echo "  WORKERS=4 runs the tests in four processes"

install: $(STAMP) ## create .venv and install the project with its development tools

run: $(STAMP) ## five specialists, few labels: the agent, a gate and equal weights on the bundled digits
	$(BIN)/python experiments/run.py --recipe specialists_digits --algo heldout_pg,gate,aver $(ARGS)

test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(STAMP) ## run all the tests; some need a GPU
	$(BIN)/python -m pytest -n $(WORKERS) -m "" $(ARGS)

lint: $(STAMP) ## check style, formatting and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

type: $(STAMP) ## check the types
	$(BIN)/mypy

imports: $(STAMP) ## check that imports run one way
	$(BIN)/lint-imports

check: lint type imports test ## lint, type, imports and test

docs: $(STAMP) ## build the pages into site/; a link or a name that leads nowhere is an error
	$(BIN)/zensical build --strict --clean

wheel-test: $(STAMP) ## install the built wheel elsewhere and run it
	.ci/wheel-test

format: $(STAMP) ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove build products and caches; .venv and runs stay
	rm -rf build dist site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find mtkd_env agents experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an install that failed is tried again.
$(STAMP): pyproject.toml
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "error: '$(PYTHON)' is not Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }; \
	  echo "$(PYTHON) -m venv $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
