# One virtual environment, exact pins. Stamps in it remember what was installed, so a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := api migrations orchestrator worker
WORKERS ?= 3

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test soak check format browser lock clean

help: ## Say what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1 \t/' | expand -t 18

install: $(VENV)/.installed ## Make .venv and install Caddie into it, editable

demo: $(VENV)/.installed ## Run a small real sweep, or resume it
	@$(BIN)/caddie demo

test: $(VENV)/.installed browser ## Run the tests (WORKERS=1 for one at a time, ARGS=... for pytest)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/.installed browser ## Run the tests that take many minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --timeout 0 $(ARGS)

check: $(VENV)/.installed ## Check format, lint, types and the import rule
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES) tests
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed ## Format the code and fix what ruff can fix safely
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

browser: # The page's tests drive Debian's Chromium.
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium and chromium-driver for the browser tests"; \
		{ apt-get -qq update && \
		  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium chromium-driver; \
		} >/dev/null || echo "Chromium could not be installed: the browser tests will skip"; \
	else echo "No chromium and chromedriver here: the browser tests will skip"; fi

lock: ## Write requirements.lock anew: the newest versions that pyproject.toml allows
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install -qq '.[dev]' 'torch==2.13.0'
	@{ head -n 1 requirements.lock; \
	   build/lock/bin/python -m pip freeze --all --exclude pip --exclude caddie | sed 's/+cpu$$//'; \
	 } > build/requirements.lock && mv build/requirements.lock requirements.lock

clean: ## Remove the virtual environment and every cache
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.requirements: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
		"Caddie needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: say make PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing requirements.lock into $(VENV) (PyTorch and Ray are large: this takes some minutes once)"
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@
