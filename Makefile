# Each target works alone on a fresh machine with Python 3.11 or later, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
EXTRAS := vision,forecast,recommend,track,dev

.PHONY: demo test test-all fuzz soak check install clean bench gpu

demo: $(VENV)/installed  ## train a small ResNet on real images, on every device of this machine
	@$(BIN)/duoka train cifar100 --dataset digits --device $${DUOKA_DEVICE:-$$($(BIN)/python -c "import torch; print('all' if torch.cuda.is_available() else 'cpu:2')")}

test: $(VENV)/installed  ## the test suite on CPU workers, then tests/gpu on the stand-in accelerator
	@status=0; \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/docs --durations=30 || status=$$?; \
	$(BIN)/python tests/standin/run.py -m pytest tests/gpu || status=$$?; \
	exit $$status

test-all: $(VENV)/installed  ## also the tests marked `extended`: repeats and long ones
	@status=0; \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "extended or not extended" || status=$$?; \
	STANDIN_DEVICES=3 $(BIN)/python tests/standin/run.py -m pytest tests/gpu -m "extended or not extended" || status=$$?; \
	exit $$status

fuzz: $(VENV)/installed  ## 10,000 changed inputs for each parser; DUOKA_FUZZ_SEED=N begins with another
	DUOKA_FUZZ_INPUTS=10000 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/fuzz

soak: $(VENV)/installed  ## 200 runs with kills, stops, full disks and damaged files; each must end with the right bits
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py --runs 200

check: $(VENV)/installed  ## style, types, import order, the code in the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose
	$(BIN)/python -m pytest -q tests/docs

install: $(VENV)/installed  ## .venv with everything the tests need

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"duoka needs Python 3.11 or later, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

gpu:  ## all that only a GPU can show, at most nine minutes, with .venv or, without one, the Python that PYTHON names
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

bench: $(VENV)/installed  ## install the libraries that the benchmarks compare with
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"

clean:  ## remove what these targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
