# Two commands matter: `make demo` and `make test`. Both need only Python 3.10+ and a C++ compiler: they make .venv, install
# torch and the rest into it, and build mlcore as an editable install that a later call brings up to date.
#
#   make test PYTHON=python3.12 TORCH=torch==2.11.0     another interpreter, another torch (in a fresh .venv)
#   make test PYTEST_ARGS='-k rms_norm -x'              passed to every pytest run

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
PYTEST := $(BIN)/python -m pytest -n auto

CXX_FILES = $(shell find csrc kernels tests -type f \( -name '*.cc' -o -name '*.c' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \))
NATIVE_FILES := CMakeLists.txt pyproject.toml constraints.txt \
  $(shell find cmake csrc kernels -type f ! -name '*.py' ! -name '*.pyc' ! -name '*.md' ! -name '*.json')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test suite levels sanitize check format bench gpu clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null || true

demo: $(STAMPS)/demo  ## install, then run the main job: real sentences through a real BERT, kernels against stock layers
	$(BIN)/python examples/demo.py

# Test processes share the cores: a thread that waits must not spin.
suite levels sanitize: export OMP_WAIT_POLICY = passive

test: check levels sanitize suite  ## every check and test that this machine allows

suite: $(STAMPS)/test  ## the whole pytest suite, under the best instruction set
	$(PYTEST) tests $(PYTEST_ARGS)

levels: $(STAMPS)/test  ## the kernel tests under the other instruction sets, AVX-512 emulated where the machine has none
	$(BIN)/python tools/levels.py $(PYTEST_ARGS)

sanitize: $(STAMPS)/test  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tools/sanitize.py $(PYTEST_ARGS)

check: $(STAMPS)/test  ## format, lint, house rules, generated tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python bench/report.py --check
	$(BIN)/python tools/support_table.py --check
	$(BIN)/python -m pytest -q tests/native/test_table.py

format: $(STAMPS)/test  ## rewrite the sources as `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(STAMPS)/demo $(STAMPS)/test  ## measure every op against torch's own; results go to bench/results
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

gpu:  ## tests and benchmarks that need a CUDA device
	$(PYTHON) tools/gpu.py

clean:  ## remove .venv and everything built
	rm -rf .venv build dist

# --- the environment: each stamp is newer than all that it was made from ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mlcore needs Python 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS)

# Written only when the content changes: the wanted torch, and the list of Python files (an editable install learns of new
# files when it is made).
$(STAMPS)/torch.txt: $(BIN)/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
$(STAMPS)/files.txt: $(BIN)/python FORCE
	@find python kernels -name '*.py' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

# torch first, and then held: nothing that is installed later may bring another one.
$(STAMPS)/torch: $(STAMPS)/torch.txt constraints.txt
	$(PIP) install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STAMPS)/held.txt
	$(PIP) install -c constraints.txt 'pip>=23' scikit-build-core pybind11 cmake ninja
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch $(STAMPS)/files.txt $(NATIVE_FILES)
	$(PIP) install -c constraints.txt -c $(STAMPS)/held.txt --no-build-isolation -e '.[test,hf]'
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch $(STAMPS)/files.txt $(NATIVE_FILES)
	$(PIP) install -c constraints.txt -c $(STAMPS)/held.txt --no-build-isolation -e '.[demo]'
	@touch $@
