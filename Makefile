PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-matrix lint docs docs-check bench mutants reproduce reproduce-quick clean

# The stamp is written last, so that an interrupted install is repeated.
$(STAMP): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,docs,lint]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m sklearn_rails.demo

# One torch thread for each of the two workers, which otherwise compete for two cores. Fails below the
# coverage in pyproject.toml.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not slow and not browser" --cov \
		--cov-report=term-missing

# Statistical tests of p-values and alarm rates, and others that take minutes. Without coverage. The
# counts at the end, which the docs show, go into a file with COUNTS=docs/develop/tested.csv.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m slow $(if $(COUNTS),--counts "$(COUNTS)")

# The main tests in an environment for each line of tests/matrix.py, such as NAMES="minimum newest".
test-matrix:
	$(PYTHON) tests/matrix.py $(NAMES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# One thread: the examples train small networks, which threads that compete slow down tenfold.
docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/_build/html

# Needs chromium and chromedriver, such as Debian's packages chromium and chromium-driver.
docs-check: docs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -m browser tests/browser

# Small faults that are put into the code at random, and found by the tests or not; SEED and SIZE
# choose the sample. A second call runs only those again that were not found.
SEED ?= 0
SIZE ?= 400

mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --size $(SIZE) --seed $(SEED)

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/bench_limits.py

# DATA_HOME is a folder with mnist.npz and the like; without it they are downloaded from OpenML.
ROWS ?= 1000
DATA := $(if $(DATA_HOME),--data-home "$(DATA_HOME)")

reproduce: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[reproduce]"
	for script in table1 saturation layers sensing_defaults study attacks certify detect triage memory \
		figure2; do \
		$(BIN)/python benchmarks/reproduce/$$script.py --rows $(ROWS) $(DATA) || exit 1; \
	done

# Minutes instead of hours: the digits, which need no file, or MNIST if there is a folder with it.
# With one torch thread, since two wait for each other when the machine is busy.
QUICK := $(if $(DATA_HOME),mnist $(DATA),digits) --settings benchmarks/reproduce/quick.toml \
	--results reproduce_quick

reproduce-quick: $(STAMP)
	for script in layers sensing_defaults table1; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reproduce/$$script.py $(QUICK) || exit 1; \
	done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reproduce/figure2.py $(QUICK) --rows 20

clean:
	rm -rf $(VENV) .venv-matrix docs/_build docs/auto_examples docs/api/generated docs/api/backreferences docs/results demo_results \
		reproduce_quick mutants
