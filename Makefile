# make demo | test | test-slow | fuzz | lint | bench | clean. Each makes .venv on first use, with the versions in constraints.txt.
# PYTHON=/path/to/python picks the interpreter that .venv is made with.

VENV := .venv
PY   := $(VENV)/bin/python
# Worker processes of `make test`; each computes on one thread.
WORKERS ?= 2

# The first Python that is new enough and can make virtual environments; 3.11 comes first, as CI runs it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow fuzz mutants lint format bench survive clean

help:
	@echo "make demo    generate volumes from the example masks with the shipped weights, into out/demo/"
	@echo "make test    the tests"
	@echo "make test-slow  the tests that take minutes: every recipe of docs/recipes.md, trained and sampled at a small size"
	@echo "make lint    ruff (lint and format) and pyright; make format applies what ruff can fix"
	@echo "make fuzz    10,000 damaged files for everything that reads files, each read right or refused by name"
	@echo "make bench   every figure of docs/performance.md, peers in the same run, into out/bench/ (half an hour)"
	@echo "make survive kills training, generation and evaluation at random moments and compares the ends, into out/survival.json"
	@echo "make mutants plants the faults of tests/mutants/ one at a time; at least 95 % of each room must be noticed, into out/mutants.jsonl"
	@echo "make clean   remove .venv and out/"

demo: $(VENV)/installed
	$(PY) demo.py

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m slow

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# CASES damaged files for everything that reads files; another SEED makes others.
CASES ?= 10000
SEED  ?= 0
fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PY) tests/helpers/fuzz.py --count $(CASES) --seed $(SEED) --processes $(WORKERS) --output out/fuzz.json

# Resumes: faults whose code and tests are as they were are not tried again.
mutants: $(VENV)/installed-dev
	$(PY) -m tools.mutants --output out/mutants.jsonl --workers $(WORKERS)

# The peers are MONAI's networks, which need einops: an extra of dev.
bench: $(VENV)/installed-dev
	$(PY) -m benchmarks.speed.run --output out/bench

survive: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.survival --kills 30 --output out/survival.json

clean:
	rm -rf $(VENV) out

$(PY):
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is older than the files that it depends on when they changed, and pip then brings .venv up to date.
$(VENV)/installed: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@ $(VENV)/installed
