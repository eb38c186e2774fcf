"""Every digit of an evaluation, printed by the main process, for test_lm_main.py."""

import sys

import lm_main
from engine.launch import build_accelerator
from word_language_model.checkpoint import load
from word_language_model.data import batchify, load_corpus
from word_language_model.training import make_run, set_up, settle

accelerator = build_accelerator()
corpus = load_corpus(sys.argv[1])
text = batchify(corpus.valid, lm_main.EVAL_BATCH_SIZE, "valid")
for path in sys.argv[2:]:
    parser = lm_main.make_parser()
    args = parser.parse(["--evaluate", "--resume", path, "--bptt", "6"])
    run = make_run(accelerator, args)
    checkpoint = load(args.resume)
    spec = settle(parser, args, checkpoint, accelerator)
    spec = spec._replace(words=len(corpus.vocabulary))
    model, *_ = set_up(run, spec, text, args, checkpoint)
    loss = lm_main.evaluate(run, model, text, args)
    accelerator.print(f"{accelerator.num_processes} processes, {path}: {loss!r}")
