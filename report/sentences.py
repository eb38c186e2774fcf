"""What figures say, in sentences: plain functions, each of a few numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from engine.curves import Curve
from engine.intervals import wilson
from report.figures import Curves, last

RISE = 0.01  # of its least, by which a validation loss rises before that is called over-fitting
GAP = 0.05  # of the training loss, by which the validation loss lies above it, likewise
LEVEL = 0.01  # of the perplexity: an epoch that gains less no longer gets better
MATCHED = 0.05  # models whose parameters differ by less are of the same size
COINCIDE = 0.25  # of the distance of two seeds: curves that are nearer coincide
# Student's t by degrees of freedom: 95 % lie within.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 12: 2.179}


def listed(parts: Sequence[str]) -> str:
    *most, end = parts
    return f"{', '.join(most)} and {end}" if most else end


def spread(values: Sequence[float], decimals: int) -> str:
    """The mean, and the range of several."""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{decimals}f} to {max(values):.{decimals}f})"


def short(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.3g}"


def points(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # never -0.0


def seeds_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the difference of two means, by Student's t; None for one seed each."""
    free = len(ours) + len(theirs) - 2
    if not free:
        return None
    groups = [[value - statistics.fmean(group) for value in group] for group in (ours, theirs)]
    variance = sum(value**2 for group in groups for value in group) / free
    error = math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    half = error * STUDENT[max(n for n in STUDENT if n <= free)]
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    return difference - half, difference + half


def exceeds(gap: float, interval: tuple[float, float], chance: float | None) -> bool:
    """Whether a gap is outside of its interval, and over twice what one other seed makes, if known.

    Twice: what a single control shows may be small by luck.
    """
    low, high = interval
    return not low <= 0 <= high and (chance is None or abs(gap) > 2 * chance)


def image_gap(
    title: str, other: str, gap: float, interval: tuple[float, float], chance: float | None
) -> str:
    """Of trainings of one seed.

    Args:
        gap: points of Acc@1, of `title` less `other`.
        interval: of the gap, from the images.
        chance: points between two seeds of `other`; None if there is one.
    """
    low, high = interval
    said = (
        f"{title}: {points(gap)} points of Acc@1 against {other} (95 % interval {points(low)} to "
        f"{points(high)}), "
    )
    if low <= 0 <= high:
        return said + "which these images cannot tell from none."
    said += "more than the images explain"
    if chance is None:
        return f"{said}; what another seed makes was not measured."
    if exceeds(gap, interval, chance):
        return f"{said}, and over twice what another seed makes ({chance:.1f})."
    return f"{said}, but another seed makes {chance:.1f} points as well."


def seeds_gap(title: str, other: str, gap: float, interval: tuple[float, float], count: int) -> str:
    """Of trainings of `count` seeds each, whose spread gives the interval."""
    low, high = interval
    verdict = "no more than other seeds make" if low <= 0 <= high else "more than other seeds make"
    return (
        f"{title}: {points(gap)} points of Acc@1 against {other} in the mean of {count} seeds "
        f"(95 % interval {points(low)} to {points(high)} by their spread), {verdict}."
    )


def accuracy(
    beyond: Mapping[str, float], within: Mapping[str, float], other: str, seeds: int
) -> str:
    """The conclusion on Acc@1.

    Args:
        beyond, within: points of Acc@1 to `other` that are more than chance, and the others.
        seeds: with which each was trained.
    """
    gaps = {**beyond, **within}
    basis = "one seed each" if seeds == 1 else f"{seeds} seeds each"
    if not gaps:
        return f"**Accuracy:** nothing could be compared with {other}."
    if not any(gaps.values()):
        return f"**Accuracy** ({basis}): {listed([*gaps])} end with the Acc@1 of {other}."
    if not beyond:
        largest = max(within, key=lambda title: abs(within[title]))
        return (
            f"**Accuracy** ({basis}): none differs from {other} by more than chance; the largest "
            f"gap is {points(within[largest])} points of Acc@1, of {largest}."
        )
    shown = listed([f"{title} ({points(gap)})" for title, gap in beyond.items()])
    rest = listed([f"{title} ({points(gap)})" for title, gap in within.items()] or ["none"])
    return (
        f"**Accuracy** ({basis}): further from {other} than by chance, in points of Acc@1: "
        f"{shown}. Not further: {rest}."
    )


def two_seeds(gap: float, interval: tuple[float, float]) -> str:
    """The control: points of Acc@1 between two seeds of the same training."""
    low, high = interval
    return (
        f"The control, the same training of another seed: {points(gap)} points (95 % interval "
        f"{points(low)} to {points(high)} from the images). One control is little: --seeds 1 2 3 "
        "repeats every training."
    )


def cause(processes: float, parts: float) -> str:
    """Why four processes differ in Acc@1, if they do: both gaps are against one process."""
    gaps = f"({points(parts)} points for {points(processes)})"
    if abs(processes - parts) <= abs(processes) / 2:
        return (
            f"One process that computes each batch in four parts differs alike {gaps}. So the "
            "number of processes is not the cause, but what both do: they cut a batch into "
            "quarters, which batch normalisation sees one by one."
        )
    return (
        f"One process that computes each batch in four parts differs otherwise {gaps}, although "
        "both compute the same to rounding: trust neither gap before more seeds say the same."
    )


