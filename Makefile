# `make demo` and `make test` set up everything in .venv; nothing else is needed but Python >= 3.11.
# Another interpreter: make demo PYTHON=python3.12.  Another torch build: see "Which torch" in docs/install.md.
PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test slow lint docs notebooks clean

demo: $(VENV)/.installed
	$(VENV)/bin/unbraid train --out runs/demo --overwrite

# one thread per test process: two threads on two busy cores can be ten times slower than one
ALONE = OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1

test: $(VENV)/.dev
	$(ALONE) $(VENV)/bin/python -m pytest -n auto --dist worksteal

# only files that have such a test are collected
slow: $(VENV)/.dev
	$(ALONE) $(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow \
	  $$(grep -rl "mark\.slow" tests --include="test_*.py")

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the site, in build/site; --strict: a warning is an error.  The variable silences an advertisement, no warning of ours
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

# what the tutorials print, anew
notebooks: $(VENV)/.dev
	$(VENV)/bin/python docs/site/notebooks.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "unbraid needs Python 3.11 or newer; $(PYTHON) is older. Use make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the project then keeps whichever build is there
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing torch and unbraid into $(VENV) ..."
	$(PIP) -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache
