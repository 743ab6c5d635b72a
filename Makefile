# Needs Python >= 3.10 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := torch==2.13.0
WORKERS ?= 2
# Of `make reproduce`: small, or paper, which prints commands for machines with GPUs.
SIZE ?= small
DATA ?= $(or $(HF_SL2O_DATA),embedded)

.PHONY: help test demo lint docs reproduce clean

help:
	@echo "make test    installs into .venv and runs the test suite"
	@echo "make demo    installs into .venv and trains GPT-2 in a learned subspace beside its baselines (minutes, CPU)"
	@echo "make reproduce  redoes what is missing of the paper's supplement (hours, CPU; DATA=FOLDER of e2e_nlg and cifar10)"
	@echo "make lint    ruff check, ruff format --check, mypy, and who may import whom (layers.toml)"
	@echo "make docs    builds the site into outputs/site, with warnings as errors"
	@echo "make clean   removes .venv and caches"
	@echo
	@echo "CPU build of torch on Linux:  make TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu test"
	@echo "Another Python:               make PYTHON=python3.12 test"

# torch goes first and alone: otherwise a range in another package may choose another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,analysis,docs]"
	touch $@

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

demo: $(STAMP)
	$(BIN)/python recipes/gpt2_e2e.py --demo --output_dir outputs/demo

reproduce: $(STAMP)
	$(BIN)/python recipes/reproduce.py --size $(SIZE) --data $(DATA)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache layers.toml

# The variable is for a notice about versions to come, which mkdocs-material prints into every build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open outputs/site/index.html"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
