# Everything runs in .venv with the versions of requirements.lock. `make` lists the targets.

.DEFAULT_GOAL := help
.PHONY: help install lint test test-slow bench demo lock clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.9
DEMO_DIR ?= runs/demo
# Number of test processes. Each needs about 2 GB.
TEST_PROCESSES ?= 2

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Create .venv and install the locked versions

$(PYTHON):
	@python=$$(for p in python3.11 python3; do \
	    "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done); \
	test -n "$$python" || { echo "error: no Python 3.11 on PATH (python3.11, python3); TensorFlow 2.15 needs it: install it and run make install again" >&2; exit 2; }; \
	echo "creating $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)

$(STAMP): requirements.lock pyproject.toml | $(PYTHON)
	@echo "installing uv $(UV_VERSION) into $(VENV)"
	@$(PYTHON) -m ensurepip >/dev/null
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "installing requirements.lock into $(VENV)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet requirements.lock
	@echo "installing this project into $(VENV), editable"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lint: install ## Check format, style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline trainer docker/healthcheck.py
	$(BIN)/lint-imports

test: install ## Run the tests, without the slow ones and the benchmarks
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: install ## Run the slow tests
	$(PYTHON) -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile --timeout=1800

bench: install ## Run the benchmarks (tests/benchmarks)
	$(PYTHON) -m pytest -m benchmark tests/benchmarks

demo: install ## Precompute, train and compare on the embedded default, in DEMO_DIR (runs/demo)
	$(PYTHON) -m trainer.demo --workdir=$(DEMO_DIR)

lock: ## Resolve all extras into requirements.lock
	@test -x $(PYTHON) || { echo "error: no $(VENV): run make install first" >&2; exit 2; }
	@test -x $(BIN)/uv || $(PYTHON) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version 3.11 --no-header -o requirements.lock

clean: ## Remove caches and build output (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
