# The only list of commands: README, CONTRIBUTING and continuous integration call nothing else.
# A bare machine needs Python 3.11 or later with venv, cargo (rust-toolchain 1.95 or later) and the package registries.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
CARGO ?= cargo
# The first interpreter that is new enough; `make PYTHON=/path/to/python ...` overrides it.
PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$each -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)

# What `make train` runs; `make train TRAIN_ARGS="--model gpt2 --steps 5 --out runs/short"` overrides it.
TRAIN_ARGS ?= --model gpt2 --offload nvme:runs/gpt2/nvme --host-memory 2GiB --steps 60 --out runs/gpt2
# Passed on to pytest: `make test-py PYTEST_ARGS="tests/unit -k config"`.
PYTEST_ARGS ?=
# Files of tests that run at a time. Most tests keep one processor busy, or wait; some have ranks of their own.
PYTEST_WORKERS ?= 2

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates -name "*.rs" -path "*/src/*" -o -name build.rs -o -name Cargo.toml) \
	$(shell find cuda -name "*.cu" -o -name "*.cuh" 2>/dev/null)
PYTHON_SOURCES := pyproject.toml $(wildcard README.md) \
	$(shell find python -name '*.py' -o -name '*.pyi' -o -name py.typed -o -name '*.pth')

# PyO3 builds against one interpreter, whichever command compiles it, so that nothing is compiled twice for another.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

.PHONY: train test test-rust test-py test-slow sanitize lint fmt docs bench bench-scale gpu develop clean help

train: $(VENV)/.wheel ## Train GPT-2 124M from scratch under a memory budget, with its state on disk
	$(BIN)/zeroxide train $(TRAIN_ARGS)

test: test-rust test-py ## Run all tests that take minutes together

# The PyO3 crate has no Rust tests, and linking an empty one would need libpython, which a bare machine may not have.
# A test that waits for ever ends here, not with the patience of whoever runs it; a bare machine compiles for minutes.
test-rust: $(BIN)/python ## Run the Rust tests
	timeout 1800 $(CARGO) test --locked --workspace --exclude zeroxide-python

test-py: $(VENV)/.wheel $(VENV)/.tools ## Run the Python tests against the wheel
	$(BIN)/python -m pytest -m "not slow" -n $(PYTEST_WORKERS) --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/.wheel $(VENV)/.tools ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# The runtime of the sanitizer comes with the stable toolchain, and the switch does not. A test has its own handler of
# segmentation faults, and children that must die of one. Leaks are not looked for: one run in eight reports a vector
# that a thread owns.
sanitize: $(BIN)/python ## Run the Rust tests of memory, storage, exchange and offload under the address sanitizer
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize \
	ASAN_OPTIONS=handle_segv=0:detect_leaks=0 timeout 1800 $(CARGO) test --locked --no-fail-fast \
	--target $$(rustc -vV | sed -n 's/host: //p') --lib --tests \
	-p zeroxide-memory -p zeroxide-storage -p zeroxide-exchange -p zeroxide-offload

lint: $(VENV)/.wheel $(VENV)/.tools ## Check formatting, lints, types, layers and the stub of the extension module
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=python $(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest zeroxide._core

fmt: $(VENV)/.tools ## Format Rust and Python, and apply the fixes that are safe
	$(CARGO) fmt --all
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# mkdocs takes warnings for errors: a broken link, a page that is in no menu, a docstring that cannot be rendered. ruff
# breaks the lines of signatures.
docs: $(VENV)/.docs ## Build the documentation into target/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "target/docs/index.html"

bench: $(VENV)/.wheel $(VENV)/.tools ## Run the benchmarks; each prints one JSON line a result
	$(BIN)/python -m benches

# Passed on to benches/scale.py: `make bench-scale SCALE_ARGS="--layers 5 --layers 17"`.
SCALE_ARGS ?= --billions 7 --width 4096

bench-scale: $(VENV)/.wheel $(VENV)/.tools ## Train a model of many times the memory it gets; prints what that took
	$(BIN)/python benches/scale.py $(SCALE_ARGS)

# A bare machine with a GPU has neither cargo nor the registries: what is built elsewhere is carried there, the extension
# module in python/zeroxide with its machine code in kernels/cubins, and the device suite in target/gpu. Where they can be
# built they are: a module that lies there has the kernels of the day when it was built.
CARRIED := $(if $(shell command -v $(CARGO)),,$(wildcard python/zeroxide/_core*.so))
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(if $(CARRIED),python3,$(BIN)/python))
GPU_NEEDS := $(if $(CARRIED),,$(VENV)/.wheel $(VENV)/.tools) $(if $(shell command -v $(CARGO)),target/gpu/device-suite)
# Passed on to benches/gpu: `make gpu GPU_ARGS="--only Kernels"`.
GPU_ARGS ?=

gpu: $(GPU_NEEDS) ## Run the tests and benchmarks of a GPU, in a few minutes
	PYTHONPATH=$(if $(CARRIED),python:). $(GPU_PYTHON) -m benches.gpu $(GPU_ARGS)

# The tests of the Rust crate as one program without its symbols.
target/gpu/device-suite: $(RUST_SOURCES) crates/zeroxide-device/tests/cuda.rs
	@mkdir -p $(@D)
	built=$$($(CARGO) test --locked -p zeroxide-device --test cuda --no-run --message-format=json | \
		sed -n 's/.*"executable":"\([^"]*\)".*/\1/p') && strip -o $@ "$$built"

develop: $(VENV)/.wheel $(VENV)/.tools ## Install the working tree itself, so that Python edits act at once
	rm -f $(VENV)/.wheel
	$(BIN)/maturin develop --release --locked

clean: ## Remove everything that was built or installed here
	rm -rf $(VENV) dist target python/zeroxide/_core*.so python/zeroxide/kernels/cubins .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Each stamp below is remade only when what it was made from has changed.

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later with venv found; set PYTHON=/path/to/python" >&2; exit 1; }
	@command -v $(CARGO) >/dev/null || { echo "make: cargo not found; install Rust 1.95 or later" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.maturin: requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c requirements-dev.txt maturin
	@touch $@

# The second command replaces a wheel of the same version, which the first takes for up to date.
define INSTALL
	wheel=$$(ls dist/*.whl) && $(BIN)/pip install --quiet -c requirements-dev.txt "$$wheel[train]"
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/*.whl
endef

# Machine code of the kernels is made by the wheel itself, with the compiler that comes with torch, and packed into it:
# the second build has nothing to compile. What is there already of the same sources is not made again.
dist/.built: $(RUST_SOURCES) $(PYTHON_SOURCES) cuda/cubins.py | $(VENV)/.maturin
	rm -rf dist
	$(BIN)/maturin build --release --locked --out dist
	$(INSTALL)
	$(BIN)/python cuda/cubins.py python/zeroxide/kernels/cubins
	$(BIN)/maturin build --release --locked --out dist
	@touch $@

$(VENV)/.wheel: dist/.built requirements-dev.txt
	$(INSTALL)
	@touch $@

$(VENV)/.tools: requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.docs: requirements-docs.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c requirements-dev.txt -r requirements-docs.txt ruff
	@touch $@
