# make demo [DATA=folder]   from nothing to a trained, evaluated, drawn and exported model
# make test                 every test
PYTHON ?= python3
VENV ?= .venv
DATA ?=
WORKDIR ?= demo_run
# JOBS: processes that run the tests; each takes up to 5 GB.
JOBS ?= 2
bin := $(VENV)/bin

.PHONY: demo test lint clean

# Two devices on the CPU: XLA runs many of the small operations on one core each.
demo: $(VENV)/.installed
	JAX_NUM_CPU_DEVICES=2 $(bin)/python -m medglip_jax.demo --workdir $(WORKDIR) $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.installed-dev
	$(bin)/python -m pytest -n $(JOBS) --dist loadfile --durations 12

lint: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "medglip_jax needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# PyTorch alone first, so that it is the one for the CPU; the tests of interop need it. The tests of planning compile with
# libtpu (150 MB), which lies beside the environment: in it, JAX would look for TPUs at every start.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(bin)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(bin)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/libtpu 'libtpu==0.0.42.*'
	touch $@

clean:
	rm -rf $(VENV) $(WORKDIR) .cache
