# `make` lists the targets. Each creates .venv on first use, with the versions in constraints.txt.
# PYTHON=/path/to/python selects the interpreter of .venv.

VENV := .venv
PY   := $(VENV)/bin/python
# Worker processes of `make test`, with one thread each.
WORKERS ?= 2

# The first Python that is new enough and can make virtual environments; 3.11 comes first, as CI runs it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo docs figures test test-slow test-lowest fuzz mutants lint format bench survive clean

help:
	@echo "make demo         sample from the shipped weights into out/demo/"
	@echo "make test         run the tests; WORKERS=8 for more processes"
	@echo "make test-slow    run the tests that take minutes: every recipe, trained and sampled at a small size"
	@echo "make test-lowest  run a quick part of the tests with the lowest versions that pyproject.toml allows"
	@echo "make docs         write the documentation site into out/site/"
	@echo "make figures      measure again what the code has changed, and rewrite the pages with figures (days)"
	@echo "make lint         run ruff and pyright, as CI does"
	@echo "make format       apply ruff's fixes"
	@echo "make fuzz         read 10,000 damaged files; each must be read correctly or refused by name"
	@echo "make bench        measure docs/performance.md, peers included, into out/bench/ (half an hour)"
	@echo "make survive      kill training, generation and evaluation at random moments, into out/survival.json"
	@echo "make mutants      plant the faults of tests/mutants/; the tests must notice 95 % per package, into out/mutants.jsonl"
	@echo "make clean        remove .venv and out/"

demo: $(VENV)/installed
	$(PY) demo.py

# Two plugins print that another program may replace mkdocs.
docs: $(VENV)/installed-dev
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "the site: out/site/index.html; $(PY) -m mkdocs serve shows it with search"

# Resumes at the same commit. DATA is the folder of the data sets.
DATA ?= data
figures: $(VENV)/installed-dev
	$(PY) -m tools.figures --stale --data $(DATA)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m slow -o faulthandler_timeout=3600

# On Linux, the lowest PyTorch of the package index is a CUDA build of gigabytes: TORCH=2.13.0+cpu asks for another one,
# and UV_FIND_LINKS=FOLDER names the folder with its file. TESTS=tests runs all tests.
LOWEST := $(VENV)/lowest
TORCH  ?=
TESTS  ?= tests/autoencoder tests/cli tests/diffusion tests/files tests/interop $(wildcard tests/pipelines/test_pipeline*.py) \
	tests/pipelines/test_diffusers_machinery.py
test-lowest: $(LOWEST)/installed-$(or $(TORCH),lowest)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# CASES damaged files; another SEED damages others.
CASES ?= 10000
SEED  ?= 0
fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PY) tests/helpers/fuzz.py --count $(CASES) --seed $(SEED) --processes $(WORKERS) --output out/fuzz.json

# Resumes: faults with unchanged code and tests are skipped.
mutants: $(VENV)/installed-dev
	$(PY) -m tools.mutants --output out/mutants.jsonl --workers $(WORKERS)

# The peers are MONAI's networks, which need einops from the extra dev.
bench: $(VENV)/installed-dev
	$(PY) -m benchmarks.speed.run --output out/bench

survive: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.survival --kills 30 --output out/survival.json

clean:
	rm -rf $(VENV) out

$(PY):
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# When these files change, they are newer than the stamp, and pip updates .venv.
$(VENV)/installed: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@ $(VENV)/installed

$(LOWEST)/installed-$(or $(TORCH),lowest): pyproject.toml | $(PY)
	$(PY) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]' $(if $(TORCH),torch==$(TORCH))
	@touch $@
