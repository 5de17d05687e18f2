# What is needed: make, and Python 3.11 or newer with pip. Everything else is installed into a virtual environment.
#
#   make demo     find the mislabelled digits in a training set; the picture is runs/demo/plot.png
#   make test     run the tests
#   make check    run the linters and the type checkers
#   make docs     build the documentation, in site/
#
# Variables: PYTHON (default python3), VENV (default .venv), PYTEST_FLAGS (default -n 2).

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2

IN_VENV = "$(VENV)/bin/python"
PIP = $(IN_VENV) -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --constraint constraints.txt --editable
TORCH = $(shell grep '^torch==' constraints.txt)

# small matrices: threads would only wait for each other
demo test: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check docs clean

help:
	@sed -n 's/^# \{0,1\}//; 1,8p' Makefile

demo: $(VENV)/.demo
	$(IN_VENV) -m bilevel run hyper-cleaning --out runs/demo --overwrite

test: $(VENV)/.test
	$(IN_VENV) -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.dev
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy
	$(IN_VENV) -m pyright --pythonpath $(IN_VENV)

docs: export NO_MKDOCS_2_WARNING ?= 1
docs: $(VENV)/.docs
	$(IN_VENV) -m mkdocs build --strict --quiet

clean:
	rm -rf "$(VENV)" build dist site *.egg-info

# torch first, alone and pinned; the rest may not replace it
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv "$(VENV)" || { \
	  $(PYTHON) -m venv --clear --without-pip "$(VENV)" && $(PYTHON) -m pip --python $(IN_VENV) install --quiet pip; }
	$(PIP) install $(TORCH)
	@touch "$@"

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) ".[sklearn,plots,cli]"
	@touch "$@"

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) ".[test]"
	@touch "$@" "$(VENV)/.demo"

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) ".[dev]"
	@touch "$@" "$(VENV)/.test" "$(VENV)/.demo"

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) ".[docs]"
	@touch "$@"
