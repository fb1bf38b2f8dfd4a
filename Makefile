# make demo     refine a bundled photo and print what was gained
# make test     ruff, pyright and the tests
# make slow     the slow tests: sdist, wheel and an install into an empty environment
# make bulk     the tests that need Ray and datasets, which make slow and make test skip
# make lint     ruff and pyright alone
# make format   what ruff can mend by itself
# make clean    remove all that these commands created
#
# A machine needs make and Python 3.10 or newer, with its venv module. Everything stays in this folder: the environment
# in .venv, the caches in .cache. `make test PYTHON=python3.12` has an environment of its own, .venv-python3.12;
# `make test PYTEST_ARGS="-k quadtree"` runs a part of the tests.

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
PYTEST_ARGS ?=

COMMA := ,
BIN := $(VENV)/bin
CACHE := $(CURDIR)/.cache
PYTEST := $(BIN)/python -m pytest -o cache_dir=.cache/pytest --basetemp=.cache/tmp $(PYTEST_ARGS)

export HF_HOME := $(CACHE)/huggingface
export MPLCONFIGDIR := $(CACHE)/matplotlib
export PIP_CACHE_DIR := $(CACHE)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_CACHE_DIR := $(CACHE)/pyright
export UV_CACHE_DIR := $(CACHE)/uv
export XDG_CACHE_HOME := $(CACHE)

.DEFAULT_GOAL := test
.PHONY: demo test slow bulk lint format clean

demo: $(VENV)/.installed
	$(BIN)/transfiner-refine demo

test: lint
	$(PYTEST) -m "not slow"

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

bulk: $(VENV)/.installed-dev
	$(call INSTALL,.[datasets$(COMMA)ray])
	$(BIN)/python -m pip install --quiet psutil
	$(PYTEST) tests/test_bulk_formats.py tests/test_bulk_ray.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-* $(VENV) .cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv takes seconds where pip takes minutes, since it links the large wheels out of its cache instead of unpacking them
# again. Where uv cannot be had or cannot reach the package index, pip does the same.
INSTALL = $(BIN)/uv pip install --python $(BIN)/python --editable "$(1)" \
	|| $(BIN)/python -m pip install --editable "$(1)"

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(call INSTALL,.)
	touch $@

# It holds all that the demo needs, so it serves both.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	$(call INSTALL,.[dev$(COMMA)docs$(COMMA)eval$(COMMA)train])
	touch $(VENV)/.installed $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d: pass PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "uv could not be installed: pip will do its work, slowly"
	mkdir -p .cache
	touch $@
