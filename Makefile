# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# PYTHON is only used to make the virtual environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

CLIENTS := .venv-clients

.PHONY: demo test test-long test-clients fuzz check format bench clean

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "imgbatch needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages, so that a second `make` installs nothing.
$(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$*]'
	touch $@

demo: $(VENV)/demo.installed
	$(BIN)/python -m jobs.demo

test: $(VENV)/test.installed $(VENV)/demo.installed
	$(BIN)/python -m pytest -m 'not long'

test-long: $(VENV)/test.installed $(VENV)/demo.installed
	$(BIN)/python -m pytest -m long -rP

# Programs that read our tables, in an environment of their own: none of the jobs needs them, and Spark alone takes 500 MB.
$(CLIENTS)/installed: tests/clients/requirements.txt constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

test-clients: $(VENV)/test.installed $(CLIENTS)/installed
	JOBS_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients -W default -rs tests/clients

fuzz: $(VENV)/test.installed
	$(BIN)/python -m tests.fuzz $(FUZZ)

# Daft comes without its dependencies, since it would bring an older pyarrow; what it needs is there.
bench: $(VENV)/test.installed $(VENV)/demo.installed
	$(PIP) --no-deps daft==0.7.26
	$(BIN)/python -m tests.bench.bench $(BENCH)

check: $(VENV)/check.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/check.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLIENTS) demo-output fuzz-findings build *.egg-info .pytest_cache .mypy_cache .ruff_cache
