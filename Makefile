# shardwright: `make train` trains a small GPT on bundled text, `make test` runs the test suite.
#
# Everything happens in .venv, which these targets make and fill; nothing needs to be activated.
# A stamp in .venv remembers what was installed, so that a second call installs nothing again.
#   make PYTHON=python3.12 train     another Python
#   make TESTS=tests/model test      a part of the suite
#   pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are respected.

PYTHON ?= python3
VENV   ?= .venv
TESTS  ?= tests
PYTEST_FLAGS ?=
MINUTES ?= 20
PROMPT ?= The people of the United States

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip -qq --disable-pip-version-check
PINS := constraints.txt
INSTALL_INPUTS := setup.py pyproject.toml $(PINS)
TEST_EXTRAS := data,hf,export,deepspeed,accelerate,ray,dev

BENCHMARKS := startup step stream objectives kill faults speedrun cram zero scaling watch

.DEFAULT_GOAL := help
.PHONY: help venv dev train test sample lint bench bench-gpu bench-peers clean

help:
	@echo "make train      make the environment, prepare the bundled English text, train a small GPT, print a sample"
	@echo "make test       the same environment with the test extras, then the test suite"
	@echo "make sample     20 minutes of today's cells of the equivalence matrix (MINUTES=5, SEED=... change that)"
	@echo "make lint       ruff, mypy and the layering test"
	@echo "make bench      the benchmarks on this machine's processor; results in benchmarks/results/"
	@echo "make bench-gpu  the benchmarks on the GPU that is here, one report"
	@echo "make venv       only the environment (.venv); make dev adds the test extras"
	@echo "make clean      remove caches and build output; keeps .venv, data/ and runs/"

# ---------------------------------------------------------------------------------------- environment

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "shardwright: no $(PYTHON) here; install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
	  echo "shardwright: $$($(PYTHON) --version) found, 3.11 to 3.14 needed; install one (Debian: apt-get install python3.11 python3.11-venv) and name it: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "shardwright: $$($(PYTHON) --version) cannot make an environment; install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(INSTALL_INPUTS) | $(VENV)/.made
	@echo "==> Installing $$(grep '^torch==' $(PINS)) and the other pinned dependencies (once; takes a few minutes)"
	@$(PIP) install --constraint $(PINS) "$$(grep '^torch==' $(PINS))"
	@$(PIP) install --constraint $(PINS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(VENV)/.installed
	@echo "==> Installing the test extras ($(TEST_EXTRAS))"
	@$(PIP) install --constraint $(PINS) --editable '.[$(TEST_EXTRAS)]'
	@touch $@

venv: $(VENV)/.installed

dev: $(VENV)/.installed $(VENV)/.installed-dev

# ------------------------------------------------------------------------------------------------ jobs

data/english/manifest.json: | $(VENV)/.installed
	@echo "==> Preparing the bundled English text into data/english"
	@$(BIN)/shardwright prepare bundled:english --output data/english tokenizer.vocab_size=8192

train: $(VENV)/.installed data/english/manifest.json
	@echo "==> Training configs/english.yaml; stop with Ctrl-C at any time, the next \`make train\` goes on"
	@$(BIN)/shardwright train configs/english.yaml
	@echo "==> A sample of what it writes"
	@$(BIN)/shardwright generate runs/english --prompt "$(PROMPT)"

test: dev
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

sample: dev
	@EQUIVALENCE_MINUTES=$(MINUTES) $(if $(SEED),EQUIVALENCE_SEED=$(SEED)) \
	  $(BIN)/python -m pytest -q $(PYTEST_FLAGS) tests/equivalence/test_sample.py

lint: dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

bench: dev
	@set -e; for name in $(BENCHMARKS); do \
	  echo "==> benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

bench-peers: dev
	@$(BIN)/python benchmarks/common.py

bench-gpu: dev
	@$(BIN)/python benchmarks/gpu.py

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find shardwright tests benchmarks configs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