def is_near(distance: float, seeds: float | None, level: float) -> bool:
    """Whether curves this far from each other coincide: see `coincidence`."""
    return distance <= (COINCIDE * seeds if seeds is not None else 0.01 * level)


def coincidence(
    one: str, other: str, distances: Sequence[float], seeds: float | None, level: float
) -> str:
    """Whether two validation curves are the same.

    Args:
        distances: between their losses after each epoch.
        seeds: the largest distance between two seeds; None if there is one.
        level: the last loss; where no seeds are known, 1 % of it counts as near.
    """
    first, most = distances[0], max(distances)
    scale = f" (two seeds: {short(seeds)})" if seeds is not None else ""
    if most == 0:
        return f"The curves of {one} and {other} are the same to the last digit."
    if is_near(most, seeds, level):
        return (
            f"The curves of {one} and {other} coincide: their validation losses are never more "
            f"than {most:.2g} apart{scale}."
        )
    if is_near(first, seeds, level):
        return (
            f"The curves of {one} and {other} begin together ({first:.2g} apart after the first "
            f"epoch) and are up to {short(most)} apart later{scale}: each step makes a "
            "difference in rounding larger."
        )
    return f"The curves of {one} and {other} are up to {short(most)} apart{scale}."


def disagreement(title: str, other: str, share: float, seeds: float | None, count: int) -> str:
    """Whether two kinds of training disagree more than two seeds of one: shares of `count`."""
    said = f"{title} and {other} disagree on {100 * share:.1f} % of the images"
    if seeds is None:
        return f"{said}; how often two seeds do was not measured."
    said += f", two seeds on {100 * seeds:.1f} %: "
    if is_more(share, seeds, count):
        return said + "more than two seeds do."
    if is_more(seeds, share, count):
        return said + "fewer than two seeds do."
    if share <= seeds:
        return said + "no more than two seeds do."
    return said + f"more by less than {count} images can tell."


def disagreements(shares: Mapping[str, float], other: str, seeds: float | None, count: int) -> str:
    """The conclusion on how often trainings disagree with `other`, beside two seeds of it."""
    shown = listed([f"{title} on {100 * share:.1f} %" for title, share in shares.items()])
    said = f"**Disagreements** with {other}: {shown} of the images"
    if seeds is None:
        return f"{said}. How often two seeds disagree was not measured."
    more = [title for title, share in shares.items() if is_more(share, seeds, count)]
    end = f"{listed(more)} by more than chance" if more else "none by more than chance"
    return f"{said}; two seeds of it: {100 * seeds:.1f} %. Above two seeds: {end}."


def is_more(share: float, seeds: float, count: int) -> bool:
    """Whether the 95 % interval of a share of `count` images lies above that of two seeds."""
    return wilson(round(share * count), count)[0] > wilson(round(seeds * count), count)[1]


def fit(curves: Curves) -> str:
    """How a training's losses end, as a word: see `over_fitting`."""
    train, val = curves["Loss/train"], curves["Loss/val"]
    least, begin, end = min(val, key=lambda epoch: val[epoch]), min(val), max(val)
    gap = val[end] - train[end]
    if not math.isfinite(gap):
        return "diverged"
    if val[end] > (1 + RISE) * val[least] and train[end] < train[least]:
        return "over-fits"
    if gap > GAP * train[end]:
        return "begins to over-fit" if gap > val[begin] - train[begin] else "unclear"
    return "fits"


def over_fitting(trainings: Mapping[str, Curves]) -> list[str]:
    """Whose validation loss rises while the training loss falls, or is left behind by it."""
    found = []
    for name, curves in trainings.items():
        train, val = curves["Loss/train"], curves["Loss/val"]
        least, begin, end = min(val, key=lambda epoch: val[epoch]), min(val), max(val)
        gap, gap_before = val[end] - train[end], val[begin] - train[begin]
        ends = f"training loss ends at {short(train[end])} and its validation loss at "
        ends += f"{short(val[end])}, a gap of {short(gap)}"
        said = {
            "diverged": f"{name} has **diverged**: its losses are not finite.",
            "over-fits": f"{name} **over-fits** after epoch {least}: its validation loss rises "
            f"from {short(val[least])} to {short(val[end])} while its training loss falls from "
            f"{short(train[least])} to {short(train[end])}.",
            "begins to over-fit": f"{name} **begins to over-fit**: its {ends} that was "
            f"{short(gap_before)} after the first epoch."
            + " Its validation loss is still at its least."
            * (least == end),
            "unclear": f"{name}: its {ends} that has not grown since the first epoch, which is no "
            "sign of over-fitting.",
        }
        if begin == end:
            said["unclear"] = f"{name}: its {ends} after one epoch. Whether it grows is not known."
        found.append(said.get(fit(curves), ""))
    return [*filter(None, found)] or [
        f"No sign of over-fitting: no validation loss rises by over {100 * RISE:.0f} % from its "
        f"least while the training loss falls, and none ends over {100 * GAP:.0f} % above it."
    ]


