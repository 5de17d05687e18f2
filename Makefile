# What is needed: make, and Python 3.11 or newer with pip. Everything else is installed into a virtual environment.
#
#   make demo     find the mislabelled digits in a training set; the picture is runs/demo/plot.png
#   make test     run the tests
#   make check    run the linters and the type checkers
#   make docs     build the documentation, in site/: begin at site/index.html
#   make check-site    build it, and look at every page in Chromium, narrow and wide, light and dark
#   make test-integrations   run the documentation's recipes with Lightning, Hugging Face, Optuna, curvlinops, in $(VENV)-with
#   make test-lowest   run the tests of the core at the lowest versions that pyproject.toml admits, in $(VENV)-lowest
#
# Variables: PYTHON (default python3), VENV (default .venv), PYTEST_FLAGS (default -n 2).

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2

IN_VENV = "$(VENV)/bin/python"
PIP = $(IN_VENV) -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --constraint constraints.txt --editable
VERSION = $(shell sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' bilevel/__init__.py)
TORCH = $(shell grep '^torch==' constraints.txt)
# what computes, what uses scipy, scikit-learn, cvxpy and matplotlib, and the command line
CORE_TESTS = tree problem problems estimators inner_solvers linear_solvers optimizers quadratic_program kkt cli

# small matrices: threads would only wait for each other
demo test test-lowest test-integrations docs: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-lowest test-integrations check docs check-site clean links

help:
	@sed -n 's/^# \{0,1\}//; 1,11p' Makefile

demo: $(VENV)/.demo
	$(IN_VENV) -m bilevel run hyper-cleaning --out runs/demo --overwrite
	@echo
	@echo "Phi is the loss on clean validation data, and |h| the length of its hypergradient in the weights: both fell, and where"
	@echo "|h| is zero no weight can be changed for the better. auc is how often a wrong label got a lower weight than a right one:"
	@echo "1 is always, 0.5 is chance. Compare the three accuracies: with the learned weights the test accuracy is near that of the"
	@echo "oracle, which knows the wrong labels. Look at runs/demo/plot.png: the weights, and the digits of least weight."

test: $(VENV)/.test
	$(IN_VENV) -m pytest $(PYTEST_FLAGS)

check: links $(VENV)/.dev
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy
	$(IN_VENV) -m pyright --pythonpath $(IN_VENV)

# The lowest versions were made for the lowest Python: run it with 3.11.
test-lowest:
	$(MAKE) VENV="$(VENV)-lowest" "$(VENV)-lowest/.lowest"
	"$(VENV)-lowest/bin/python" -m pytest $(PYTEST_FLAGS) $(CORE_TESTS:%=tests/test_%.py)

# Packages of the recipes; torch is there before them, and the constraints keep it.
test-integrations:
	$(MAKE) VENV="$(VENV)-with" "$(VENV)-with/.integrations"
	"$(VENV)-with/bin/python" -m pytest $(PYTEST_FLAGS) -m "slow or not slow" tests/test_integrations.py tests/test_huggingface.py \
	  tests/test_docs.py -k "integrations or tutorials or distributed or adapters or head or attention"

# A warning is an error. Other versions that are in site/ stay there and are listed.
docs: $(VENV)/.docs
	$(IN_VENV) -m sphinx -W --keep-going --quiet -d build/doctrees -b html docs "site/$(VERSION)"

# Without Chromium, what needs one is skipped, and says so.
check-site: docs
	$(IN_VENV) .ci/check_site.py site $(CHECK_SITE_FLAGS)

# Type checkers see the package through two links; a checkout without symbolic links has text files in their place, and a
# source distribution has nothing there.
links:
	@for name in problems solvers; do \
	  if [ -f "bilevel/$$name" ] && [ ! -d "bilevel/$$name" ]; then \
	    echo "bilevel/$$name is a file, and should be a link to ../$$name: this checkout has no symbolic links." >&2; \
	    echo "Allow them (on Windows: Developer Mode), then: git config core.symlinks true &&" \
	      "git checkout-index --force -- bilevel/problems bilevel/solvers" >&2; \
	    exit 1; \
	  fi; \
	done

clean:
	rm -rf "$(VENV)" "$(VENV)-lowest" "$(VENV)-with" build dist site docs/gallery *.egg-info

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

$(VENV)/.integrations: $(VENV)/.test
	$(PIP) install --quiet --constraint constraints.txt "lightning>=2.5" "optuna>=4" torchvision==0.28.0 \
	  "curvlinops-for-pytorch>=3.0" "transformers>=5.0" "peft>=0.18" "accelerate>=1.1"
	@touch "$@"

$(VENV)/.lowest: $(VENV)/.torch pyproject.toml .ci/lowest_requirements.py
	$(IN_VENV) .ci/lowest_requirements.py > "$(VENV)/lowest.txt"
	$(PIP) install --quiet --requirement "$(VENV)/lowest.txt"
	$(PIP) install --quiet --no-deps --editable .
	@touch "$@"
