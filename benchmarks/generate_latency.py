"""Milliseconds a word of lm_generate.py beside a plain reference.

    python benchmarks/generate_latency.py
    python benchmarks/generate_latency.py --model Transformer --lengths 100 1000 --json words.json

Untrained models of the original's default sizes, with WikiText-2's number of words. The kit's
side is lm_generate.generate, every word of it; the other is that of benchmarks/reference_lm.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import reference_lm
import rounds
import torch
from reference_lm import MAX_POSITIONS, MODELS
from rounds import Contestant, Round, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lm_generate
import lm_model

SAMPLES = 10  # of the reference's words, on the way to each length but the first


def kit(model: str, sizes: dict[str, int], lengths: list[int]) -> Round:
    spec = lm_model.ModelSpec(model=model, nhead=2, tied=False, **sizes)
    network = lm_model.build_model(spec, dropout=0.0).eval().to(rounds.device())
    args = lm_generate.parse_arguments(["--words", str(max(lengths))])

    def measured() -> list[float]:
        figures = []
        reader = lm_generate.Reader(network, lm_generate.DEFAULT_BPTT)
        generator = torch.Generator().manual_seed(args.seed)
        started = time.perf_counter()
        for count, _ in enumerate(lm_generate.generate(reader, [0], generator, args), 1):
            if count in lengths:
                figures.append(1000 * (time.perf_counter() - started) / count)
        return figures

    return measured


def floor(words: int, size: int, lengths: list[int]) -> Round:
    """Milliseconds of the decoder's product with the features of one word."""
    weight, features = torch.randn(words, size), torch.randn(1, size)
    weight, features = weight.to(rounds.device()), features.to(rounds.device())
    logits = torch.empty(1, words, device=rounds.device())

    def products(count: int = 200) -> None:
        for _ in range(count):
            torch.mm(features, weight.t(), out=logits)

    return lambda: [1000 * rounds.seconds(products) / 200] * len(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds a word of lm_generate.py")
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=MODELS)
    add("--lengths", nargs="+", type=int, default=[100, 1000, MAX_POSITIONS], metavar="WORDS")
    for name, default in reference_lm.SIZES.items():
        add(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    rounds.add_arguments(parser)
    args = parser.parse_args()
    lengths = sorted(set(args.lengths))
    if lengths[-1] > MAX_POSITIONS:
        parser.error(f"the reference has {MAX_POSITIONS} positions and fails beyond")

    sizes = {name: getattr(args, name) for name in reference_lm.SIZES}
    rows: list[Row] = []
    for model in args.model:
        options = {"model": model, "sizes": sizes, "lengths": lengths}
        size = args.emsize if model == "Transformer" else args.nhid
        bound = {"words": args.words, "size": size, "lengths": lengths}
        own, theirs = rounds.kit_environment("no"), rounds.reference_environment()
        contestants = [
            Contestant(
                "reference",
                "reference_lm:generation",
                {**options, "samples": SAMPLES},
                theirs,
                "floor",
            ),
            Contestant("kit", "generate_latency:kit", options, own, "floor"),
            Contestant("floor", "generate_latency:floor", bound, rounds.floor_environment()),
        ]
        titles = [f"{model}, {length} words" for length in lengths]
        rows += rounds.measure(titles, "ms a word", contestants, args.rounds)
    notes = [
        f"reference: the Transformer reads its whole text for every word. Up to {lengths[0]} words "
        f"all were written, beyond {SAMPLES} on the way to each length, and the time of those "
        "between interpolated.",
        f"kit: all words were written; the Transformer reads the last {lm_generate.DEFAULT_BPTT}.",
        "floor: the decoder's product for one word alone, which reads all of its weights.",
        "MB: peak memory above the imported libraries.",
        ", ".join(f"{name} {value}" for name, value in sizes.items()) + ".",
    ]
    rounds.report(rows, notes, args)


if __name__ == "__main__":
    main()
