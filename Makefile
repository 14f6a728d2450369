# Everything runs in .venv with the versions of requirements.lock. `make` lists the targets.

.DEFAULT_GOAL := help
.PHONY: help install lint test test-slow bench demo lock clean

# default, tf221 or tpu: docs/design.md, "Platforms".
ENVIRONMENT ?= default
ifeq ($(ENVIRONMENT),default)
  VENV ?= .venv
  LOCK := requirements.lock
  VERSIONS := 3.11
else ifeq ($(ENVIRONMENT),tf221)
  VENV ?= .venv-tf221
  LOCK := requirements-tf221.lock
  VERSIONS := 3.13 3.12
else ifeq ($(ENVIRONMENT),tpu)
  VENV ?= .venv-tpu
  LOCK := requirements-tpu.lock
  VERSIONS := 3.12
  # Without a TPU, libtpu asks for its place for minutes.
  export TPU_SKIP_MDS_QUERY := 1
else
  $(error ENVIRONMENT=$(ENVIRONMENT): expected default, tf221 or tpu)
endif
# Interpreter of the environment; by default one of VERSIONS on PATH or in pyenv.
PYTHON ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.9
DEMO_DIR ?= runs/demo
# Number of test processes. Each needs about 2 GB.
TEST_PROCESSES ?= 2
# What `make test` and `make test-slow` run.
TESTS ?= tests

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Create .venv and install the locked versions; ENVIRONMENT=tf221 or tpu, PYTHON=, VENV= choose others

$(BIN)/python:
	@for p in $(or $(PYTHON),$(foreach v,$(VERSIONS),python$(v) $(HOME)/.pyenv/versions/$(v).*/bin/python$(v)) python3); do \
	    case " $(VERSIONS) " in *" $$("$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) "*) python=$$p; break;; esac; done; \
	test -n "$$python" || { echo "error: no Python $(VERSIONS) found$(if $(PYTHON), at PYTHON=$(PYTHON)); the environment $(ENVIRONMENT) needs it: install it and run make install again" >&2; exit 2; }; \
	echo "creating $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)

# Compiled here, because with PYTHONDONTWRITEBYTECODE, as in many containers, each process would compile TensorFlow again (14 s).
$(STAMP): $(LOCK) pyproject.toml | $(BIN)/python
	@echo "installing uv $(UV_VERSION) into $(VENV)"
	@$(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "installing $(LOCK) into $(VENV)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet --compile-bytecode $(LOCK)
	@echo "installing this project into $(VENV), editable"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lint: install ## Check format, style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline trainer docker/healthcheck.py
	$(BIN)/lint-imports

test: install ## Run the tests, without the slow ones and the benchmarks; TESTS= chooses files
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(TESTS)

test-slow: install ## Run the slow tests
	$(BIN)/python -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile --timeout=1800 $(TESTS)

bench: install ## Run the benchmarks (tests/benchmarks)
	$(BIN)/python -m pytest -m benchmark tests/benchmarks

demo: install ## Precompute, train and compare on the embedded default, in DEMO_DIR (runs/demo)
	$(BIN)/python -m trainer.demo --workdir=$(DEMO_DIR)

COMPILE = $(BIN)/uv pip compile pyproject.toml --no-header
# tf-keras requires the package tensorflow, whose files those of tensorflow-tpu replace.
lock: install ## Resolve the extras of each environment into its lock file
	$(COMPILE) --all-extras --python-version 3.11 -o requirements.lock
	$(COMPILE) --universal --python-version 3.12 $(foreach e,tf221 beam dataflow report demo s3 gcs dask test lint,--extra $(e)) -o requirements-tf221.lock
	$(COMPILE) --python-version 3.12 $(foreach e,tpu report demo s3 gcs test,--extra $(e)) --no-emit-package tensorflow -o requirements-tpu.lock

clean: ## Remove caches and build output (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
