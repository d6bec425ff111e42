# Two commands on a fresh machine with python3, venv and make:
#   make train    set up .venv when needed, install the package, train   (ARGS="fashion --epochs 3": passed on)
#   make test     the same with what the tests need, run the tests       (ARGS="-k cli": passed on; WORKERS=8: at once)
# For contributors: make lint (ruff and mypy), make format, make docs (the site, in build/site).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test lint format docs clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/fastrbn train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check fastrbn tests benchmarks
	$(BIN)/ruff format --check fastrbn tests benchmarks
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format fastrbn tests benchmarks

# The site's pages link to READMEs, results and sources elsewhere in the repository, so it is built from a copy of these.
docs: $(VENV)/.installed-docs
	rm -rf build/pages build/site
	mkdir -p build/pages
	tar -cf - --exclude __pycache__ --exclude .envs README.md CONTRIBUTING.md CHANGELOG.md LICENSE \
	    docs fastrbn nbs benchmarks tests/plugin_example tests/recipes | tar -xf - -C build/pages
	$(BIN)/zensical build --strict

# Stamps: written once pip is through, out of date as soon as the dependencies change. The install is editable, so a
# changed module needs nothing.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e .
	touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e ".[test,dev]"
	touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e ".[docs]"
	touch $(VENV)/.installed $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
