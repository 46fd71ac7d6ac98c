# `make help` lists what there is.
PYTHON ?= python3
# Processes the tests are spread over, one more than two cores: most tests wait for a process or a database, not for a core. A module's tests stay
# together, because many share a service and a finished run.
WORKERS ?= 3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup check format test test-long demo dev bench soak slurm-test clean

help:
	@echo "make demo    a real run on this machine: launch, watch, pause, resume, finish"
	@echo "make test    set up, then run the tests          make check   format, lint, types, import contracts"
	@echo "make dev     the service on 127.0.0.1:8000       make bench   ratios, measured side by side"
	@echo "make test-long    worth running on every change, but not within ten minutes: two releases, a browser with real runs"
	@echo "make soak    the long fault suites               make setup   .venv with everything"
	@echo "make slurm-test    all that needs a Slurm cluster, on two nodes that it starts here (root; Slurm and munge installed)"

setup: $(STAMP)

# constraints.txt pins what was tested; pip chooses the CPU or the CUDA build of torch by where it runs.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,corpora,dev]' 2>&1 \
		| grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import torch, fastapi, tokenizers, pytest'
	@touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not soak and not long" $(PYTEST_ARGS)

test-long: setup
	$(BIN)/python -m pytest -m "long and not soak" $(PYTEST_ARGS)

demo: setup
	@$(BIN)/trainyard demo

dev: setup
	$(BIN)/trainyard serve

bench: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,corpora,dev,bench]' 2>&1 \
		| grep -v '^WARNING: Location' || true
	$(BIN)/python -m benchmarks

soak: setup
	$(BIN)/python -m pytest -m soak -s $(PYTEST_ARGS)

slurm-test: setup
	$(BIN)/python -m pytest -m "soak or not soak" tests/slurm $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
