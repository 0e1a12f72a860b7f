PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test check format test-slow test-fuzz test-real test-peer bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/installed  ## train OPSD and ATESD on both embedded worlds, print the table, write the page
	$(BIN)/atesd demo

test: $(VENV)/installed  ## the tests: minutes on two cores, no network
	$(BIN)/pytest

check: $(VENV)/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/installed  ## pretraining a world, 50 kills
	$(BIN)/pytest -m slow

test-fuzz: $(VENV)/installed  ## 10,000 generated data files, a few minutes on one core
	$(BIN)/pytest -m fuzz -n 0 -s

test-real: $(VENV)/installed  ## SmolLM2; fetched first
	$(BIN)/atesd models fetch smollm2
	$(BIN)/pytest -m real_model

test-peer: $(VENV)/installed  ## equality with TRL's SDFT trainer
	$(BIN)/pip install --quiet --editable ".[trl]"
	$(BIN)/pytest -m peer

# Liger's chunked losses are plain torch; without --no-deps pip would fetch Triton, which a CPU has no use for.
bench: $(VENV)/installed  ## every benchmark beside its peers, about 25 minutes; BENCH="--quick" for a few
	$(BIN)/pip install --quiet --editable ".[trl]"
	$(BIN)/pip install --quiet --no-deps liger-kernel==0.8.5
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)
	$(BIN)/python -m benchmarks table

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
