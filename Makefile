# make demo     refine a bundled photo and print what was gained
# make test     ruff, pyright and the tests
# make slow     the slow tests: sdist, wheel and an install into an empty environment
# make bulk     the tests that need Ray and datasets, which make slow and make test skip
# make hosts    the tests on transformers, MMDetection and Detectron2, which make test skips where they are missing
# make lint     ruff and pyright alone
# make format   what ruff can mend by itself
# make clean    remove all that these commands created
#
# A machine needs make and Python 3.10 or newer, with its venv module. Everything stays in this folder: the environment
# in .venv, that of make hosts in .venv-hosts, the caches in .cache. `make test PYTHON=python3.12` has an environment of
# its own, .venv-python3.12; `make test PYTEST_ARGS="-k quadtree"` runs a part of the tests.

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

# What make hosts installs. mmdet, mmcv-lite and mmengine ask for an OpenCV with windows, which needs libraries of the
# system: they come without their dependencies, which are named here.
HOSTS := setuptools pytest \
	addict matplotlib pyyaml shapely six termcolor terminaltables tqdm yapf \
	cloudpickle fvcore hydra-core iopath omegaconf tabulate yacs
OPENMMLAB := mmdet==3.3.0 mmcv-lite==2.1.0 mmengine==0.10.7
# Release 0.6 without its C++ sources; an unofficial upload, hence the hash, and for tests alone.
DETECTRON2 := pb1-detectron2==0.6
DETECTRON2_HASH := sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29
HOST_TESTS := $(addprefix tests/test_,adapter_detectron2.py adapter_mmdet.py adapter_mmdet_config.py \
	adapter_released.py adapter_transformers.py adapter_transformers_training.py examples.py \
	joint_pennfudan.py released_detector.py train_detector_transformers.py)

.DEFAULT_GOAL := test
.PHONY: demo test slow bulk hosts host-tests lint format clean

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

# Another environment, so another make.
hosts:
	$(MAKE) host-tests VENV=$(VENV)-hosts

host-tests: export TRANSFINER_DETECTRON2 := $(CACHE)/detectron2
host-tests: $(VENV)/.installed-hosts $(CACHE)/detectron2/setup.py
	$(PYTEST) -rs $(HOST_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-* $(VENV) $(VENV)-hosts .cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv takes seconds where pip takes minutes, since it links the large wheels out of its cache instead of unpacking them
# again. Where uv cannot be had or cannot reach the package index, pip does the same.
INSTALL = $(BIN)/uv pip install --python $(BIN)/python --editable "$(1)" $(2) \
	|| $(BIN)/python -m pip install --editable "$(1)" $(2)

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(call INSTALL,.)
	touch $@

# It holds all that the demo needs, so it serves both.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	$(call INSTALL,.[dev$(COMMA)docs$(COMMA)eval$(COMMA)train])
	touch $(VENV)/.installed $@

$(VENV)/.installed-hosts: pyproject.toml $(VENV)/.created
	$(call INSTALL,.[eval$(COMMA)train$(COMMA)transformers],$(HOSTS))
	$(BIN)/python -m pip install --quiet --no-deps $(OPENMMLAB)
	touch $@

# Its setup imports torch, so it sees the environment.
$(CACHE)/detectron2/setup.py: | $(VENV)/.installed-hosts
	echo "$(DETECTRON2) --hash=$(DETECTRON2_HASH)" > $(CACHE)/detectron2.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(CACHE)/sdist \
		--require-hashes --requirement $(CACHE)/detectron2.txt
	mkdir -p $(@D)
	tar --extract --gzip --file $(CACHE)/sdist/pb1-detectron2-0.6.tar.gz --strip-components 1 --directory $(@D)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d: pass PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "uv could not be installed: pip will do its work, slowly"
	mkdir -p .cache
	touch $@
