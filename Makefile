# Every task of the repository. The environment is .venv, made when missing from requirements.lock; `make TASK VENV=path`
# takes another one, and an active environment (venv or conda) that already has what pyproject.toml names is used as it
# is. NEWEST=1 ignores the lock: the newest releases that pyproject.toml allows, in .venv-newest. CPU=1 takes PyTorch's
# CPU wheels, in .venv-cpu, from the package index that TORCH_INDEX=URL names.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

JOBS ?= 2
ALL_STAGES := tests/true_size/test_true_size_training.py# takes nearly all of 24 GB: in a process of its own
PYTHON3 ?= python3

# Succeeds if every package of pyproject.toml is installed in a version that it allows. Imports none of them.
COMPLETE := import tomllib; from importlib.metadata import version; from packaging.requirements import Requirement; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = sum(project["optional-dependencies"].values(), []); \
wanted = map(Requirement, project["dependencies"] + [each for each in extras if not each.startswith(project["name"])]); \
assert all(each.specifier.contains(version(each.name), prereleases=True) for each in wanted)

# The first of VENV and the active environments that is complete.
CANDIDATES := $(if $(VENV),"$(VENV)",$(if $(NEWEST)$(CPU),,"$$VIRTUAL_ENV" "$$CONDA_PREFIX"))
READY := $(if $(NEWEST),,$(shell for root in $(CANDIDATES); do \
	if [ -x "$$root/bin/python" ] && "$$root/bin/python" -c '$(COMPLETE)' 2>/dev/null; then echo "$$root"; break; fi; done))

ifeq ($(READY),)
VENV := $(or $(VENV),.venv$(if $(NEWEST),-newest)$(if $(CPU),-cpu))
INSTALLED := $(VENV)/.installed
PYTHON := "$(VENV)/bin/python"
PIP := $(PYTHON) -m pip install --disable-pip-version-check --no-input

ifneq ($(NEWEST),)
INSTALL = $(PIP) --upgrade --upgrade-strategy eager $(if $(CPU),--extra-index-url "$(TORCH_INDEX)") -e '.[test]'
.PHONY: $(INSTALLED)
else ifneq ($(CPU),)
# The CPU wheels have other digests than the lock's, and need no CUDA; all other packages are as locked.
TORCH = $(shell sed -nE 's/^(torch|torchvision)(==[^ ;]+).*/\1\2/p' requirements.lock)
INSTALL = $(PIP) --no-deps --index-url "$(TORCH_INDEX)" $(TORCH) && \
	awk '/^[^ \#]/ {keep = !/^(torch|torchvision|triton|nvidia-[^ ]*|cuda-[^ ]*)==/} keep' requirements.lock > "$(VENV)/cpu.lock" && \
	$(PIP) --no-deps --require-hashes -r "$(VENV)/cpu.lock" && $(PIP) --no-deps --no-build-isolation -e .
else
INSTALL = $(PIP) --require-hashes -r requirements.lock && $(PIP) --no-deps --no-build-isolation -e .
endif

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or newer is needed, this is %d.%d; name another one with PYTHON3=path" % sys.version_info[:2])'
	@[ -z "$(CPU)" ] || [ -n "$(TORCH_INDEX)" ] || { echo "CPU=1: name the package index of PyTorch's CPU wheels with \
	TORCH_INDEX=URL; PyTorch's installation page shows it for the choice CPU" >&2; exit 2; }
	$(PYTHON3) -m venv "$(VENV)"
	$(INSTALL)
	@touch "$@"
else
INSTALLED :=
PYTHON := "$(READY)/bin/python"
endif

.PHONY: help demo test test-full lint bench gpu lock

help: ## Show this list
	@echo "Tasks:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo 'Environment: $(PYTHON)$(if $(READY),, (made when missing; VENV=path takes another one))'

demo: $(INSTALLED) ## Run the whole method on phantoms; report in demo_output/report.html
	$(PYTHON) tool/run_stages.py configs/demo.yaml

# A file's tests stay together and in order: those that drive a browser are one session of it.
test: lint ## Check style, layers and types, and run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist loadfile

test-full: lint ## Run all tests, the true-size ones too (24 GB of memory, 40 GB of disk)
	$(PYTHON) -m pytest -m "" --ignore $(ALL_STAGES)
	$(PYTHON) -m pytest -m slow $(ALL_STAGES)

lint: $(INSTALLED) ## Check style, layers and types only
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-cache
	$(PYTHON) -m mypy

bench: $(INSTALLED) ## Measure the speed of this machine
	$(PYTHON) tool/bench.py inference

gpu: $(INSTALLED) ## Measure training and drawing on a GPU in 9 minutes, repeated: the rest (docs/gpu.md)
	$(PYTHON) tool/gpu.py

lock: ## Write requirements.lock again from pyproject.toml (UPGRADE=1: newer releases too)
	$(PYTHON3) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lock/bin/uv pip compile pyproject.toml --quiet --extra test --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --output-file requirements.lock
