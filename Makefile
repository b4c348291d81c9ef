# Everything from a fresh clone; only Python 3.11, make and gcc are assumed.
#   make demo        fill masks with the model in the box
#   make demo-train  train a small model on real English and fill masks with it
#   make test        the tests (two workers)
#   make check       lint, format, types, import contracts, sizes
#   make install     only the virtual environment, in .venv
SHELL := bash
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(abspath $(VENV))/bin/python
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: demo demo-train test check install clean

install: $(STAMP)

# The stamp's name holds the checksum of what defines the environment, so a changed pin makes a new environment.
# torch comes first and exactly: where pip knows a local build of it (CPU only), that is the one taken.
# PEP 517, also for packages without a pyproject.toml (seqeval): what they are built with is put in place by pip, whole.
$(STAMP):
	rm -rf $(VENV)
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "$(TORCH)"
	$(PYTHON) -m pip install --quiet --use-pep517 -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	PYTHON="$(PYTHON)" bash tools/demo.sh

demo-train: $(STAMP)
	PYTHON="$(PYTHON)" bash tools/demo_train.sh

# One thread a worker: two workers on two cores, and the same numbers whatever the machine.
test: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) tools/check_sizes.py

clean:
	rm -rf $(VENV) .cache build dist
