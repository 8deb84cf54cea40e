# `make demo` and `make test-fast` do all the set-up on a fresh machine with Python 3.10+; `make test` is what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test-fast test test-matrix lint coverage docs docs-serve release clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "StrataViT needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## the main job on embedded images, no network at run time
	$(BIN)/stratavit demo --out stratavit-demo --overwrite

test-fast: $(VENV)/installed lint  ## style, types and the invariants on small random models; under two minutes
	$(BIN)/python -m pytest -n auto --dist loadfile -m fast

test: $(VENV)/installed lint  ## everything that CI checks
	$(BIN)/python -m pytest -n auto --dist loadfile

test-matrix: $(VENV)/installed  ## the suite on the oldest, the usual and the newest versions; needs python3.10 and python3.13
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[matrix]'
	VENV=$(VENV) $(BIN)/python -m nox

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(VENV)/installed  ## which lines of src/ no test runs; an error if there is one without a reason
	rm -rf coverage && mkdir coverage
	$(BIN)/python -m coverage run -m pytest -n auto --dist loadfile
	$(BIN)/python -m coverage combine --quiet coverage
	$(BIN)/python -m coverage report --fail-under 100

docs: $(VENV)/installed  ## the documentation as a site, warnings are errors
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/installed
	$(BIN)/python -m mkdocs serve

$(VENV)-release/installed: release/requirements.txt
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r release/requirements.txt
	touch $@

release: $(VENV)-release/installed  ## sdist, wheel, bill of materials and checksums of the last commit in dist/
	$(VENV)-release/bin/python release/make.py

clean:
	rm -rf $(VENV) $(VENV)-release stratavit-demo site dist
