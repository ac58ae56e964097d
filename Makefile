# `make demo` and `make test` set everything up by themselves; a second call redoes nothing.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
OUTPUT ?= bench-output
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := $(VENV)/triton-oldest

.PHONY: demo demo-synthesis test test-oldest lint inspect bench bench-gpu setup clean

demo: $(READY)
	$(BIN)/meduet-fast sample-data $(DEMO)/sample-data
	$(BIN)/meduet-fast prepare --input $(DEMO)/sample-data/manifest.yaml --output $(DEMO)/store
	$(BIN)/meduet-fast pretrain --config demo --data $(DEMO)/store --output $(DEMO)/run --resume
	$(BIN)/meduet-fast report $(DEMO)/run

# After `make demo`: networks that make volumes, each from scratch, with the pretrained encoder's weights, and aligned
# to it, for equally many steps; with one vector of content, and with its tokens; then what they are worth.
SYNTHESIS := $(DEMO)/synthesis
TRAIN := $(BIN)/meduet-fast synthesize train --data $(DEMO)/store --factors $(DEMO)/factors.safetensors --resume
demo-synthesis: $(DEMO)/factors.safetensors
	$(TRAIN) --output $(SYNTHESIS)/sit-scratch --config sit_demo
	$(TRAIN) --output $(SYNTHESIS)/sit-transferred --config sit_demo --init $(DEMO)/run
	$(TRAIN) --output $(SYNTHESIS)/sit-aligned --config sit_demo --diffusion.align 0.5
	$(TRAIN) --output $(SYNTHESIS)/sit-tokens --config sit_demo --diffusion.align 0.5 --content tokens \
		--content_projection 8 --diffusion.content_noise 1.5 --diffusion.drop_style 0.05 \
		--standardise volume --exchanged_share 0.4 --factor_source volume
	$(TRAIN) --output $(SYNTHESIS)/unet-scratch --config unet_demo
	$(TRAIN) --output $(SYNTHESIS)/unet-transferred --config unet_demo --init $(DEMO)/run
	$(TRAIN) --output $(SYNTHESIS)/unet-aligned --config unet_demo --diffusion.align 0.5
	$(BIN)/meduet-fast synthesize evaluate $(SYNTHESIS)/sit-* --output $(SYNTHESIS)/evaluation \
		--samples 48 --decoded 12 --steps 12 --scales '[[2,2],[0,2],[2,0]]'
	$(BIN)/meduet-fast synthesize evaluate $(SYNTHESIS)/unet-* --output $(SYNTHESIS)/evaluation-unet \
		--samples 24 --decoded 12 --steps 12 --scales '[[2,2]]'

$(DEMO)/factors.safetensors: | $(READY)
	$(BIN)/meduet-fast factors $(DEMO)/run --data $(DEMO)/store --output $@ --window 12 --stride 2 --tokens true \
		--exchanged 5 --batch_size 64

# pytest and not python -m pytest: the latter puts this folder on sys.path, where `kernels` would be found.
# Two workers of one thread each: twelve to seventeen minutes on two cores, less than one worker of two takes.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal --benchmark-disable

# The same suite on the oldest versions that setup.py admits, in .venv-oldest: about 2 GB to download, 6 GB on disk.
# PYTHON=python3.10 makes Python the oldest one, too.
test-oldest: build/constraints-oldest.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$<

# What constraints-oldest.txt does not name is as in constraints.txt.
build/constraints-oldest.txt: constraints-oldest.txt constraints.txt
	@mkdir -p build
	awk -F== 'FNR == NR { print; named[$$1]; next } !($$1 in named)' $^ > $@

# The type checker sees the installed layout, in which `kernels` is `meduet_fast.kernels`.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	$(BIN)/python -W ignore setup.py -q build_py --build-lib build/typecheck
	$(BIN)/mypy
	$(BIN)/mypy examples

# Compiles every kernel for three GPU generations, needs none; with the pinned Triton and with the oldest. After a
# change of kernels or configurations write the snapshot again with --json instead of --check, and look at the
# difference.
inspect: $(READY) $(OLDEST_TRITON)
	$(BIN)/python -m meduet_fast.kernels.inspect --check kernels/inspect.json
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m meduet_fast.kernels.inspect --check kernels/inspect.json

# Put first on PYTHONPATH it takes the place of the pinned one, beside the same torch.
$(OLDEST_TRITON): | $(READY)
	$(BIN)/pip install --constraint constraints-oldest.txt --no-deps --target $@ triton

# Under 10 minutes on two cores; the results go to benchmarks/results.
bench: $(READY)
	$(BIN)/python -m benchmarks.run --set cpu

# Under 8 minutes on an H100; the folder OUTPUT has everything to carry home.
bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.run --set gpu --output $(OUTPUT)

# All that is to be seen on a GPU in BUDGET seconds; the folder gpu-check-output has what was found, errors first in
# summary.txt. PARTS picks others: official is bench-gpu in the time that is left, sanitize needs compute-sanitizer.
.PHONY: gpu-check
gpu-check: BUDGET ?= 540
gpu-check: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/gpu_check/measure.sh --budget $(BUDGET) $(PARTS:%=--parts %)

setup: $(READY)

$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
		"Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		echo "venv is not usable here; taking virtualenv"; rm -rf $(VENV); \
		$(PYTHON) -m pip install --quiet --target .bootstrap virtualenv && \
		PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet $(VENV); }
	$(BIN)/pip install --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
