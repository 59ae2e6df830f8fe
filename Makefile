# make sweep, test, test-faults, test-clusters, soak: each installs what it needs into .venv first, from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
FILE ?= experiments/beta_schedule.yaml
STORAGE ?= runs

.PHONY: sweep ui test test-faults test-clusters soak check schema pictures tour lock

sweep: .venv/run.stamp
	$(BIN)/python -m orchestrator.sweep $(FILE) --storage $(STORAGE)

ui: .venv/run.stamp
	$(BIN)/python -m orchestrator.ui --storage $(STORAGE)

test: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not faults and not clusters"

test-faults: .venv/dev.stamp
	$(BIN)/python -m pytest -m faults

test-clusters: .venv/dev.stamp
	$(BIN)/python -m pytest -m clusters --numprocesses 0 -s

# Ten minutes of kills of all that a sweep consists of, after which nothing may be lost.
soak: .venv/dev.stamp
	$(BIN)/python benchmarks/soak.py

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Takes the pictures of docs/ that show a finished sweep in MLflow; needs Debian's chromium.
pictures: .venv/dev.stamp
	PYTHONPATH=. $(BIN)/python tests/browsing.py $(STORAGE) $(notdir $(basename $(FILE))) docs

.venv/run.stamp: pyproject.toml requirements.lock
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable .
	touch $@

.venv/dev.stamp: pyproject.toml requirements.lock
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev,inception]'
	touch $@ .venv/run.stamp

# What editors know of experiment files, and the tables of their settings in docs/.
schema: .venv/run.stamp
	$(BIN)/python -m orchestrator.schema --output experiments/schema.json
	$(BIN)/python -m orchestrator.schema nightly --output experiments/nightly.schema.json
	$(BIN)/python -m orchestrator.schema --markdown --output docs/experiment-file.md
	$(BIN)/python -m orchestrator.schema nightly --markdown --output docs/nightly.md

# Runs docs/tour.ipynb and stores it with its outputs.
tour: .venv/dev.stamp
	PYTHONPATH=.:tests $(BIN)/python tests/cluster/test_tour.py

# Writes requirements.lock anew: the newest versions that pyproject.toml allows, with torch where it is pinned.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet torch==2.13.0 --editable '.[dev,inception,cluster]'
	build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//' > requirements.lock
	rm -rf build/lock
