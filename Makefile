# Two commands do all the set-up on a fresh machine with Python 3.10+: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-matrix lint docs docs-serve clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "StrataViT needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## the main job on embedded images, no network at run time
	$(BIN)/stratavit demo --out stratavit-demo --overwrite

test: $(VENV)/installed lint  ## everything that CI checks
	$(BIN)/python -m pytest -n auto --dist loadfile

test-matrix: $(VENV)/installed  ## the suite on the oldest, the usual and the newest versions; needs python3.10 and python3.13
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[matrix]'
	VENV=$(VENV) $(BIN)/python -m nox

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## the documentation as a site, warnings are errors
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/installed
	$(BIN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) stratavit-demo site