def fitting(trainings: Mapping[str, Curves]) -> str:
    """The conclusion on over-fitting."""
    verdicts = {name: fit(curves) for name, curves in trainings.items()}
    shown = [f"{name} {said}" for name, said in verdicts.items() if "over" in said or "div" in said]
    return f"{listed(shown)}." if shown else f"No sign of over-fitting in {listed([*trainings])}."


def sizes(parameters: Sequence[int]) -> str:
    """Whether models compete at the same size."""
    apart = max(parameters) / min(parameters) - 1
    if apart <= MATCHED:
        return f"Their parameters are matched: they differ by {100 * apart:.1f} % at most."
    return (
        f"Their parameters differ by up to {100 * apart:.0f} %, so a part of their order may be "
        "their size."
    )


def ranking(perplexities: Mapping[str, Sequence[float]]) -> str:
    """The order of language models by their test perplexities, one of each seed."""
    order = sorted(perplexities, key=lambda name: statistics.fmean(perplexities[name]))
    said = f"Test perplexity: {listed([f'{n} {spread(perplexities[n], 1)}' for n in order])}"
    if len(order) == 1:
        return f"{said}."
    unclear = []
    for better, worse in itertools.pairwise(order):
        interval = seeds_interval(perplexities[better], perplexities[worse])
        if interval is None:
            return f"{said}, of one seed: what another seed would change is not known."
        if interval[1] >= 0:
            unclear.append(f"{better} and {worse}")
    if unclear:
        return f"{said}. The order of {listed(unclear)} may be chance, by the spread of the seeds."
    return f"{said}. Each is further from the next than seeds make (95 %, by their spread)."


def improving(curves: Mapping[str, Curve]) -> str:
    """Whether validation has stopped getting better: perplexities by epoch."""
    gains = {}
    for name, curve in curves.items():
        before = [value for epoch, value in curve.items() if epoch < max(curve)]
        if not before:
            return "After one epoch it is not known where validation stops getting better."
        gains[name] = 1 - last(curve) / min(before)
    still = [f"{name} ({100 * g:.1f} %)" for name, g in gains.items() if g > LEVEL]
    if still:
        return (
            f"The last epoch still lowers the validation perplexity of {listed(still)}: with more "
            "epochs the order may change."
        )
    return (
        f"Validation has stopped getting better: the last epoch lowers no perplexity by over "
        f"{100 * LEVEL:.0f} %."
    )


def reach(kind: str, layers: int, window: int, kernel: int) -> list[str]:
    """What a kind of model can do with the past: how far, in how many steps, by what weights.

    Args:
        window: words of a segment.
        kernel: words that a layer of a CNN sees.
    """
    if kind == "Transformer":
        return [f"the {window} words of its window", "one", "from the words themselves"]
    if kind == "CNN":
        return [f"{1 + layers * (kernel - 1)} words", f"at most {layers}", "fixed, with a gate"]
    return ["no limit", "one for each word between", "fixed, with gates"]


ALLOWED = {
    "Transformer": "a Transformer has every word of its window one step from the prediction, and "
    "computes from the words themselves how much each counts",
    "LSTM": "an LSTM has no limit, but carries all that it knows through one state, which every "
    "later word may overwrite",
    "CNN": "a CNN has its nearest words a few steps away, by weights that belong to places and not "
    "to words, and nothing of what lies before them",
}


def context(found: Mapping[str, Mapping[str, float]]) -> str:
    """How models differ in what they make of the past, by lm_context.py's figures."""

    def used(name: str) -> str:
        words, low, high = (
            int(found[name][f"effective context{end}"]) for end in ("", " low", " high")
        )
        return f"the {name} {words} (95 % interval {low} to {high})"

    longest = max(found.values(), key=lambda of: of["effective context"])
    low = longest["effective context low"]
    far = [name for name, of in found.items() if of["effective context high"] >= low]
    best = min(found, key=lambda name: found[name]["loss"])
    said = f"Words that they make use of: {listed([used(name) for name in found])}. "
    lowest = f"The {best} has the lowest loss ({found[best]['loss']:.2f})"
    names = listed([f"the {name}" for name in far])
    if len(found) == 1:
        return said + f"Its loss is {found[best]['loss']:.2f}."
    if len(far) == len(found):
        return said + f"None uses more by more than chance. {lowest}."
    if best in far:
        return said + f"{lowest}, and the longest context is that of {names}."
    return said + (
        f"{lowest}, although the longest context is that of {names}: what a model makes of the "
        "nearest words counts for more than how far it sees."
    )


def allowed(kinds: Sequence[str]) -> str:
    """What the architectures differ in, in a sentence."""
    said = "; ".join(ALLOWED[kind] for kind in kinds if kind in ALLOWED)
    return f"{said[:1].upper()}{said[1:]}."
