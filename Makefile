# Two commands set everything up on a fresh machine with Python (3.10 or newer) and make:
#   make demo    train on the embedded handwritten digits, sample, measure; ends in runs/demo
#   make test    the test suite
# Beyond them: make test-slow (kills, compiled training, long experiments, every case of the fuzz suite), make
# test-extras (adapters and peers, oldest torch), make docs, make lint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, one thread each: small tensors gain nothing from more threads.
WORKERS ?= 2
# Each takes neighbouring tests, so that hardly any fixture of a file or folder is made twice.
SHARED := -n $(WORKERS) --dist worksteal

# Environments of `make test-extras`: everything optional, and the oldest torch that is allowed.
EXTRAS := .venv-extras
OLDEST := .venv-oldest

.PHONY: demo test test-slow test-extras docs lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/cdm train digits --out runs/demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED)

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

$(EXTRAS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --upgrade pip
	$(EXTRAS)/bin/python -m pip install --quiet -e '.[all]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -e '.[dev]' 'torch>=2.6,<2.7' 'torchvision<0.22' 'numpy<2' 'pyarrow<20'
	touch $@

# Adapters and peers with their packages; the type checkers beside them; the core suite with the oldest torch.
test-extras: $(EXTRAS)/.installed $(OLDEST)/.installed
	$(EXTRAS)/bin/python -m pytest -m slow tests/test_docs.py -k type_checkers
	OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest $(SHARED)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(SHARED) tests

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

# The site, in docs/_build/html; its tutorials are run, a warning is an error.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m slow tests/test_docs.py -k type_checkers

clean:
	rm -rf $(VENV) $(EXTRAS) $(OLDEST) docs/_build build *.egg-info
