# Every task of the repository. The environment is .venv, made when missing; `make TASK VENV=path` takes another one,
# and an active environment (venv or conda) that already has what requirements.txt names is used as it is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

JOBS ?= 2
ALL_STAGES := tests/true_size/test_true_size_training.py# takes nearly all of 24 GB: in a process of its own
PYTHON3 ?= python3

# Succeeds if every package of requirements.txt is installed and not older than its floor. Imports none of them.
COMPLETE := import re; from importlib.metadata import version; \
number = lambda text: [int(part) for part in re.findall(r"\d+", text)[:3]]; \
listed = re.findall(r"^([\w-]+)(?:>=([\d.]+))?", open("requirements.txt").read(), re.M); \
assert all(number(version(name)) >= number(floor) for name, floor in listed)

# The first of VENV and the active environments that is complete.
CANDIDATES := $(if $(VENV),"$(VENV)","$$VIRTUAL_ENV" "$$CONDA_PREFIX")
READY := $(shell for root in $(CANDIDATES); do \
	if [ -x "$$root/bin/python" ] && "$$root/bin/python" -c '$(COMPLETE)' 2>/dev/null; then echo "$$root"; break; fi; done)

ifeq ($(READY),)
VENV := $(or $(VENV),.venv)
INSTALLED := $(VENV)/.installed
PYTHON := "$(VENV)/bin/python"

$(VENV)/.installed: requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or newer is needed, this is %d.%d; name another one with PYTHON3=path" % sys.version_info[:2])'
	$(PYTHON3) -m venv "$(VENV)"
	$(PYTHON) -m pip install --disable-pip-version-check --no-input -r requirements.txt
	@touch "$@"
else
INSTALLED :=
PYTHON := "$(READY)/bin/python"
endif

.PHONY: help demo test test-full lint bench

help: ## Show this list
	@echo "Tasks:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo 'Environment: $(PYTHON)$(if $(READY),, (made when missing; VENV=path takes another one))'

demo: $(INSTALLED) ## Run the whole method on phantoms; report in demo_output/report.html
	$(PYTHON) tool/run_stages.py configs/demo.yaml

test: lint ## Check the style and run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS)

test-full: lint ## Run all tests, the true-size ones too (24 GB of memory, 40 GB of disk)
	$(PYTHON) -m pytest -m "" --ignore $(ALL_STAGES)
	$(PYTHON) -m pytest -m slow $(ALL_STAGES)

lint: $(INSTALLED) ## Check the style only
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	"$(dir $(PYTHON))lint-imports" --no-cache

bench: $(INSTALLED) ## Measure the speed of this machine
	$(PYTHON) tool/bench.py inference
