"""Tokens a second and peak memory of lm_main.py beside a plain reference.

    python benchmarks/lm_throughput.py
    python benchmarks/lm_throughput.py --model LSTM --only training --json lm.json

The original's default sizes and WikiText-2's number of words, drawn from a Zipf distribution.
The kit's side is the real loop, lm_main.train_epoch and lm_main.evaluate; the other is that of
benchmarks/reference_lm.py. On a machine without a GPU, or with ACCELERATE_USE_CPU=true, the CPU
is measured.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reference_lm
import rounds
from reference_lm import EVAL_COLUMNS, MODELS
from rounds import Round

import lm_main
import lm_model
import runtime
from lm_checkpoint import TrainingState

WORK = ("training", "validation")


def kit(
    work: str,
    model: str,
    sizes: dict[str, int],
    columns: int,
    bptt: int,
    steps: int,
    compiled: bool,
) -> Round:
    """The kit's loop, as lm_main.main and lm_main.fit set it up."""
    accelerator = runtime.build_accelerator()
    flags = ["--model", model, "--batch-size", str(columns), "--bptt", str(bptt)]
    args = lm_main.parse_arguments([*flags, "--lr", str(reference_lm.LR[model])])
    lm_main.settle(args, {}, accelerator)
    runtime.use_deterministic_kernels(True)
    torch.manual_seed(args.seed)
    spec = lm_model.ModelSpec(model=model, nhead=2, tied=False, **sizes)
    bare = lm_model.build_model(spec, args.dropout)
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


def floor(work: str, rows: int, size: int, words: int, dtype: str, flops: float) -> Round:
    """Tokens a second if all of a step's `flops` a token went at the decoder's rate.

    That is the rate of its products alone: logits, and in training both gradients.
    """
    kind, device = getattr(torch, dtype), rounds.device()
    features, weight = (torch.randn(n, size, dtype=kind, device=device) for n in (rows, words))
    logits = torch.randn(rows, words, dtype=kind, device=device)
    # Into memory that is there already: its faults are not the arithmetic's.
    logits_out, features_out, weight_out = map(torch.empty_like, (logits, features, weight))

    def products() -> None:
        torch.mm(features, weight.t(), out=logits_out)
        if work == "training":
            torch.mm(logits, weight, out=features_out)
            torch.mm(logits.t(), features, out=weight_out)

    count = 2 * rows * size * words * (3 if work == "training" else 1)
    repeats = max(1, round(1 / max(min(rounds.seconds(products) for _ in range(3)), 1e-6)))

    def repeat() -> None:
        for _ in range(repeats):
            products()

    return lambda: [repeats * count / rounds.seconds(repeat) / flops]


def flops_per_token(work: str, model: str, sizes: dict[str, int], bptt: int) -> float:
    """Of the reference's step: whatever the kit computes beyond it does not count as work."""
    network = reference_lm.language_model(model, sizes)
    data = reference_lm.text(1, 2, bptt, sizes["words"])
    counter = FlopCounterMode(display=False)
    # An LSTM of oneDNN is one operation, whose FLOPs the counter does not know.
    without_onednn = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings(action="ignore"), without_onednn, counter:
        loss, _ = reference_lm.segment_loss(network, data[:-1], data[1:].view(-1), None)
        if work == "training":
            loss.backward()
    return counter.get_total_flops() / (2 * bptt)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of lm_main.py")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", choices=WORK, default=WORK, metavar="ROW")
    for name, default in reference_lm.SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=20, help="columns (default: %(default)s)")
    parser.add_argument("--bptt", type=int, default=35, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a round (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="of the kit's model")
    rounds.add_arguments(parser)
    rounds.add_precision(parser)
    args = parser.parse_args()

    sizes = {name: getattr(args, name) for name in reference_lm.SIZES}
    rows, notes = [], []
    for model in args.model:
        for work in args.only:
            columns = args.batch_size if work == "training" else EVAL_COLUMNS
            options = {"model": model, "sizes": sizes, "columns": columns, "bptt": args.bptt}
            options["steps"] = args.steps
            flops = flops_per_token(work, model, sizes, args.bptt)
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
                ("lm_throughput:floor", floor_options),
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
    rounds.report(rows, notes, args)


if __name__ == "__main__":
    main()
