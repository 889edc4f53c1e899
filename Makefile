# `make demo` and `make test` need Python >= 3.11 with pip, and nothing else: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := demo,vision,plot,docs,dev

.PHONY: help setup demo test slow lint format types docs clean

help:
	@echo "make demo    fine-tune the embedded ViT on handwritten digits, compare methods (runs/)"
	@echo "make test    the tests, without the slow ones"
	@echo "make slow    the slow tests"
	@echo "make lint format types docs"

setup: $(READY)

# pip of the outer Python installs into .venv (--python), so a Python without ensurepip does too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "san-peft needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(READY)
	$(BIN)/san demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build build dist
