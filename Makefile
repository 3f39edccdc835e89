# README names two of these: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TRAIN := .venv-train

MINUTES ?= 30

.PHONY: setup demo test test-long test-flower fuzz faults soak check docs bench-hit bench-router bench-cold bench-node \
	bench-trust bench-publish bench-clients bench-delta bench-federated bench-regions load simulate clean lock

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# People of three regions for two minutes; the report is load.html. ARGS="--url http://127.0.0.1:8700", ARGS=--web, ...
load: setup
	scripts/need iproute2
	$(BIN)/python -m loadtests.load $(ARGS)

demo: setup
	$(BIN)/python -m loadtests.demo

test: setup
	scripts/need curl aria2 strace iproute2 redis-server promtool chromium
	$(BIN)/pytest

# Faults at full strength: many repeats, half-minute cuts, thousands of clients. Needs root for some of them.
test-long: setup
	scripts/need curl aria2 strace iproute2 redis-server
	$(BIN)/pytest -m long -n 0

# A real Flower app over federated rounds. Flower's packages go into an environment of their own.
test-flower: setup
	$(BIN)/pytest -m flower -n 0 tests/clients/test_flower.py

# A network under load, one fault after the other, then the tests of all faults: `make faults ARGS='--only F5,F7 --repeats 20'`.
faults: setup
	scripts/need strace iproute2 redis-server
	$(BIN)/python -m tests.faults $(ARGS)

# The same network for MINUTES, without faults: what grows?
soak: setup
	scripts/need redis-server
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(ARGS)

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

# Some 11 minutes; ARGS=--quick is under 4. Without root over proxies that delay, and it says so.
bench-regions: setup
	scripts/need iproute2 nginx
	$(BIN)/python -m loadtests.bench_regions $(ARGS)

bench-node: setup
	$(BIN)/python -m loadtests.bench_node

bench-trust: setup
	$(BIN)/python -m loadtests.bench_trust

bench-publish: setup
	$(BIN)/python -m loadtests.bench_publish

# Some 20 minutes with training; `make bench-delta ARGS=--quick` is 5, `ARGS=--all` has bsdiff of large files too, minutes
# each. torch is in a venv of its own, whose installation takes some more minutes once.
bench-delta: setup $(TRAIN)/.ready
	scripts/need xdelta3 bsdiff
	$(BIN)/python -m loadtests.bench_delta --python $(TRAIN)/bin/python $(ARGS)

# An hour with training, 43 arms of it; `make bench-federated ARGS=--quick` is some minutes. An arm that was run before is
# not run again, one that was ended goes on where it was (.demo/federated).
bench-federated: setup $(TRAIN)/.ready
	$(BIN)/python -m loadtests.bench_federated --python $(TRAIN)/bin/python $(ARGS)

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
