# `make demo` and `make test` do all their own set-up: Python 3.11, pip, g++ and make are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Exact versions of everything else; pyproject.toml says what the package accepts.
LOCK := requirements/newest.txt
VENV := .venv
BIN := $(VENV)/bin
# What runs the compiled kernels; the rest of the tests would find nothing else.
SANITIZED := tests/ops/test_ops.py tests/ops/test_native.py tests/step/test_passes.py tests/model/test_probes.py
# What computes with them, and with what PyTorch has for a CPU.
CPU_TESTS ?= tests/ops tests/losses tests/model tests/step tests/test_optimizer.py tests/test_sap.py
BUILD_TOOLS := "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
# OpenMP workers that spin between parallel regions slow every other process on the machine 2-10x.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo study test test-slow test-oldest test-stacks test-axolotl test-swift test-cpus matrix sanitize gpu kernels ops step recipes launches before-after cost docs lint format install fidelity wheels hub clean

help:
	@echo "make demo       fine-tune a real chat model with AdamW and with FusedSAP, write report.html"
	@echo "                (STEPS=60 for a longer run, DEMO='--help' for its options)"
	@echo "make study      compare all methods of keeping a model safe, hours; goes on where it stopped"
	@echo "                (STUDY='--stage none' for the report of what has run, '--help' for the rest)"
	@echo "make test       every test that is not marked slow"
	@echo "make test-slow  the rest"
	@echo "make test-oldest  the tests of trainers, losses, probes and commands on requirements/oldest.txt"
	@echo "make test-stacks  the tests of stacks whose packages are not among the others: Lightning, Liger,"
	@echo "                torchtitan, DeepSpeed"
	@echo "make test-axolotl, make test-swift  the tests of these stacks, each in an environment with its versions"
	@echo "make matrix     what fits what: environments of several ages, in each the trainers and the tests"
	@echo "                (MATRIX='--only oldest' for less); writes CSV and table"
	@echo "make test-cpus  the tests of the kernels and of what computes with them, as on CPUs without AVX-512"
	@echo "                and without AVX2; and the kernels on arm64, where a cross compiler is there"
	@echo "make sanitize   the tests of the kernels, with the address and undefined-behaviour sanitizers"
	@echo "make gpu        the tests and the benchmarks that need a CUDA device, in ten minutes; goes on"
	@echo "                where it stopped (GPU_PYTHON=python3 for an interpreter with torch in the"
	@echo "                place of .venv, GPU='--stage steps' for less, '--dry-run' without a GPU)"
	@echo "make kernels    registers, spills and bytes moved of every GPU kernel, as compiled; needs nvcc"
	@echo "make ops        time the operations against PyTorch's; writes CSV and picture"
	@echo "make step       time and memory of a whole step against AdamW's, two hours; CSVs, pictures"
	@echo "                (STEP='--table memory --only lora,bf16' for less)"
	@echo "make recipes    what leaving work out costs in fidelity; writes CSV and picture"
	@echo "make launches   operations of every pass, with the probe passes as two and as one; writes CSV"
	@echo "make before-after BEFORE=CHECKOUT"
	@echo "                time and memory of a step here beside those of another checkout"
	@echo "make cost       check the cost model against make step, predict Llama-3 on H100s"
	@echo "make docs       build the site of docs/ into build/site"
	@echo "make lint       ruff, mypy, the import contract, clang-format;  make format  applies their fixes"
	@echo "make fidelity   measure the probe gradient against the fp64 oracle; writes CSV and picture"
	@echo "make wheels     wheels with CPU kernels, one per Python, run beside another torch than theirs"
	@echo "                (WHEELS='--python python3.12 --torch 2.10.0', '--help' for the rest)"
	@echo "make hub        the Triton kernels in the layout of the kernel hub, in hub/build"
	@echo "make install    the virtual environment that the others share (TORCH=$(TORCH))"

install: $(VENV)/.installed

# What is compiled, and with which of PyTorch's headers, decides setup.py (SAP_FAST_BUILD).
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

