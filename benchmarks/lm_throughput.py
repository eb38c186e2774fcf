"""Tokens a second and peak memory of lm_main.py beside a plain reference.

    python benchmarks/lm_throughput.py
    python benchmarks/lm_throughput.py --model LSTM --only training --json lm.json

The original's default sizes and WikiText-2's number of words, drawn from a Zipf distribution.
The kit's side is the real loop, lm_main.train_epoch and lm_main.evaluate; the other is that of
benchmarks/reference_lm.py. On a machine without a GPU, or with ACCELERATE_USE_CPU=true, the CPU
is measured.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import floors
import reference_lm
import rounds
import tables
from reference_lm import EVAL_COLUMNS, MODELS
from rounds import Round, Row

import lm_main
from engine.cli import ArgumentParser, positive_int
from engine.launch import emulates_bf16
from engine.stop import run_script
from word_language_model.data import Corpus
from word_language_model.model import model_class
from word_language_model.settings import ModelSpec

WORK = ("training", "validation")


def spec_of(model: str, sizes: dict[str, int]) -> ModelSpec:
    return ModelSpec(model=model, nhead=reference_lm.NHEAD, tied=False, **sizes)


def kit(
    work: str,
    model: str,
    sizes: dict[str, int],
    columns: int,
    bptt: int,
    steps: int,
    compiled: bool,
) -> Round:
    """Tokens a second of all processes together, set up as lm_main.main does."""
    flags = ["--model", model, "--batch-size", str(columns), "--bptt", str(bptt)]
    flags += ["--lr", str(reference_lm.LR[model]), "--nhead", str(reference_lm.NHEAD)]
    flags += [f"--{name}={size}" for name, size in sizes.items() if name != "words"]
    flags += ["--compile"] * compiled
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved there
        run, args, checkpoint = lm_main.begin([*flags, "--save", f"{folder}/model.pt"])
    tokens = reference_lm.text(steps, columns, bptt, sizes["words"]).t().flatten()
    words = [f"word{number}" for number in range(sizes["words"])]
    corpus = Corpus(Path(), words, tokens, tokens, tokens)
    network, optimizer, text = lm_main.build(run, corpus, args, checkpoint)
    step = lm_main.training_step(run, network, optimizer, args)

    def epoch() -> object:
        if work == "validation":
            return lm_main.evaluate(run, network, text, args)
        run.step, run.state["hidden"] = 0, ()  # every round is the first epoch
        return lm_main.train_epoch(run, network, step, text, args)

    return lambda: [steps * bptt * columns / rounds.seconds(epoch)]


def main() -> None:
    parser = ArgumentParser("Tokens a second of lm_main.py")
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", choices=MODELS, default=MODELS, help="types of network")
    add("--only", nargs="+", choices=WORK, default=WORK, metavar="ROW", help=" ".join(WORK))
    for name, default in reference_lm.SIZES.items():
        add(f"--{name}", type=positive_int, default=default, help="of the model")
    add("--batch-size", type=positive_int, default=20, help="columns of text")
    add("--bptt", type=positive_int, default=35, help="words of a column in a step")
    add("--steps", type=positive_int, default=20, help="of a round")
    add("--compile", action="store_true", help="on a CPU, measure the kit with --compile as well")
    # fmt: on
    rounds.add_arguments(parser, positive_int)
    rounds.add_precision(parser, bf16=not emulates_bf16(rounds.device()))
    args = parser.parse_args()

    sizes = {name: getattr(args, name) for name in reference_lm.SIZES}
    rows: list[Row] = []
    notes: list[str] = []
    for model in args.model:
        model_class(model).check(spec_of(model, sizes), args.bptt)
        for work in args.only:
            columns = args.batch_size if work == "training" else EVAL_COLUMNS
            options = {"model": model, "sizes": sizes, "columns": columns, "bptt": args.bptt}
            options["steps"] = args.steps
            flops = floors.flops_per_token(work, model, sizes, args.bptt)
            size = args.emsize if model == "Transformer" else args.nhid
            floor_options = {
                "work": work,
                "flops": flops,
                "rows": columns * args.bptt,
                "size": size,
                "words": args.words,
            }
            contestants = rounds.line_up(
                args.precision,
                (f"reference_lm:{work}", options),
                ("lm_throughput:kit", {"work": work, **options}),
                ("floors:products", floor_options),
                args.compile,
            )
            rows += rounds.measure([f"{model} {work}"], "tokens/s", contestants, args.rounds, flops)
            share = 2 * args.words * size * (3 if work == "training" else 1) / flops
            notes.append(f"{model} {work}: {share:.0%} of the step's FLOPs are the decoder's.")
    notes += [
        f"{args.batch_size} columns ({EVAL_COLUMNS} in validation) of {args.bptt} words a step, "
        f"{args.steps} steps a round; " + ", ".join(f"{k} {v}" for k, v in sizes.items()) + ".",
        "MB: peak memory above the imported libraries.",
        "floor: the step's FLOPs at the rate of the decoder's matrix products alone.",
    ]
    tables.report(rows, notes, args)


if __name__ == "__main__":
    run_script(main)
