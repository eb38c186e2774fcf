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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import floors
import reference_lm
import rounds
import tables
from reference_lm import EVAL_COLUMNS, MODELS
from rounds import Round, Row

import lm_main
import lm_model
import runtime
from lm_checkpoint import TrainingState
from lm_model import ModelSpec
from runtime import positive_int

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
    """Tokens a second, set up as lm_main.main and lm_main.fit do."""
    accelerator = runtime.build_accelerator()
    runtime.keep_freed_memory(2**30)
    flags = ["--model", model, "--batch-size", str(columns), "--bptt", str(bptt)]
    args = lm_main.parse_arguments([*flags, "--lr", str(reference_lm.LR[model])])
    lm_main.settle(args, {}, accelerator)
    runtime.use_deterministic_kernels(True)
    torch.manual_seed(args.seed)
    bare = lm_model.build_model(spec_of(model, sizes), args.dropout)
    data = reference_lm.text(steps, columns, bptt, sizes["words"]).to(accelerator.device)
    optimizer = torch.optim.SGD(bare.parameters(), lr=args.lr)
    if compiled:
        bare.compile()
    network, optimizer = accelerator.prepare(bare, optimizer)

    def nothing() -> None:
        """No checkpoint is due, and no signal has come."""

    def epoch() -> object:
        if work == "validation":
            return lm_main.evaluate(accelerator, bare, data, bptt, nothing)
        run = TrainingState()
        return lm_main.train_epoch(
            accelerator, network, optimizer, data, run, args.lr, nothing, nothing, args
        )

    return lambda: [steps * bptt * columns / rounds.seconds(epoch)]


def main() -> None:
    parser = runtime.ArgumentParser(description="Tokens a second of lm_main.py")
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", choices=MODELS, default=MODELS, help="(default: both)")
    add("--only", nargs="+", choices=WORK, default=WORK, metavar="ROW",
        help=f"{' '.join(WORK)} (default: both)")
    for name, default in reference_lm.SIZES.items():
        add(f"--{name}", type=positive_int, default=default, help="(default: %(default)s)")
    add("--batch-size", type=positive_int, default=20, help="columns (default: %(default)s)")
    add("--bptt", type=positive_int, default=35, help="(default: %(default)s)")
    add("--steps", type=positive_int, default=20, help="of a round (default: %(default)s)")
    add("--compile", action="store_true", help="of the kit's model")
    # fmt: on
    rounds.add_arguments(parser, positive_int)
    rounds.add_precision(parser, bf16=not runtime.emulates_bf16(rounds.device()))
    args = parser.parse_args()

    sizes = {name: getattr(args, name) for name in reference_lm.SIZES}
    rows: list[Row] = []
    notes: list[str] = []
    for model in args.model:
        lm_model.check_spec(spec_of(model, sizes), args.bptt)
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
                ("lm_throughput:kit", {"work": work, "compiled": args.compile, **options}),
                ("floors:products", floor_options),
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
    runtime.run_script(main)
