# make demo    train and evaluate on built-in data, from nothing to a checkpoint
# make test    the whole test suite
# make lint    ruff and mypy
# make venv    the environment alone; VENV=/elsewhere places it

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := output/demo

.PHONY: demo test lint venv clean

venv: $(VENV)/.run
$(VENV)/.run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(VENV)/.run
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml resnet_main.py sample \
	  --stem stock --epochs 5 -b 32 --lr 0.02 --lr-schedule cosine --seed 1 --output-dir $(DEMO)
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml resnet_main.py sample \
	  --evaluate --resume $(DEMO)/model_best.pth
	@echo
	@echo "The best checkpoint:  $(DEMO)/model_best.pth"
	@echo "Its training curves:  $(BIN)/tensorboard --logdir $(DEMO)/logs"
	@echo "Next, Tiny-ImageNet:  $(BIN)/accelerate launch --config_file" \
	  "accelerate_configs/gpu4.yaml resnet_main.py   (or gpu1.yaml, cpu.yaml; downloads 248 MB)"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

clean:
	rm -rf $(DEMO) .mypy_cache .pytest_cache .ruff_cache
