# Where a machine without an NVIDIA GPU gets its CPU build of torch:
#   auto   what pip is already configured to find, if that is a CPU build, else PyTorch's own CPU index
#   URL    that package index
TORCH_INDEX ?= auto
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
DEMO_OUT ?= demo-out

.PHONY: help demo test test-slow test-vllm lint types bench gpu-check wheel clean

help:
	@echo "make demo       encode 200,000 tokens of real text with the embedded model and SAE, write a page"
	@echo "make test       the whole test suite"
	@echo "make test-slow  what the suite leaves out for time"
	@echo "make test-vllm  the vLLM plug-in, in an environment of its own (3.5 GB)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time the operators beside their peers on this machine"
	@echo "make gpu-check  GPU tests and all benchmarks, on a machine with an NVIDIA GPU"

# One environment per set of extras would install torch twice; the stamp of `test` covers `demo`.
demo:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra demo --torch-index $(TORCH_INDEX)
	@$(BIN)/python -m qscope demo --out $(DEMO_OUT)

test:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra test --torch-index $(TORCH_INDEX)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# What the suite leaves out for time: whole commands once more, on the real model and in two processes.
test-slow:
	@$(MAKE) --no-print-directory test PYTEST_ARGS="-m slow $(PYTEST_ARGS)"

# In its own environment: vLLM wants an older transformers. Not part of the suite: it takes some ten minutes.
test-vllm:
	@$(PYTHON) scripts/setup_vllm_env.py --venv $(VLLM_VENV) --torch-index $(TORCH_INDEX)
	@$(VLLM_VENV)/bin/python -m pytest --confcutdir=tests/vllm tests/vllm $(PYTEST_ARGS)

lint:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra dev --torch-index $(TORCH_INDEX)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra test --torch-index $(TORCH_INDEX)
	@PYTHONPATH=.:kernels $(BIN)/python -m bench
	@PYTHONPATH=.:kernels $(BIN)/python bench/bench_encode.py

# Runs uninstalled on a machine without network: the system python3 must have torch and triton.
# ONLY=tests,steer_add runs these steps alone; OUT=folder puts all result files there.
ONLY ?=
OUT ?= bench/results
gpu-check:
	@PYTHONPATH=.:kernels $(PYTHON) scripts/gpu_check.py --only "$(ONLY)" --out "$(OUT)"

wheel:
	@$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info demo-out
