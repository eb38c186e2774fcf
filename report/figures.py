"""Figures of a report: from curves, predictions and models to numbers."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from engine.curves import Curve
from engine.intervals import paired_difference
from image_classification.folders import find_images
from image_classification.sources import resolve
from report.page import Page
from report.plan import Groups
from report.steps import script
from word_language_model.model import LanguageModel

Curves = Mapping[str, Curve]  # of one training, by tag


class Pair(NamedTuple):
    """Two models' answers to the same images."""

    images: int
    disagree: int
    only_a: int  # images that a alone gets right
    only_b: int


class Cost(NamedTuple):
    """Of a language model."""

    parameters: int
    in_layers: int  # of these, neither embedding nor decoder
    multiply_adds: int  # a word


def mean_curves(runs: Sequence[Curves]) -> dict[str, Curve]:
    """The mean of several trainings' curves at each epoch that all have."""
    first, *others = runs
    return {
        tag: {
            epoch: statistics.fmean(run[tag][epoch] for run in runs)
            for epoch in curve
            if all(epoch in run[tag] for run in others)
        }
        for tag, curve in first.items()
        if all(tag in run for run in others)
    }


def last(curve: Curve) -> float:
    return curve[max(curve)]


def apart(one: Curves, other: Curves, tag: str) -> list[float]:
    """How far two trainings' curves are from each other after each epoch that both have."""
    return [abs(value - other[tag][e]) for e, value in one[tag].items() if e in other[tag]]


def farthest(runs: Sequence[Curves], tag: str) -> float | None:
    """The largest distance between curves of any two of the trainings; None without two."""
    pairs = itertools.combinations(runs, 2)
    return max((max(apart(one, other, tag)) for one, other in pairs), default=None)


def read_answers(path: Path, images: Sequence[str]) -> list[str]:
    """The class that predict.py's table has for each of the images."""
    with path.open(encoding="utf-8", newline="") as file:
        found = {str(Path(row["file"])): row["class"] for row in csv.DictReader(file)}
    return [found[str(Path(image))] for image in images]


def compare(a: Sequence[str], b: Sequence[str], targets: Sequence[str]) -> Pair:
    triples = list(zip(a, b, targets, strict=True))
    return Pair(
        len(triples),
        sum(one != other for one, other, _ in triples),
        sum(one == target != other for one, other, target in triples),
        sum(other == target != one for one, other, target in triples),
    )


class Answers:
    """The last models' answers to the validation images, and the right ones.

    Of the last epoch: the best one was chosen by these very images.
    """

    def __init__(self, page: Page, groups: Groups, data: str) -> None:
        root = resolve(data, download=False)
        found = find_images(root)
        names = [name for runs in groups.values() for name in runs.values()]
        self.tables = {name: page.folder / "answers" / f"{name}.csv" for name in names}
        checkpoints = {name: page.folder / name / "checkpoint.pth" for name in names}
        self.commands = {
            name + " answers": script(
                *("predict.py", checkpoints[name], root / "val", "--top", 1),
                *("--csv", self.tables[name]),
            )
            for name in names
        }
        (page.folder / "answers").mkdir(exist_ok=True)
        done = page.steps.run(self.commands)
        self.targets = [found.classes[target] for target in found.val.targets]
        self.of: dict[str, dict[int, list[str]]] = {}  # by title and seed
        for title, runs in groups.items():
            self.of[title] = {
                seed: read_answers(self.tables[name], found.val.paths)
                for seed, name in runs.items()
                if f"{name} answers" in done
            }

    def gap(self, title: str, other: str) -> tuple[float, tuple[float, float]] | None:
        """Points of Acc@1 between the first models of two titles, and their 95 % interval."""
        if not (self.of[title] and self.of[other]):
            return None
        (mine, *_), (theirs, *_) = self.of[title].values(), self.of[other].values()
        pair = compare(mine, theirs, self.targets)
        low, high = paired_difference(pair.only_a, pair.only_b, pair.images)
        gap = (pair.only_a - pair.only_b) / pair.images
        return 100 * gap, (100 * low, 100 * high)


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


def cost(model: LanguageModel, bptt: int) -> Cost:
    """What a model has and does for a word in a segment of `bptt` words, dropout left out.

    Every weight of a layer is multiplied once a word. Attention multiplies also each query with
    the keys before it, and their weights with the values: of half of the segment, in the mean.
    """
    parameters = list(model.parameters())  # a tied matrix is one
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight
    outside = {id(embedding), *map(id, model.decoder.parameters())}
    layers = [p for p in parameters if id(p) not in outside]
    multiply_adds = model.decoder.weight.numel() + sum(p.numel() for p in layers if p.dim() > 1)
    if model.has_positions:
        attentions = sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
        multiply_adds += attentions * embedding.shape[1] * (bptt + 1)
    in_layers = sum(p.numel() for p in layers)
    return Cost(sum(p.numel() for p in parameters), in_layers, multiply_adds)


def read_contexts(path: Path) -> dict[str, dict[str, float]]:
    """What lm_context.py's table says of each model.

    Returns:
        `effective context`, with ` low` and ` high`; `most`, how many words it was shown, and
        `loss` with these; of a CNN its `receptive field`.
    """
    found: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            model, value = found.setdefault(row["model"], {}), float(row["value"])
            if row["measure"] == "loss":  # the last line has the most words
                model |= {"loss": value, "most": float(row["words"])}
            elif not row["words"]:
                model[row["measure"]] = value
    return found
