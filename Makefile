# Every target makes the environment .venv first, if it is missing or older than its requirements.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: help demo check test lint ptx bench gpu-check clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# torch goes first: with it in place no other requirement brings a different build.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*.*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## train a flow on real images for about a minute, and show what the fused kernels bought
	$(VENV)/bin/flowkern demo --out $(OUT)

# A process a core, each with one thread of torch's: a test that wants more sets their number itself.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

check: lint  ## the everyday loop: ruff, mypy and the tests that are not marked slow
	$(PYTEST) -m "not slow"

test: $(READY)  ## the whole suite, on all cores
	$(PYTEST)

lint: $(READY)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

ptx: $(READY)  ## execute every GPU kernel from its PTX on the CPU; ARGS="--targets sm_90 --options shuffle=1"
	$(PY) tests/ptx/every_kernel.py $(ARGS)

bench: $(READY)  ## time, memory and the ratios to eager and torch.compile of every op
	$(PY) -m bench --csv

gpu-check:  ## build, test and time on a CUDA GPU, in the current python; ARGS=--dry-run without one
	$(PYTHON) -m bench.gpu_check $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info flowkern/_native*.so
