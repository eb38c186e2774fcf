"""What figures say, in sentences: plain functions, each of a few numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from engine.cli import listed
from engine.curves import Curve
from engine.intervals import wilson
from report.figures import Curves, Gap, last, seeds_gap

RISE = 0.01  # over-fitting: the validation loss ends this share above its least ...
GAP = 0.05  # ... or this share above the training loss
LEVEL = 0.01  # an epoch that lowers the perplexity by a smaller share no longer helps
MATCHED = 0.05  # models whose parameters differ by less count as of one size
COINCIDE = 0.25  # curves coincide within this share of the distance of two seeds


def spread(values: Sequence[float]) -> str:
    """The mean, and the range of several."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def short(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.3g}"


def points(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # never -0.0


def interval(gap: Gap, basis: str) -> str:
    ends = f"{points(gap.low)} to {points(gap.high)}"
    return f"{points(gap.value)} points of Acc@1 (95 % interval {ends}, from the {basis})"


def is_beyond(gap: Gap, control: float | None) -> bool:
    """Whether the interval excludes zero and, with a control, the gap is over twice the control's.

    Twice: two seeds may be near each other by luck.
    """
    return not gap.low <= 0 <= gap.high and (control is None or abs(gap.value) > 2 * control)


def accuracy_gap(title: str, other: str, gap: Gap, basis: str, control: float | None) -> str:
    """How far the Acc@1 of `title` is from that of `other`, and whether that can be chance.

    Args:
        gap: in points.
        basis: what gives its interval, "images" or "seeds".
        control: points between two seeds of `other`; None if not measured.
    """
    said = f"{title}: {interval(gap, basis)} against {other}, "
    if gap.low <= 0 <= gap.high:
        return f"{said}no more than other {basis} can make."
    said += f"more than other {basis} make"
    if basis == "seeds":
        return f"{said}."
    if control is None:
        return f"{said}; what another seed makes was not measured."
    if is_beyond(gap, control):
        return f"{said}, and over twice what another seed makes ({control:.1f})."
    return f"{said}, but another seed makes {control:.1f} points."


def accuracy(
    beyond: Mapping[str, Gap],
    within: Mapping[str, Gap],
    other: str,
    several: bool,
    control: float | None,
) -> str:
    """The conclusion on Acc@1.

    Args:
        beyond, within: gaps of Acc@1 to `other`, of which `is_beyond` is true, and the others.
        several, control: see `accuracy_gap`.
    """
    line = "**Accuracy** " + ("(several seeds): " if several else "(one seed each): ")
    limit = "other seeds make (95 %)"
    if not several:
        limit = "other images make, with seeds not measured"
        if control is not None:
            limit = "other images make, and than twice the gap of one other seed"
    if not beyond:
        largest = max(within, key=lambda title: abs(within[title].value))
        hidden = max(2 * (control or 0), *((g.high - g.low) / 2 for g in within.values()))
        both = "both " if control is not None else ""
        return (
            f"{line}no training is further from {other} {both}than {limit}; the largest gap is "
            f"{points(within[largest].value)} points of Acc@1, of {largest}. Gaps below "
            f"{hidden:.1f} points may not show."
        )
    shown = listed([f"{title} ({points(gap.value)})" for title, gap in beyond.items()])
    rest = listed([f"{title} ({points(gap.value)})" for title, gap in within.items()] or ["none"])
    return (
        f"{line}further from {other} than {limit}, in points of Acc@1: {shown}. The others: {rest}."
    )


def two_seeds(gap: Gap) -> str:
    """The control: points of Acc@1 between two seeds of the same training."""
    return (
        f"The control, the same training with another seed: {interval(gap, 'images')}. One control "
        "is weak evidence: --seeds 1 2 3 repeats every training. Gaps between single trainings are "
        "counted image by image, with answers computed in float32."
    )


def is_near(distance: float, seeds: float) -> bool:
    """Whether curves this far from each other coincide, beside those of two seeds."""
    return distance <= COINCIDE * seeds


def coincidence(one: str, other: str, distances: Sequence[float], seeds: float) -> str:
    """Whether two validation curves are the same.

    It is asked of curves that are near each other, and of four processes and four parts.

    Args:
        distances: between their losses after each epoch.
        seeds: the largest distance between the curves of two seeds.
    """
    most = max(distances)
    said, scale = f"The curves of {one} and {other}", f"; those of two seeds {short(seeds)}."
    if most == 0:
        return f"{said} are the same to the last digit."
    if is_near(most, seeds):
        return f"{said} coincide: their validation losses are at most {most:.2g} apart{scale}"
    return (
        f"{said} are {distances[0]:.2g} apart after the first epoch and {short(most)} at most"
        f"{scale} Both compute the same steps but for rounding, which every step enlarges."
    )


def is_more(share: float, seeds: float, count: int) -> bool:
    """Whether the 95 % interval of a share of `count` images lies above that of two seeds."""
    return wilson(round(share * count), count)[0] > wilson(round(seeds * count), count)[1]


def disagreements(shares: Mapping[str, float], other: str, seeds: float, count: int) -> str:
    """The conclusion on how often trainings disagree with `other`, beside two seeds of it."""
    shown = listed([f"{title} on {100 * share:.1f} %" for title, share in shares.items()])
    more = [title for title, share in shares.items() if is_more(share, seeds, count)]
    return (
        f"**Disagreements** with {other}: {shown} of the images; two seeds of it on "
        f"{100 * seeds:.1f} %. Clearly more than two seeds: {listed(more or ['none'])}."
    )


def fit(curves: Curves) -> tuple[str, str]:
    """How a training's losses end: in a word, and in figures. Empty where there is nothing to say.

    A training over-fits if its validation loss rises while its training loss falls, and begins to
    if its validation loss is left behind by its training loss.
    """
    train, val = curves["Loss/train"], curves["Loss/val"]
    least, begin, end = min(val, key=lambda epoch: val[epoch]), min(val), max(val)
    gap, before = val[end] - train[end], val[begin] - train[begin]
    if not math.isfinite(gap):
        return "divergence", "its losses are not finite"
    if val[end] > (1 + RISE) * val[least] and train[end] < train[least]:
        return "over-fitting", (
            f"after epoch {least} its validation loss rises from {short(val[least])} to "
            f"{short(val[end])} while its training loss falls from {short(train[least])} to "
            f"{short(train[end])}"
        )
    if gap <= GAP * train[end]:
        return "", ""
    ends = f"training loss ends at {short(train[end])} and validation loss at {short(val[end])}"
    if begin == end:
        return "over-fitting not known after one epoch", ends
    if gap <= before:
        return "", f"{ends}. This gap has not grown since the first epoch: no sign of over-fitting"
    return "first signs of over-fitting", (
        f"{ends}. This gap has grown from {short(before)} after the first epoch to {short(gap)}"
    )


def over_fitting(trainings: Mapping[str, Curves]) -> list[str]:
    """A line for each training whose losses show something."""
    verdicts = {name: fit(curves) for name, curves in trainings.items()}
    return [
        f"{name}: **{word}**; {why}." if word else f"{name}: {why}."
        for name, (word, why) in verdicts.items()
        if why
    ] or [
        f"No sign of over-fitting: no validation loss rises by over {100 * RISE:.0f} % from its "
        f"least while the training loss falls, or ends over {100 * GAP:.0f} % above the training "
        "loss."
    ]


def fitting(trainings: Mapping[str, Curves]) -> str:
    """The conclusion on over-fitting."""
    names: dict[str, list[str]] = {}
    for name, curves in trainings.items():
        names.setdefault(fit(curves)[0], []).append(name)
    shown = [f"{word} in {listed(of)}" for word, of in names.items() if word]
    said = "; ".join(shown) or f"no sign of over-fitting in {listed([*trainings])}"
    return f"{said[:1].upper()}{said[1:]}."


def sizes(parameters: Sequence[int]) -> str:
    """Whether models compete at the same size."""
    if len(parameters) == 1:
        return ""
    apart = max(parameters) / min(parameters) - 1
    said = f"The numbers of parameters differ by {100 * apart:.1f} % at most"
    return f"{said}." if apart <= MATCHED else f"{said}: a part of the models' order may be size."


def ranking(perplexities: Mapping[str, Sequence[float]]) -> str:
    """The order of language models by their test perplexities, one of each seed."""
    order = sorted(perplexities, key=lambda name: statistics.fmean(perplexities[name]))
    said = f"Test perplexity: {listed([f'{n} {spread(perplexities[n])}' for n in order])}"
    if len(order) == 1:
        return f"{said}."
    unclear = []
    for better, worse in itertools.pairwise(order):
        gap = seeds_gap(perplexities[better], perplexities[worse])
        if gap is None:
            return f"{said}, of one seed: another may change the order."
        if not gap.high < 0:  # nor where a perplexity is not finite
            unclear.append(f"{better} before {worse}")
    if unclear:
        return f"{said}. Other seeds may change this order: {listed(unclear)} may be chance."
    return f"{said}. Each step of this order is more than other seeds make (95 %)."


def improving(curves: Mapping[str, Curve]) -> str:
    """Whether validation has stopped getting better: perplexities by epoch."""
    still = []
    for name, curve in curves.items():
        before = [value for epoch, value in curve.items() if epoch < max(curve)]
        if not before:
            return "After one epoch it is not known where validation stops getting better."
        if (gain := 1 - last(curve) / min(before)) > LEVEL:
            still.append(f"{name} ({100 * gain:.1f} %)")
    if still:
        return (
            f"The last epoch still lowers the validation perplexity of {listed(still)}: more "
            "epochs may change the order."
        )
    return f"The last epoch lowers no validation perplexity by over {100 * LEVEL:.0f} %."


ALLOWED = {
    "Transformer": "a Transformer has every word of its window one step from the prediction, and "
    "computes from the words themselves how much each counts",
    "LSTM": "an LSTM has no limit, but carries all that it knows in one state, which every later "
    "word changes",
    "CNN": "a CNN has its nearest words a few steps from the prediction, with weights that depend "
    "on the place and not on the word, and sees nothing further back",
}


def allowed(kinds: Sequence[str]) -> str:
    """What the architectures differ in, in a sentence."""
    said = "; ".join(ALLOWED[kind] for kind in kinds)
    return f"{said[:1].upper()}{said[1:]}."


def context(found: Mapping[str, Mapping[str, float]]) -> str:
    """How models differ in what they make of the past, by lm_context.py's figures."""
    used = [
        f"the {name} {of['effective context']:.0f} (95 % interval "
        f"{of['effective context low']:.0f} to {of['effective context high']:.0f})"
        for name, of in found.items()
    ]
    said = (
        "Words needed to come within 1 % of a model's lowest loss (tried: 1, 2, 4, … and the most "
        f"that it was shown): {listed(used)}."
    )
    if len(found) == 1:
        return said
    best = min(found, key=lambda name: found[name]["loss"])
    rivals = [
        f"the {name}"
        for name, of in found.items()
        if name != best and of["loss above best"] <= 2 * of["loss above best error"]
    ]
    said += f" The {best} has the lowest loss ({found[best]['loss']:.2f})"
    if rivals:
        said += f", by no more than chance beside {listed(rivals)}"
    longest = max(found.values(), key=lambda of: of["effective context"])
    low = longest["effective context low"]
    far = [name for name, of in found.items() if of["effective context high"] >= low]
    names = listed([f"the {name}" for name in far])
    if len(far) == len(found):
        return f"{said}; none clearly needs more words than the others."
    if best in far or rivals:
        return f"{said}, and the longest context is that of {names}."
    return (
        f"{said}, although the longest context is that of {names}: a longer context alone does "
        "not give a lower loss."
    )
