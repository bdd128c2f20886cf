# groundscope from a bare checkout: `make demo`, `make test`. Needs make, Python 3.11 or newer with venv, and pip's registry.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 …` overrides it.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo "$$p"; break; fi; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
JOBS ?= 2
ARGS ?=
REPORT ?= runs/check/report.html
comma := ,

.PHONY: help demo test validate lint style types format bench docs notebooks check-report install install-dev clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: install ## run every stage on the embedded model and say where the report is
	@$(BIN)/groundscope $(ARGS)
	@if [ -f runs/default/report.html ]; then echo "The report is at $(CURDIR)/runs/default/report.html"; fi

test: style ## lint and all tests; types are checked while the tests run
	@output=$$(mktemp); $(MAKE) --no-print-directory types >"$$output" 2>&1 & types=$$!; \
	trap 'kill $$types 2>/dev/null || true; rm -f "$$output"' EXIT; \
	failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS) || failed=$$?; \
	wait $$types || { failed=$$?; echo "The types are wrong:"; }; \
	cat "$$output"; exit $$failed

validate: install-dev ## the long checks of validation/: error rates and coverage by simulation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(if $(ARGS),$(ARGS),validation)

lint: style types ## ruff, formatting, import ladder, types

style: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install-dev
	@# Above its default limit of 4 GB the checker throws away what it knows and starts again.
	NODE_OPTIONS=--max-old-space-size=8192 $(BIN)/basedpyright

format: install-dev ## put imports in order and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: install-dev ## every benchmark, one after the other; ARGS=--quick for a minute each
	@failed=; for b in benchmarks/[!_]*.py; do \
		[ -e "$$b" ] || continue; \
		echo "== $$b"; $(BIN)/python "$$b" $(ARGS) || failed="$$failed $$b"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

docs: install-dev ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "The documentation is at $(CURDIR)/site/index.html"

notebooks: install-dev ## run the notebooks on runs/default and write them into docs/notebooks
	@if [ ! -f runs/default/report.html ]; then $(BIN)/groundscope; fi
	$(BIN)/python -m experiments.notebooks.render

check-report: $(VENV)/.installed-report ## look at a small run's report in Chromium; REPORT=FILE for another
	@if [ ! -f $(REPORT) ]; then $(BIN)/groundscope name=check data.n_images=80 data.test_images=40 patch.pairs=12 'steer.strengths=[1,2]'; fi
	$(BIN)/python -m experiments.report.browser_check $(REPORT) --screenshots runs/screenshots

install: $(VENV)/.installed ## create .venv and install groundscope in it

install-dev: $(VENV)/.installed-dev ## the same with what lint and tests need

clean: ## remove .venv, caches and builds; never runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing venv puts in place: where it is, the environment is whole.
$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then \
		echo "groundscope needs Python 3.11 or newer; none of these is: $(CANDIDATES)." >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3 …" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "groundscope needs Python 3.11 or newer; $(PYTHON) is not." >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
		echo "$(PYTHON) cannot create virtual environments: its venv or ensurepip module is missing." >&2; \
		echo "Debian, Ubuntu: apt install python3-venv (or python3.X-venv for a python3.X), then run make again." >&2; exit 1; fi
	@echo "[1/4] creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)

REQUIREMENTS := pyproject.toml constraints.txt

define install
	@echo "[2/4] installing torch (the largest part: a minute or more)"
	@$(PIP) torch
	@echo "[3/4] installing groundscope and $(1)"
	@$(PIP) --editable '$(2)'
	@echo "[4/4] checking that it fits together"
	@$(BIN)/python -m pip --disable-pip-version-check check
endef

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/pip
	$(call install,what it needs,.)
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/pip
	$(call install,what it$(comma) lint and tests need,.[dev])
	@touch $(VENV)/.installed $@

$(VENV)/.installed-report: $(REQUIREMENTS) | $(VENV)/.installed
	@$(PIP) --editable '.[report]'
	@touch $@
