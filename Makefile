# make demo    train a small model on Python's own library and let it write: minutes on a laptop
# make test    run the test suite, offline
# make check   what CI runs: lint, then test
#
# Each makes .venv itself, once. TORCH=cpu takes PyTorch's CPU build from PyTorch's own index: without an NVIDIA GPU
# that saves gigabytes. PYTHON=python3.12 chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--index-url https://download.pytorch.org/whl/cpu)
PYTHON := $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
DEMO_RUN := runs/tiny

.PHONY: demo test check lint format clean

demo: $(VENV)/.ready
	@$(BIN)/pocketlm train tiny --out $(DEMO_RUN)
	@echo; echo "# pocketlm generate $(DEMO_RUN) --prompt 'def read_file(path):'"; echo
	@$(BIN)/pocketlm generate $(DEMO_RUN) --prompt "def read_file(path):" --max-new-tokens 200 --seed 1
	@echo; echo "next: . $(BIN)/activate; pocketlm chat $(DEMO_RUN)"

test: $(VENV)/.ready-dev
	@$(BIN)/python -m pytest

check: lint test

lint: $(VENV)/.ready-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.ready-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# PyTorch first and by exact version: left to a dependency, pip would take the newest build with all of CUDA.
$(VENV)/.torch-$(TORCH_VERSION):
	@test -n "$(PYTHON)" || { echo "pocketlm needs Python 3.11 or newer; on Debian or Ubuntu type: sudo apt install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; type: sudo apt install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): once, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch==$(TORCH_VERSION)
	@touch $@

$(VENV)/.ready: $(VENV)/.torch-$(TORCH_VERSION) pyproject.toml constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.torch-$(TORCH_VERSION) pyproject.toml constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.ready
