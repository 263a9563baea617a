# `make demo` and `make test` set everything up themselves, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint bench bench-build clean

$(READY): pyproject.toml CMakeLists.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[export,cpu,dev]"
	$(BIN)/python -m pip install -q --no-deps $$(grep -o 'timm==[0-9.]*' pyproject.toml)  # its torchvision would bring torch for CUDA
	touch $(READY)

# real weights and a real video, built for the CPU and ahead of time for an A100, and asked about
demo: $(READY)
	$(BIN)/python examples/demo.py build/demo

# two workers, whatever the machine: each holds several GB
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	mkdir -p build/typing/liteframe  # mypy wants the folders as the one namespace they are installed in
	cd build/typing/liteframe && for part in export engines runtime calib training; do ln -sfn ../../../$$part .; done
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p liteframe

# against named peers, in turns; needs the extra peers
bench: $(READY)
	$(BIN)/python -m pip install -q -e ".[bench]"
	$(BIN)/python bench/encoder_cpu.py
	$(BIN)/python bench/prefill_cpu.py
	$(BIN)/cmake -S . -B build/native -DNVCC=OFF && $(BIN)/cmake --build build/native
	$(BIN)/python bench/kernels_cpu.py
	$(BIN)/python bench/int8_cpu.py
	$(BIN)/python bench/keyframes.py
	$(BIN)/python bench/streaming.py
	$(BIN)/python bench/calibration_memory.py
	$(BIN)/python bench/accuracy.py
	$(BIN)/liteframe compare

# LiteFrame-B at 448 px with a decoder of Qwen2.5-0.5B's shape, random weights, built for the CPU and for SM80
bench-build: $(READY)
	$(BIN)/python bench/build_full_size.py

clean:
	rm -rf $(VENV) build
