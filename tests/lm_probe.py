"""Every digit of an evaluation, printed by the main process, for test_lm_main.py."""

import sys

import lm_main
from word_language_model.data import batchify, load_corpus

corpus = load_corpus(sys.argv[1])
text = batchify(corpus.valid, lm_main.EVAL_BATCH_SIZE, "valid")
for path in sys.argv[2:]:
    run, args, checkpoint = lm_main.begin(["--evaluate", "--resume", path, "--bptt", "6"])
    model, *_ = lm_main.build(run, corpus, args, checkpoint)
    loss = lm_main.evaluate(run, model, text, args)
    accelerator = run.accelerator
    accelerator.print(f"{accelerator.num_processes} processes, {path}: {loss!r}")
