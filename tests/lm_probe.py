"""Every digit of an evaluation, printed by the main process, for test_lm_main.py."""

import sys
from pathlib import Path

import lm_checkpoint
import lm_data
import lm_main
import runtime

accelerator = runtime.build_accelerator()
corpus = lm_data.load(sys.argv[1])
for path in map(Path, sys.argv[2:]):
    model, _ = lm_checkpoint.restore_model(lm_checkpoint.load(path), path)
    data = lm_data.batchify(corpus.valid, lm_main.EVAL_BATCH_SIZE, "valid")
    loss = lm_main.evaluate(accelerator, model, data, 6, lambda: None)
    accelerator.print(f"{accelerator.num_processes} processes, {path}: {loss!r}")
