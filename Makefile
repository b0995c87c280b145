# Environments are stamped: they are made again only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL ?= llama-3.2-1b
GPU ?= auto
OUT ?= build/$(notdir $(MODEL))-$(GPU)
# A bare spec has no weights of its own.
WEIGHTS := $(if $(filter %.yaml %.yml,$(MODEL)),--dummy-weights,$(if $(wildcard $(MODEL)/config.json)$(findstring /,$(MODEL)),,--dummy-weights))
PROMPT ?= def write_file(path, data):

.PHONY: demo test build bench lint golden matrix clean

demo: $(VENV)/.installed
	$(BIN)/kogc build examples/demo/checkpoint --gpu auto -o build/demo
	@printf '\n%s' '$(PROMPT)'
	@$(BIN)/kogc run build/demo -p '$(PROMPT)' -n 137

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not gpu'

build: $(VENV)/.installed
	$(BIN)/kogc build $(MODEL) --gpu $(GPU) -o $(OUT) $(WEIGHTS)

bench: $(VENV)/.installed
	$(BIN)/kogc bench $(MODEL) --gpu $(GPU) $(if $(wildcard $(MODEL)/manifest.json),,--dummy-weights)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# Renders generated/ again; a test fails when it differs.
golden: $(VENV)/.installed
	$(BIN)/python tests/golden.py

# Compiles every shipped model for every GPU profile (a quarter of an hour on two cores) and writes docs/targets.md.
matrix: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python tests/matrix.py

clean:
	rm -rf build $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The demo runs on machines without a C++ compiler too: then the wheel of one is installed.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || $(PIP) -e '.[cpu]'
	@touch $@

# Torch is asked for by its version first: the plain name can bring gigabytes of CUDA packages.
$(VENV)/.test: $(VENV)/.installed
	$(PIP) torch==2.13.0 || $(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@