$(VENV)/.installed: pyproject.toml setup.py $(LOCK) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCK) \
		"$(TORCH)" $(BUILD_TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --constraint $(LOCK) \
		--disable-pip-version-check --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m benchmarks.demo $(if $(STEPS),--steps $(STEPS)) $(DEMO)

study: install
	$(BIN)/python -m benchmarks.study $(STUDY)

# One process for each core takes little more than half the time; with one thread each, or they are
# in each other's way.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -m slow

# The oldest versions of all but torch, beside the kernels that `make install` compiled for it.
OLDEST := build/oldest
OLDEST_TESTS := tests/integrations tests/losses tests/cli tests/model/test_probes.py \
	tests/model/test_layers.py tests/test_compatibility.py tests/test_configuration.py

$(OLDEST)/.installed: pyproject.toml requirements/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	SAP_FAST_BUILD=0 $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/oldest.txt "$(TORCH)" ".[train,trl]" \
		pytest pytest-xdist hypothesis psutil
	touch $@

test-oldest: install $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow" -n auto --maxprocesses 4 \
		--dist worksteal $(OLDEST_TESTS)

# Stacks that the other environments do without, beside the same torch and the same kernels. A stack
# whose tests are in a file of its own is named here.
STACKS := build/stacks
STACKS_TESTS := $(wildcard $(patsubst %,tests/integrations/test_%.py, \
	deepspeed lightning liger torchtitan))
STACKS_EXAMPLES := deepspeed or lightning or torchtitan

$(STACKS)/.installed: pyproject.toml $(LOCK) requirements/stacks.txt
	test -x $(STACKS)/bin/python || $(PYTHON) -m venv $(STACKS)
	SAP_FAST_BUILD=0 $(STACKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(LOCK) "$(TORCH)" ".[train,trl,triton]" pytest hypothesis psutil
	DS_BUILD_OPS=0 $(STACKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --requirement requirements/stacks.txt
	touch $@

test-stacks: install $(STACKS)/.installed
	OMP_NUM_THREADS=1 $(STACKS)/bin/python -m pytest $(STACKS_TESTS)
	OMP_NUM_THREADS=1 $(STACKS)/bin/python -m pytest tests/examples -k "$(STACKS_EXAMPLES)"

# Stacks that ask for other versions than requirements/newest.txt has.
build/axolotl/.installed build/swift/.installed: build/%/.installed: pyproject.toml $(LOCK) requirements/%.txt
	test -x build/$*/bin/python || $(PYTHON) -m venv build/$*
	SAP_FAST_BUILD=0 build/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(LOCK) "$(TORCH)" ".[train,trl,qlora]" pytest hypothesis psutil schedulefree
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement requirements/$*.txt
	touch $@

test-axolotl test-swift: test-%: install build/%/.installed
	OMP_NUM_THREADS=1 build/$*/bin/python -m pytest tests/integrations/test_$*.py

# It downloads what it does not find in pip's cache: a torch for GPUs where there is no other.
matrix: install
	$(BIN)/python -m benchmarks.matrix $(MATRIX)

# What PyTorch, oneDNN, MKL and the kernels here take a CPU for. A library that is told of instructions
# that are not there dies of it.
test-cpus: install
	for cpu in "default SSE41 SSE4_2 baseline" "avx2 AVX2 AVX2 avx2"; do \
		set -- $$cpu; \
		if [ $$1 = avx2 ] && ! grep -qw avx2 /proc/cpuinfo; then echo "no AVX2 here"; continue; fi; \
		echo "ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3" \
			"SAP_FAST_CPU_CAPABILITY=$$4"; \
		ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 \
			SAP_FAST_CPU_CAPABILITY=$$4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" \
			-n auto --maxprocesses 4 --dist worksteal $(CPU_TESTS) || exit 1; \
	done
	$(BIN)/python -m pytest -q tests/ops/test_other_machines.py

# A copy of the tree, so that the extension in use stays as it is. The sanitizers' libraries have to
# be loaded before Python; Python itself leaks on purpose.
sanitize: install
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc sap_fast tests setup.py pyproject.toml README.md LICENSE build/sanitize
	find build/sanitize -name '*.so' -delete
	cd build/sanitize && PATH="$(abspath $(BIN)):$$PATH" SAP_FAST_BUILD=cpu SAP_FAST_SANITIZE=1 \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider $(SANITIZED)

# GPU_PYTHON=python3 takes an interpreter that has torch and the rest already: it builds for the GPU
# that is there, and downloads nothing.
gpu: $(if $(GPU_PYTHON),,install)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(if $(GPU_PYTHON),--build) $(GPU)

kernels: install
	$(BIN)/python -m benchmarks.kernel_report

# Alone on the machine: it times.
ops: install
	$(BIN)/python -m benchmarks.ops

# Alone on the machine: it times.
step: install
	$(BIN)/python -m benchmarks.step $(STEP)

recipes: install
	$(BIN)/python -m benchmarks.recipes

launches: install
	$(BIN)/python -m benchmarks.launches

# Alone on the machine: it times.
before-after: install
	$(BIN)/python -m benchmarks.before_after --before $(BEFORE)

cost: install
	$(BIN)/python -m benchmarks.predictions

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sap_fast
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

fidelity: install
	$(BIN)/python -m benchmarks.fidelity

wheels: install
	$(BIN)/python -m benchmarks.wheels $(WHEELS)

hub: install
	$(BIN)/python -m hub.build

clean:
	rm -rf $(VENV) build dist *.egg-info
