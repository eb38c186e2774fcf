"""Milliseconds a word of lm_generate.py beside a plain reference.

    python benchmarks/generate_latency.py
    python benchmarks/generate_latency.py --model Transformer --lengths 100 1000 --json words.json

Untrained models of the original's default sizes, with WikiText-2's number of words. The kit's
side is lm_generate.generate, every word of it; the other is that of benchmarks/reference_lm.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import reference_lm
import rounds
import tables
import torch
from lm_throughput import spec_of
from reference_lm import MAX_POSITIONS, MODELS
from rounds import Contestant, Round, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lm_generate
from engine.cli import ArgumentParser, UserError, positive_int
from engine.stop import run_script
from word_language_model.model import build_model, model_class

SAMPLES = 10  # of the reference's words, on the way to each length but the first


def kit(model: str, sizes: dict[str, int], lengths: list[int]) -> Round:
    """Milliseconds a word of one text, up to each of the `lengths`."""
    network = build_model(spec_of(model, sizes), dropout=0.0).eval().to(rounds.device())
    args = lm_generate.make_parser().parse(["--words", str(max(lengths))])

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


def main() -> None:
    parser = ArgumentParser("Milliseconds a word of lm_generate.py")
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", choices=MODELS, default=MODELS, help="types of network")
    add("--lengths", nargs="+", type=positive_int, default=[100, 1000, MAX_POSITIONS],
        metavar="WORDS", help="of a text")
    for name, default in reference_lm.SIZES.items():
        add(f"--{name}", type=positive_int, default=default, help="of the model")
    # fmt: on
    rounds.add_arguments(parser, positive_int)
    args = parser.parse_args()
    lengths = sorted(set(args.lengths))
    if lengths[-1] > MAX_POSITIONS:
        raise UserError(f"--lengths: the reference has {MAX_POSITIONS} positions: ask for less")

    sizes = {name: getattr(args, name) for name in reference_lm.SIZES}
    rows: list[Row] = []
    for model in args.model:
        model_class(model).check(spec_of(model, sizes), lm_generate.DEFAULT_BPTT)
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
            Contestant("floor", "floors:one_word", bound, rounds.floor_environment()),
        ]
        titles = [f"{model}, {length} words" for length in lengths]
        rows += rounds.measure(titles, "ms a word", contestants, args.rounds)
    notes = [
        "reference: Transformer and CNN read their whole text for every word. All of the first "
        f"{lengths[0]} words were written, then {SAMPLES} on the way to each length; the time of "
        "those between is interpolated.",
        "kit: all words were written; Transformer and CNN read the last "
        f"{lm_generate.DEFAULT_BPTT}, of which the CNN needs its receptive field.",
        "floor: the decoder's product for one word alone, which reads all of its weights.",
        "MB: peak memory above the imported libraries.",
        ", ".join(f"{name} {value}" for name, value in sizes.items()) + ".",
    ]
    tables.report(rows, notes, args)


if __name__ == "__main__":
    run_script(main)
