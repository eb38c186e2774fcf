"""Figures of a report: from curves, predictions and models to numbers."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from engine.curves import Curve
from engine.intervals import paired_difference
from word_language_model.model import LanguageModel

Curves = Mapping[str, Curve]  # of one training, by tag
# Student's t by degrees of freedom: 95 % lie within.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 12: 2.179}


def mean_curves(runs: Sequence[Curves]) -> dict[str, Curve]:
    """The mean of the curves of several seeds."""
    return {
        tag: {epoch: statistics.fmean(run[tag][epoch] for run in runs) for epoch in curve}
        for tag, curve in runs[0].items()
    }


def last(curve: Curve) -> float:
    return curve[max(curve)]


def apart(one: Curves, other: Curves) -> list[float]:
    """How far two trainings' validation losses are from each other, after each epoch."""
    return [abs(value - other["Loss/val"][epoch]) for epoch, value in one["Loss/val"].items()]


class Gap(NamedTuple):
    """How much larger one of two figures is, and the 95 % interval of that."""

    value: float
    low: float
    high: float


def seeds_gap(ours: Sequence[float], theirs: Sequence[float]) -> Gap | None:
    """The gap of two means over seeds, by Student's t test; None for one seed each."""
    free = len(ours) + len(theirs) - 2
    if not free:
        return None
    groups = [[value - statistics.fmean(group) for value in group] for group in (ours, theirs)]
    variance = sum(value**2 for group in groups for value in group) / free
    error = math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    half = error * STUDENT[max(n for n in STUDENT if n <= free)]
    gap = statistics.fmean(ours) - statistics.fmean(theirs)
    return Gap(gap, gap - half, gap + half)


def read_answers(path: Path, images: Sequence[str]) -> list[str]:
    """The class that predict.py's table has for each of the images."""
    with path.open(encoding="utf-8", newline="") as file:
        found = {str(Path(row["file"])): row["class"] for row in csv.DictReader(file)}
    return [found[str(Path(image))] for image in images]


class Answers(NamedTuple):
    """The last models' answers to the validation images, and the right ones."""

    targets: Sequence[str]
    of: Mapping[str, Mapping[int, Sequence[str]]]  # by title and seed

    def gap(self, title: str, other: str) -> Gap | None:
        """Points of Acc@1 between two titles' first seeds, paired; None where answers lack."""
        if not (title in self.of and other in self.of):
            return None
        (mine, *_), (theirs, *_) = self.of[title].values(), self.of[other].values()
        triples = [*zip(mine, theirs, self.targets, strict=True)]
        only_a = sum(a == target != b for a, b, target in triples)
        only_b = sum(b == target != a for a, b, target in triples)
        low, high = paired_difference(only_a, only_b, len(triples))
        return Gap(100 * (only_a - only_b) / len(triples), 100 * low, 100 * high)


def disagreement(
    one: Mapping[int, Sequence[str]], other: Mapping[int, Sequence[str]]
) -> float | None:
    """The share of images on which two kinds of training disagree, a mean; None without a pair.

    Those of the same seed are compared, or all where no seed is the same. Of a kind with itself
    it is two seeds that are compared.

    Args:
        one, other: answers, by seed.
    """
    if one is other:
        pairs = list(itertools.combinations(one.values(), 2))
    else:
        pairs = [(one[seed], other[seed]) for seed in one if seed in other]
        pairs = pairs or list(itertools.product(one.values(), other.values()))
    shares = [statistics.fmean(x != y for x, y in zip(*pair, strict=True)) for pair in pairs]
    return statistics.fmean(shares) if shares else None


def cost(model: LanguageModel, bptt: int) -> tuple[int, int]:
    """Parameters in a model's layers, and multiply-adds for a word in a segment of `bptt` words.

    The layers are all but the embedding and the decoder. Every weight of a layer and of the decoder
    is multiplied once a word. Attention also multiplies each query with the keys before it, and
    their weights with the values: with half of the segment on average. Dropout is left out.
    """
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight
    outside = {id(embedding), *map(id, model.decoder.parameters())}
    layers = [p for p in model.parameters() if id(p) not in outside]
    multiply_adds = model.decoder.weight.numel() + sum(p.numel() for p in layers if p.dim() > 1)
    if model.has_positions:
        attentions = sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
        multiply_adds += attentions * embedding.shape[1] * (bptt + 1)
    return sum(p.numel() for p in layers), multiply_adds


def read_contexts(path: Path) -> dict[str, dict[str, float]]:
    """What lm_context.py's table says of each model.

    Returns:
        `effective context`, with ` low` and ` high`; `most`, how many words it was shown, and
        `loss` and `loss above best`, with its ` error`, with these.
    """
    found: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            model, value = found.setdefault(row["model"], {}), float(row["value"])
            if row["measure"] == "loss":  # the last line has the most words
                model |= {"loss": value, "most": float(row["words"])}
            elif not row["words"]:
                model[row["measure"]] = value
                if row["standard_error"]:
                    model[f"{row['measure']} error"] = float(row["standard_error"])
    return found
