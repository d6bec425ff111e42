# Two commands on a fresh machine with python3, venv and make:
#   make train    set up .venv when needed, install the package, train   (ARGS="fashion --epochs 3": passed on)
#   make test     the same with what the tests need, run the tests       (ARGS="-k cli": passed on; WORKERS=8: at once)
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/fastrbn train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --line-length 120 --select E,F,I,W,UP --ignore E501,E731 fastrbn tests benchmarks

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

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
