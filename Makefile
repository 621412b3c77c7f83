# Every target sets up the private environment first if it is missing or out of date.
# Settings: VENV=dir of the environment, PYTHON=interpreter to build it with,
#           ARGS='extra arguments' for test, test-all, train and serve.
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READERS := .venv-readers
READERS_READY := $(READERS)/.ready
SERVERS := .venv-servers
SOURCES := $(wildcard megatron_eagle tools examples benchmarks)

# The CPU suite must not change on a machine with GPUs; one thread a rank, for two cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
CPU_PYTEST := CUDA_VISIBLE_DEVICES= $(PYTEST)

.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-readers test-servers serve check docs train bench bench-peers clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## create the private environment in .venv

$(READY): pyproject.toml constraints.txt tools/setup_env.sh
	@PYTHON="$(PYTHON)" sh tools/setup_env.sh "$(VENV)"
	@touch $@

test: $(READY)  ## run the tests that CI runs
	$(CPU_PYTEST) -m "not slow and not gpu" tests/unit tests/distributed tests/e2e $(ARGS)

test-readers: $(READERS_READY)  ## run exported drafts in vLLM's, SGLang's, SpecForge's and speculators' code
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 READERS_WHEELS=$(READERS)/wheels \
		$(READERS)/bin/python -m pytest tests/readers $(ARGS)

$(READERS_READY): $(READY) constraints-readers.txt tools/setup_readers.sh
	@sh tools/setup_readers.sh "$(READERS)" "$(VENV)"
	@touch $@

# Engines, each in an environment of its own; processes on loopback, ended by their ids.
# ENGINE: vllm (on this CPU), or with a GPU vllm-cuda or sglang.
ENGINE ?= vllm
serve: $(SERVERS)-$(ENGINE)/.ready  ## serve the quickstart's draft in vLLM on this CPU and compare
	$(PY) benchmarks/serving/run.py --python $(SERVERS)-$(ENGINE)/bin/python \
		--engine $(ENGINE:-cuda=) $(if $(filter vllm,$(ENGINE)),,--device cuda) $(ARGS)

test-servers: $(SERVERS)-vllm/.ready $(SERVERS)-openvino/.ready $(SERVERS)-llamacpp/.ready  ## drafts of every kind in real engines
	SERVERS_VLLM=$(CURDIR)/$(SERVERS)-vllm SERVERS_OPENVINO=$(CURDIR)/$(SERVERS)-openvino \
		SERVERS_LLAMACPP=$(CURDIR)/$(SERVERS)-llamacpp \
		$(CPU_PYTEST) tests/servers $(ARGS)

$(SERVERS)-%/.ready: $(READY) constraints-servers.txt tools/setup_servers.sh
	@sh tools/setup_servers.sh $* "$(SERVERS)-$*" "$(VENV)"
	@touch $@

test-all: $(READY)  ## run every test; those for GPUs skip themselves where there is none
	$(CPU_PYTEST) -m "not gpu" tests $(ARGS)
	$(PYTEST) -m gpu tests $(ARGS) || [ $$? -eq 5 ]  # 5: no such test
	$(MAKE) test-readers
	$(MAKE) test-servers

check: $(READY)  ## lint, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(SOURCES)

docs: $(READY)  ## write the reference of all --eagle-* flags and the table of bases and servers
	$(PY) tools/flag_reference.py
	$(PY) tools/serving_table.py

# glibc gives freed memory back at once by default; faulting it in again for every activation
# makes large fp32 products several times slower.
train: export MALLOC_MMAP_THRESHOLD_ = 4294967296
train: export MALLOC_TRIM_THRESHOLD_ = 17179869184
train: export MALLOC_TOP_PAD_ = 268435456
train: $(READY)  ## the quickstart: train, convert and evaluate a draft on two CPU cores
	$(PY) examples/quickstart/run.py $(ARGS)

bench: $(READY)  ## time and memory of a training step: tables and plots in docs/benchmarks
	$(PY) benchmarks/suite.py $(ARGS)
	$(PY) benchmarks/report.py

# Peers in an environment of their own, on the same weights and inputs.
bench-peers: $(READY)  ## the same of ModelOpt, SpecForge and speculators
	test -e .venv-peers/.ready || sh tools/setup_peers.sh "$(VENV)" .venv-peers
	$(PY) benchmarks/suite.py --peers $(ARGS)
	$(PY) benchmarks/report.py

clean:  ## remove the environment and the caches; keeps runs/
	rm -rf "$(VENV)" "$(READERS)" $(SERVERS)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
