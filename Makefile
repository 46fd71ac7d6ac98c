# `make help` lists what there is.
PYTHON ?= python3
# Processes the tests are spread over, one more than two cores: most tests wait for a process or a database, not for a core. A module's tests stay
# together, because many share a service and a finished run.
WORKERS ?= 3
# The order of make test-random; `last` repeats the previous one.
SEED ?= default
# How long make nightly kills.
MINUTES ?= 480
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Which build of torch: cpu or cuda. The first setup chooses by nvidia-smi; later ones keep what is installed.
INSTALLED := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*)))
ifndef TORCH
TORCH     := $(or $(INSTALLED),$(shell nvidia-smi -L 2>/dev/null | grep -q ^GPU && echo cuda || echo cpu))
endif
STAMP     := $(VENV)/.installed-$(TORCH)
VERSION   := $(shell sed -n 's/^torch==//p' constraints.txt)
SIZE_cpu  := about 0.2 GB
SIZE_cuda := about 2.7 GB in 29 packages, CUDA 13.0; needs an NVIDIA driver of version 580 or newer
ifndef SIZE_$(TORCH)
$(error TORCH=$(TORCH) is unknown: give TORCH=cpu or TORCH=cuda)
endif

.PHONY: help setup check audit format test test-long test-random gpu demo dev bench soak nightly slurm-test clean

help:
	@echo "make demo    a real run on this machine: launch, watch, pause, resume, finish"
	@echo "make test    set up, then run the tests          make check   format, lint, types, import contracts"
	@echo "make audit   known vulnerabilities of the pinned packages, by pip-audit"
	@echo "make dev     the service on 127.0.0.1:8000       make bench   ratios, measured side by side"
	@echo "make test-long    the tests that do not fit into ten minutes: guides, fault processes, two releases"
	@echo "make test-random SEED=7 WORKERS=2    the tests of make test in a random order; it prints the seed that repeats it"
	@echo "make soak    the long fault suites               make setup   .venv with everything"
	@echo "              make setup TORCH=cpu|cuda chooses the build of torch; without it, nvidia-smi decides"
	@echo "make nightly MINUTES=480    random kills of everything for the given time, and their account as JSON"
	@echo "make gpu     the tests that need a GPU; \`trainyard doctor --gpu\` tests training without the repository"
	@echo "make slurm-test    all that needs a Slurm cluster, on two nodes that it starts here (root; Slurm and munge installed)"

setup: $(STAMP)

# constraints.txt pins what was tested. pip alone would take the CUDA build everywhere. Only the project of torch itself
# publishes CPU builds for Linux. uv knows that index; it is not needed if pip is configured to find such a build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: torch $(VERSION) for $(TORCH), $(SIZE_$(TORCH)), and about 0.3 GB of other packages"
	@nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sed 's/^/found: /' || true
	$(INSTALL_$(TORCH))
	$(PIP) install -c constraints.txt -e '.[worker,corpora,dev]'
	@$(BIN)/python -c 'import torch, fastapi, tokenizers, pytest'
	@rm -f $(VENV)/.installed*
	@touch $@

define INSTALL_cpu
@if $(PIP) install --dry-run --quiet --no-deps 'torch==$(VERSION)+cpu' >/dev/null 2>&1; then \
	$(PIP) install -c constraints.txt 'torch==$(VERSION)+cpu'; \
else \
	$(PIP) install -c constraints.txt uv \
	&& $(BIN)/python -m uv pip install --python $(BIN)/python -c constraints.txt --torch-backend cpu 'torch==$(VERSION)'; \
fi
endef

# Three "=": also if pip is configured to find a CPU build, which counts as a newer version.
define INSTALL_cuda
$(PIP) install -c constraints.txt 'torch===$(VERSION)'
endef

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: setup
	$(BIN)/python .ci/audit.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not soak and not long" $(PYTEST_ARGS)

test-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "long and not soak" $(PYTEST_ARGS)

test-random: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not soak and not long" \
		-p randomly --randomly-seed=$(SEED) --randomly-dont-reset-seed $(PYTEST_ARGS)

gpu: setup
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

demo: setup
	@$(BIN)/trainyard demo

dev: setup
	$(BIN)/trainyard serve

bench: setup
	$(PIP) install --quiet -c constraints.txt -e '.[worker,corpora,dev,bench]'
	$(BIN)/python -m benchmarks

soak: setup
	$(BIN)/python -m pytest -m soak -s $(PYTEST_ARGS)

nightly: setup
	TRAINYARD_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -m soak -s tests/faults/test_kills.py -k given_time $(PYTEST_ARGS)

slurm-test: setup
	$(BIN)/python -m pytest -m "soak or not soak" tests/slurm $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
