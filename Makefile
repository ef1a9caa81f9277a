# Every target works from a clean clone with Python 3.11+, make and bash, and installs into .venv
# alone. The work is in scripts/, which can be called by hand.

SHELL := /bin/bash
.DEFAULT_GOAL := help

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
PYTEST_ARGS ?=
REPORT ?= gpu-check.json
# Room for half of its experts, as int8 makes them.
DEMO_FLAGS := --expert-format int8 --dense-format int8 --host-memory 20MiB
export MOESTRO_TORCH
export PYTHON

.PHONY: help run setup dev test check test-fast test-slow families clients image-test gpu-check bench bench-full study cards \
	study-quick clean

help: ## this text
	@echo "moestro: a server for Mixture-of-Experts models larger than the memory they run in."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables: PORT=$(PORT)  HOST=$(HOST)  ARGS=\"--host-memory 10MiB\"  (make run)"
	@echo "           PYTEST_ARGS=\"-k name\"  (make test…)    PYTHON=  MOESTRO_TORCH=  (make setup)"

run: setup ## set up, fetch the demo model and serve it on http://127.0.0.1:8000
	@exec .venv/bin/moestro serve demo --host $(HOST) --port $(PORT) $(DEMO_FLAGS) $(ARGS)

setup: ## make .venv with what serving needs
	@scripts/setup.sh runtime

dev: ## make .venv with what the tests need, too
	@scripts/setup.sh dev

test: dev check test-fast ## format, lint, types and the fast tests: all of it before each commit

check: dev ## format, lint and types alone
	@scripts/check.sh

test-fast: dev
	@.venv/bin/pytest -n 2 --dist loadfile -m "not slow and not gpu and not clients and not families" $(PYTEST_ARGS)

test-slow: dev ## the tests that take more than a few seconds
	@.venv/bin/pytest -m "slow and not gpu" $(PYTEST_ARGS)

families: dev ## every model type with experts, every source format, against stock (ARGS=--write writes engine/FAMILIES.md)
	@.venv/bin/pytest -m families tests/families $(ARGS) $(PYTEST_ARGS)

clients: dev ## openai, litellm, langchain, lm-eval and schemathesis against the demo model
	@.venv/bin/pytest -m clients tests/clients $(PYTEST_ARGS)

image-test: dev ## the CPU image built and used (root, buildah): not as root, openai client, SIGTERM
	@scripts/image_test.sh

gpu-check: dev ## `moestro gpu-check`, then the tests for an NVIDIA GPU (REPORT=file, ARGS="--quick")
	@scripts/gpu_check.sh $(REPORT) $(ARGS)

bench: dev ## the benchmarks (ARGS="bench_engine" for one)
	@scripts/bench.sh $(ARGS)

bench-full: dev ## a 7 B model against its peers: hours, 67 GB of disk (ARGS="p1 p3" for some)
	@scripts/bench_full.sh $(ARGS)

study: dev ## splits, routers, recovery in one table: two core-hours (ARGS="--list", ARGS="--only NAME")
	@scripts/study.sh $(ARGS)

study-quick: dev ## a sample of the study in 8 minutes, which fails if it is odd
	@scripts/study.sh --quick

cards: dev ## how many experts of published models a card would hold (ARGS=--write: deploy/CARDS.md)
	@scripts/cards.sh $(ARGS)

clean: ## remove .venv and everything built or cached in this folder (not the model cache)
	@rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@rm -f engine/kernels/_native*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
