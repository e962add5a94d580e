# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
BIN := .venv/bin
MODEL := examples/tiny_llama/model
TEXT := examples/tiny_llama/heldout.txt
DEMO := out/demo
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo plugins plugins-cpu test mutations check lint format clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready ## Make .venv with the pinned versions (CPU)

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[cpu,data,eval,report,dev]"
	@touch $@

.venv/tensorrt/lean-%: tests/plugins/runtimes/lean-%.txt .venv/.ready
	@rm -rf $@
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ --requirement $< && touch $@ || \
	  echo "test: no TensorRT lean runtime $* from the package index; the tests that load the plugins into it will be skipped"

.venv-triton/.ready: constraints-triton.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --disable-pip-version-check --requirement constraints-triton.txt && touch $@ \
	  || echo "no Triton server here: the tests that need one will be skipped and say so"

demo: setup ## Export, validate, evaluate and run the embedded model; write out/demo/report.html
	@mkdir -p $(DEMO)
	$(BIN)/quarot-onnx export $(MODEL) $(DEMO)/w4a4kv4 --recipe w4a4kv4 --force
	$(BIN)/quarot-onnx validate $(DEMO)/w4a4kv4 --reference $(MODEL) --save-json $(DEMO)/validation.json
	$(BIN)/quarot-onnx eval $(DEMO)/w4a4kv4 --text $(TEXT) --reference $(MODEL) --save-json $(DEMO)/evaluation.json
	$(BIN)/quarot-onnx generate $(DEMO)/w4a4kv4 --prompt "Return the" --max-new-tokens 48
	$(BIN)/quarot-onnx report $(DEMO)/w4a4kv4 $(DEMO)/report.html --reference $(MODEL) --text $(TEXT) \
	  --prompt "Return the" --validation $(DEMO)/validation.json --evaluation $(DEMO)/evaluation.json

plugins: setup ## Build build/plugins/libquarot_plugins.so with nvcc (ARCHS="80 86 89 90a 120", TRT_INCLUDE=dir)
	@$(BIN)/python -m quarot_onnx.plugins.build plugins $(ARCHS)

plugins-cpu: setup ## Build build/plugins/libquarot_plugins_cpu.so: the same plugins on emulated kernels, with g++
	@$(BIN)/python -m quarot_onnx.plugins.build plugins-cpu

test: setup .venv-triton/.ready .venv/tensorrt/lean-10 .venv/tensorrt/lean-11 ## Run the tests (CPU, offline); the mutation tests are `make mutations`
	$(BIN)/python -m pytest -n auto -m "not slow"

mutations: setup ## Plant bugs in the kernels and see the tests catch them
	$(BIN)/python -m pytest -n auto -m slow

lint: setup ## Run ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'plugins_cuda/*.cu' 'plugins_cuda/*.cuh' 'plugins_cuda/*.hpp' 'plugins_cuda/*.h' 'plugins_cuda/*.cpp' 'tests/*.cu' 'tests/plugins/*.cpp')

check: lint test ## Lint and test

format: setup ## Let ruff format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what was built
	rm -rf .venv .venv-triton out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
