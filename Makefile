# README names two of these: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TRAIN := .venv-train

.PHONY: setup demo test test-long fuzz check docs bench-hit bench-router bench-cold bench-node bench-trust \
	bench-publish bench-clients bench-delta simulate clean lock

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/python -m loadtests.demo

test: setup
	scripts/need curl aria2 strace iproute2 redis-server promtool
	$(BIN)/pytest

# Faults at full strength: many repeats, half-minute cuts, thousands of clients. Needs root for some of them.
test-long: setup
	scripts/need curl aria2 strace iproute2 redis-server
	$(BIN)/pytest -m long -n 0

# Every parser of network bytes, on damaged documents; a short run of it is part of `make test`.
fuzz: setup
	$(BIN)/python -W error -m tests.fuzz

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python scripts/reference.py
	$(BIN)/python scripts/openapi.py

bench-hit: setup
	scripts/need nginx wrk
	$(BIN)/python -m loadtests.bench_hit

bench-router: setup
	scripts/need nginx wrk
	$(BIN)/python -m loadtests.bench_router

# Root only: its WAN is made of network namespaces.
bench-cold: setup
	scripts/need iproute2 aria2 curl
	$(BIN)/python -m loadtests.bench_cold

# Root only, likewise; a few minutes.
bench-clients: setup
	scripts/need iproute2 aria2 curl
	$(BIN)/python -m loadtests.bench_clients

bench-node: setup
	$(BIN)/python -m loadtests.bench_node

bench-trust: setup
	$(BIN)/python -m loadtests.bench_trust

bench-publish: setup
	$(BIN)/python -m loadtests.bench_publish

# Some 15 minutes with training; `make bench-delta ARGS=--quick` is 3, `ARGS=--all` adds bsdiff. torch is in a venv of its own.
bench-delta: setup $(TRAIN)/.ready
	scripts/need xdelta3 bsdiff
	$(BIN)/python -m loadtests.bench_delta --python $(TRAIN)/bin/python $(ARGS)

$(TRAIN)/.ready: loadtests/requirements-train.txt
	$(PYTHON) -m venv $(TRAIN)
	$(TRAIN)/bin/pip install --quiet --disable-pip-version-check -r $<
	-$(TRAIN)/bin/pip install --quiet --disable-pip-version-check zipnn==0.5.4  # where it can be built
	@touch $@

# The ring at 10,000 nodes and 10 million shards; about two minutes.
simulate: setup
	$(BIN)/python -m loadtests.simulate_ring

# The lock file: exact versions of everything that `setup` installs.
lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) $(TRAIN) build *.egg-info .mypy_cache .ruff_cache .hypothesis
