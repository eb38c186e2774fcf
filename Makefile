# make demo    train and evaluate on built-in data, from nothing to a checkpoint
# make report  the whole report, trained on built-in data: output/report/report.html
# make test    the test suite
# make test-cluster    the batch script, submitted to a SLURM that is started for it
# make test-gpu, make benchmark-gpu    on a machine with a GPU, by its own python where there is no venv
# make lint    ruff and mypy
# make venv    the environment alone; VENV=/elsewhere places it

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := output/demo

# What another version of Python has left in $(VENV) would be in the way.
MINOR := -c 'import sys; print(sys.version_info[:2])'

# Enough for both: torch, torchvision, accelerate, tensorboard and pytest.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help demo report test test-cluster test-gpu benchmark-gpu lint venv clean

venv: $(VENV)/.run
$(VENV)/.run: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, \
	and 3.11 or newer is needed: make venv PYTHON=python3.12" % sys.version_info[:2])' || exit 2
	@echo "Installing into $(VENV): 3 GB to download, some minutes"
	$(PYTHON) -m venv $$(test ! -f $(VENV)/pyvenv.cfg || \
	  test "$$($(BIN)/python $(MINOR))" = "$$($(PYTHON) $(MINOR))" || echo --clear) $(VENV)
	@# A torch that is there (for CPUs, or an older driver) stays, and the rest goes with it.
	@if $(BIN)/python -c "import torch" 2> /dev/null; then \
	  grep -Ev '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' constraints.txt; \
	else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -c $(VENV)/constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c $(VENV)/constraints.txt
	touch $@

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.run
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml resnet_main.py sample \
	  --stem stock --image-size 32 --epochs 16 -b 64 --lr 0.012 --lr-schedule cosine \
	  --warmup-epochs 2 --seed 1 --output-dir $(DEMO) --overwrite
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml resnet_main.py sample \
	  --evaluate --resume $(DEMO)/model_best.pth
	@$(BIN)/python -c 'from pathlib import Path; from engine.curves import *; \
	  runs = {"ResNet-18": [read_curves(Path("$(DEMO)/logs"))]}; \
	  draw_curves(runs, ["Loss", "Acc@1"], Path("$(DEMO)/curves.png"))'
	@echo
	@echo "The best checkpoint:  $(DEMO)/model_best.pth"
	@echo "Its training curves:  $(DEMO)/curves.png, or $(BIN)/tensorboard --logdir $(DEMO)/logs"
	@echo "Next, Tiny-ImageNet:  $(BIN)/accelerate launch --config_file" \
	  "accelerate_configs/cpu_bf16.yaml resnet_main.py --epochs 3 --lr-schedule cosine" \
	  "(or gpu1, gpu4; downloads 248 MB)"

report: $(VENV)/.run
	$(BIN)/python reproduce.py

# Two tests at a time: most of them wait for processes to start, or for each other.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

# Debian keeps daemons in a folder that is not everyone's PATH. Only installing them takes root.
test-cluster: export PATH := $(PATH):/usr/sbin
test-cluster: $(VENV)/.dev
	@command -v slurmctld > /dev/null && command -v munged > /dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq slurm-wlm munge; } || \
	  { echo "make test-cluster needs SLURM: as root, apt install slurm-wlm munge" >&2; exit 2; }
	$(BIN)/python -m pytest -m cluster

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py

benchmark-gpu:
	$(GPU_PYTHON) benchmarks/resnet_throughput.py -b 1024 --precision bf16 --compile --rounds 3 \
	  --only training validation loading --json resnet-gpu.json
	$(GPU_PYTHON) benchmarks/lm_throughput.py --precision no bf16 --rounds 3 --steps 200 \
	  --only training --json lm-gpu.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

clean:
	rm -rf $(DEMO) .mypy_cache .pytest_cache .ruff_cache
