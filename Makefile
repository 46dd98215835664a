# Two commands, each complete on a machine with git, make and python3 (with venv):
#   make demo    make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The stamp is written last: an interrupted installation is taken up again. pip finds what is there already.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("medseg needs Python >= 3.11, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## simulate, train, evaluate, segment and show the fluorescence task (a few minutes)
	$(BIN)/medseg demo fluorescence_tumor

# Two processes of one thread each: most of a test that starts a bundle is the import of MONAI.
test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(INSTALLED) ## run the tests that take minutes as well
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED) ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what builds and runs wrote (not runs/, not mlflow.db)
	rm -rf site build dist demo .pytest_cache .mypy_cache .ruff_cache
