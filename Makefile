# Three environments, because the field's packages do not fit in one (README, "Environments").
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: export test test-fast check triton clean

# The main job on a fresh machine: environment, tiny checkpoints, ONNX artifacts in model_repository/, a table. The torch
# programs are not served: they are what runtimes.bench measures the others against.
export: .venv/ready
	$(PY) -m training.run all --if-missing
	$(PY) -m export.all --target onnx --target torch

test: .venv/ready .venv-triton/ready
	$(PY) -m pytest

test-fast: .venv/ready
	$(PY) -m pytest -m "not slow"

check: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

triton: .venv-triton/ready

# torch first and by itself: a range that several packages share would bring a CUDA build of several GB to a CPU box.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --editable '.[dev]'
	-$(PY) -m pip install --quiet --no-deps tensorrt-rtx-cu13==1.7.1.116
	touch $@

# The server's Python stub reads zeros with numpy 2. The stub wants libpython of the interpreter of this environment.
.venv-triton/ready: pyproject.toml
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet 'nvidia-pytriton==0.7.0' 'numpy<2' onnxruntime openvino tokenizers safetensors
	touch $@

clean:
	rm -rf .venv .venv-triton checkpoints model_repository/* .model_repository
