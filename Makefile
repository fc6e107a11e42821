# heterokd: `make quickstart` and `make test` do everything on a fresh machine with Python 3.11 to 3.13.

ifeq ($(filter else-if,$(.FEATURES)),)
$(error GNU make 3.81 or newer is needed, this is $(MAKE_VERSION))
endif

# `make PYTHON=/path/to/python3.12` chooses the interpreter; default: the first suitable candidate.
PYTHON ?=
VENV := .venv
FAULTS ?=
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-faults lint format docs bench bench-search ui clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

install: $(STAMP) ## Create .venv and install everything in it

# Installs again if the pinned versions change, and if .venv is broken or incomplete.
ifneq ($(shell $(BIN)/python -c 'import heterokd, ray, torch' >/dev/null 2>&1 && echo works),works)
.PHONY: $(STAMP)
endif
$(STAMP): requirements.lock pyproject.toml
	@python=; for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "heterokd needs Python 3.11, 3.12 or 3.13 with venv; found: $$(python3 --version 2>&1 || echo none)." >&2; \
	  echo "Install one (Debian: apt-get install python3 python3-venv), or say which: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

quickstart: $(STAMP) ## Search on real handwritten digits; write a report and register a student
	$(BIN)/heterokd search experiments/quickstart.yaml --resume

# File by file, since tests of a file share fixtures; groups of pytest-xdist 3.8 have no effect with pytest 9.2.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP) lint ## Lint, type-check and test every module and method, in minutes
	$(PYTEST) -m "not slow and not thorough"

test-all: $(STAMP) ## Run the tests that `make test` leaves out: long tests, and further cases
	$(PYTEST) -m "(slow or thorough) and not faults"

test-faults: $(STAMP) ## Kill trials, nodes, drivers and servers during searches (FAULTS selects some, as pytest -k)
	$(BIN)/python -m pytest -m faults -k "$(FAULTS)"

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Regenerate the pages of methods, docs/api.md, the architecture's picture and the papers' experiments; build site/
	$(BIN)/python -m heterokd.cli.catalogue > docs/methods.md
	$(BIN)/python docs/method_pages.py
	$(BIN)/python docs/api_page.py > docs/api.md
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python -m heterokd.networks.families > docs/networks.md
	$(BIN)/python experiments/papers/generate.py
	$(BIN)/python -m mkdocs build --strict --quiet

bench: $(STAMP) ## Reproduce the measurements of benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

bench-search: $(STAMP) ## Build missing tables of the search benchmark, and run every strategy on them
	$(BIN)/python -m benchmarks.search_efficiency build
	$(BIN)/python -m benchmarks.search_efficiency run --out benchmarks/search_efficiency.json \
	  --picture docs/pictures/search_efficiency.png

ui: $(STAMP) ## Serve MLflow's UI on 127.0.0.1
	$(BIN)/heterokd ui

clean: ## Remove .venv and caches, but no results
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
