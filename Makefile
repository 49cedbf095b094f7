# Everything from a bare machine: python3 and make are enough.
#   make tour    see what unify does          make test    check that it does it
# Another interpreter: make test PYTHON=python3.12    More test processes: make test WORKERS=8

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
PIP     := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help tour notebooks test test-gpu lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

tour: $(READY) ## see what unify does; writes into tour/
	@echo "==> the tour: results go to tour/"
	@$(BIN)/unify tour -o tour

notebooks: $(READY) ## execute the notebooks, pictures and all, into notebooks/executed/
	@$(BIN)/python notebooks/run.py

test: lint ## style and every test that needs no GPU
	@echo "==> running the tests in $(WORKERS) processes"
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "not gpu"

test-gpu: $(READY) ## the tests that need a GPU, every model among them; OUTCOMES=FILE goes on where a run was cut off
	@$(BIN)/unify verify linear_attention --device cuda
	@echo "==> running the GPU tests in $(WORKERS) processes; those that fill a GPU's memory in one"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadgroup -m gpu $(if $(OUTCOMES),--outcomes $(OUTCOMES))

lint: $(READY) ## check style and formatting
	@echo "==> checking style and formatting with ruff"
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --check --quiet --output-format concise || { echo "==> not formatted: make format"; exit 1; }

format: $(READY) ## apply ruff's fixes and formatting; strip the notebooks
	@$(BIN)/ruff check --fix --quiet; $(BIN)/ruff format
	@$(BIN)/python notebooks/run.py --strip

bench: $(READY) ## measure the kernels
	@$(BIN)/unify bench

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) tour atlas notebooks/executed build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment that no longer runs is made again. setuptools comes first, from the constraints,
# so that the editable install is built with a tested version rather than today's.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	    { echo "==> unify needs Python 3.11, 3.12 or 3.13: choose one with PYTHON=..."; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || \
	    { echo "==> making a virtual environment in $(VENV)" && $(PYTHON) -m venv --clear $(VENV); }
	@echo "==> installing unify and what it needs into $(VENV) (torch is large: the first time takes minutes)"
	@$(PIP) install -c constraints.txt setuptools wheel
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@
