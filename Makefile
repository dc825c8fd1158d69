# make demo    train a small model on Python's own library and let it write: minutes on a laptop
# make test    run the test suite, offline
# make check   what CI runs: lint, then test
# make interop build llama.cpp from its source, some minutes, and test our exports in it
# make prove   the long counts of the goals of reliability, and the scoreboard: hours. GOALS="R1 R9" takes these only,
#              SEED=7 other random cases
#
# Each makes .venv itself, once. TORCH=cpu takes PyTorch's CPU build from PyTorch's own index: without an NVIDIA GPU
# that saves gigabytes. TORCH=pypi goes back to the build from PyPI; a build once chosen stays until the other is named.
# PYTHON=python3.12 chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
TORCH_BUILD := $(or $(TORCH),$(if $(wildcard $(VENV)/.torch-*-cpu),cpu,pypi))
TORCH_STAMP := $(VENV)/.torch-$(TORCH_VERSION)-$(TORCH_BUILD)
TORCH_FLAGS_cpu := --index-url https://download.pytorch.org/whl/cpu
TORCH_FLAGS_pypi :=
PYTHON := $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
DEMO_RUN := runs/tiny

$(if $(filter cpu pypi,$(TORCH_BUILD)),,$(error TORCH=$(TORCH) is no build of PyTorch; allowed is TORCH=cpu or TORCH=pypi))
ifeq ($(origin PYTHON)$(filter clean,$(MAKECMDGOALS)),command line)
OTHER_PYTHON := $(shell test ! -x $(BIN)/python || test "`$(PYTHON) -V`" = "`$(BIN)/python -V`" || echo yes)
$(if $(OTHER_PYTHON),$(error $(VENV) has another Python than $(PYTHON); type: make clean, then the same command again))
endif

.PHONY: demo test interop prove check lint format clean

demo: $(VENV)/.ready
	@$(BIN)/pocketlm train tiny --out $(DEMO_RUN) || { code=$$?; \
		if [ $$code = 2 ]; then echo "or: make demo DEMO_RUN=runs/demo2" >&2; fi; exit $$code; }
	@echo; echo "# pocketlm generate $(DEMO_RUN) --prompt 'def read_file(path):'"; echo
	@printf '%s' "def read_file(path):"
	@$(BIN)/pocketlm generate $(DEMO_RUN) --prompt "def read_file(path):" --max-new-tokens 200 --seed 2
	@echo; echo "next: . $(BIN)/activate; pocketlm chat $(DEMO_RUN)"

test: $(VENV)/.ready-dev
	@$(BIN)/python -m pytest

interop: $(VENV)/.ready-interop
	@$(BIN)/python -m pytest tests/interop

prove: $(VENV)/.ready-dev
	@$(BIN)/python -m pytest --prove -m goal --scoreboard=docs/reliability-scoreboard.json \
		$(if $(GOALS),"--goals=$(GOALS)") $(if $(SEED),--proof-seed=$(SEED))

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
# A pip that answers is the mark of a whole .venv: its python is linked before pip is there. pip takes one build of
# torch for the other, so only force changes it.
$(TORCH_STAMP):
	@test -n "$(PYTHON)" || { echo "pocketlm needs Python 3.11 or newer; on Debian or Ubuntu type: sudo apt install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; type: sudo apt install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): once, some minutes"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/.torch-*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS_$(TORCH_BUILD)) \
		$(if $(wildcard $(VENV)/.torch-* $(VENV)/.ready*),--force-reinstall) torch==$(TORCH_VERSION)
	@touch $@

# [fast] is left out where it has no wheel: what it does, pocketlm does without it, slower. pip's last line says why.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FAST := --only-binary gigatoken,awkward-cpp
WHY := $(VENV)/.why-not-fast
WITHOUT := echo "without gigatoken, text is tokenized more slowly: $$(tail -n 1 $(WHY))"

$(VENV)/.ready: $(TORCH_STAMP) pyproject.toml constraints.txt
	@$(PIP) $(FAST) --editable '.[fast]' 2>$(WHY) || { $(PIP) --editable . && $(WITHOUT); }
	@touch $@

$(VENV)/.ready-dev: $(TORCH_STAMP) pyproject.toml constraints.txt
	@$(PIP) $(FAST) --editable '.[dev,fast]' 2>$(WHY) || { $(PIP) --editable '.[dev]' && $(WITHOUT); }
	@touch $@ $(VENV)/.ready

# Only its library: neither its tools nor what reads pictures.
$(VENV)/.ready-interop: $(VENV)/.ready-dev
	@echo "building llama.cpp into $(VENV): once, some minutes"
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		-DLLAMA_BUILD_SERVER=OFF" $(PIP) --no-binary llama-cpp-python llama-cpp-python
	@touch $@
