# Every target makes the virtual environment when there is none; afterwards that costs nothing.
PYTHON ?= python3
JOBS   ?= 2
BIN    := .venv/bin
STAMP  := .venv/.installed

# Tests and benchmarks never reach for the network. One thread per test process: the processes share the cores.
OFFLINE  := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
TEST_ENV := $(OFFLINE) OMP_NUM_THREADS=1

.PHONY: help venv demo test test-slow test-gpu sanitize check format bench docs-tables clean

help:
	@echo "make demo         the demo: a real sentence encoder, before and after"
	@echo "make test         the fast tests"
	@echo "make test-slow    the long matrices"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make sanitize     every kernel under compute-sanitizer's memcheck and racecheck (needs a CUDA device)"
	@echo "make check        ruff, its formatter and mypy"
	@echo "make format       let ruff mend what it can"
	@echo "make bench        every benchmark group into benchmarks/results/ (long: keep the machine quiet)"
	@echo "make docs-tables  regenerate the tables in README.md and docs/ from the results and the registry"
	@echo "make clean        remove the environment and the caches"

# torch goes first and alone, so that the build that this machine's index prefers (CPU or CUDA) is the one that stays.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

venv: $(STAMP)

demo: $(STAMP)
	@$(OFFLINE) $(BIN)/burnish demo

test: $(STAMP)
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(STAMP)
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m slow

test-gpu: $(STAMP)
	@$(OFFLINE) $(BIN)/python -m pytest -m gpu -n 12  # what takes their time is compiling, on the CPU

sanitize: $(STAMP)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m tests.gpu.touch_kernels
	@# It knows no barrier at which one thread arrives for its warps: on Hopper it reports the Gluon kernels and cuBLAS's.
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m tests.gpu.touch_kernels

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	$(OFFLINE) $(BIN)/python -m benchmarks startup
	$(OFFLINE) $(BIN)/python -m benchmarks ops
	$(OFFLINE) $(BIN)/python -m benchmarks cpu-models
	$(MAKE) docs-tables

docs-tables: $(STAMP)
	@$(BIN)/python -m benchmarks.tables

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
