# Every target but gpu-check sets up .venv by itself; the second run of the set-up takes a moment.
PYTHON := .venv/bin/python
export HF_HUB_OFFLINE = 1
export PYTHONPATH = .
# Some images set this. Without bytecode on disk every start of a rank compiles its libraries anew, for 8 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-gpu gpu-check quickstart tiny-data test check lint format types clean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: ## make .venv with the CPU requirements
	@tools/setup_env.sh cpu

setup-gpu: ## make .venv with the GPU requirements
	@tools/setup_env.sh gpu

gpu-check: ## parity, FP8 and speed on one GPU in 8 minutes, with .venv or else python3: runs/gpu_check.json
	@python=$(PYTHON); [ -x $$python ] || python=python3; $$python -m tools.gpu_check --out runs/gpu_check.json

quickstart: setup ## the three stages on a tiny model: runs/quickstart/report.html
	$(PYTHON) -m recipes.launch tiny_pipeline --name quickstart

tiny-data: setup ## data and base model for the tiny recipes: runs/tiny
	$(PYTHON) -m recipes.tiny_data --out runs/tiny/data
	$(PYTHON) -m recipes.tiny_model --out runs/tiny/base

test: setup ## all tests, two files at a time; those on SLURM alone, whose nodes need the cores
	$(PYTHON) -m pytest --durations=20 -n 2 --dist loadfile --ignore tests/slurm
	$(PYTHON) -m pytest --durations=20 tests/slurm

check: lint types test ## lint, format, types, layers and tests

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m tools.check_words

format: setup ## rewrite the sources as ruff formats them
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: setup
	.venv/bin/mypy

clean: ## forget the environment and all runs
	rm -rf .venv runs
