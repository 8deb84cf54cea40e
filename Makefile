# Two commands do all the set-up on a fresh machine with Python 3.10+: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs docs-serve release clean
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

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
