"""The curves that a training has written for TensorBoard, read again and drawn into one picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.files import writing

Curve = dict[int, float]  # by epoch


def read_curves(folder: Path) -> dict[str, Curve]:
    """TensorBoard's curves, as it shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def draw_curves(
    trainings: Mapping[str, Sequence[Mapping[str, Curve]]], metrics: Collection[str], path: Path
) -> None:
    """Draw curves over each other into a PNG file, a panel for each metric.

    Of several runs of a training the mean is drawn, and a band from the least to the greatest. A
    value far from the others, as of a first epoch that goes wrong, is written at the panel's edge.
    """
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        draw_panel(axes, trainings, metric)
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def draw_panel(
    axes: Axes, trainings: Mapping[str, Sequence[Mapping[str, Curve]]], metric: str
) -> None:
    """One metric of all trainings; see `draw_curves`."""
    drawn: list[tuple[int, float]] = []
    for number, (name, runs) in enumerate(trainings.items()):
        for split, style in (("train", "--"), ("val", "-")):
            curves = [run.get(f"{metric}/{split}", {}) for run in runs]
            epochs = [epoch for epoch in curves[0] if all(epoch in c for c in curves)]
            values = [[curve[epoch] for curve in curves] for epoch in epochs]
            means = [*map(statistics.fmean, values)]
            shown = [means]
            label = name if split == "val" else None
            axes.plot(epochs, means, style, c=f"C{number}", marker=".", alpha=0.8, label=label)
            if len(runs) > 1 and split == "val":
                band = [*map(min, values)], [*map(max, values)]
                shown += band
                axes.fill_between(epochs, *band, color=f"C{number}", alpha=0.2, lw=0)
            drawn += [point for line in shown for point in zip(epochs, line, strict=True)]
    if limits := usual_limits(value for _, value in drawn):
        axes.set_ylim(*limits)
        first = min(epoch for epoch, _ in drawn)
        beyond = sorted(point for point in drawn if point[1] > limits[1])
        for epoch, value in dict(beyond).items():  # of several the greatest
            side = "left" if epoch == first else "right"  # of the text, which stays inside
            edge = axes.get_xaxis_transform()  # y from 0 to 1, the panel's height
            text = f" {value:.3g} ↑ "
            axes.text(epoch, 0.98, text, transform=edge, ha=side, va="top", size="small")
    dashed = any(run.get(f"{metric}/train") for runs in trainings.values() for run in runs)
    axes.set(title=metric + " (dashed: in training)" * dashed, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.3)


def usual_limits(values: Iterable[float]) -> tuple[float, float] | None:
    """Limits of a panel that a few large values would squeeze; None where none does."""
    finite = sorted(filter(math.isfinite, values))
    if len(finite) < 4:
        return None
    low, _, high = statistics.quantiles(finite, n=4, method="inclusive")
    usual = [value for value in finite if value <= high + 3 * (high - low)]
    if low == high or len(usual) == len(finite):
        return None
    margin = 0.05 * (usual[-1] - usual[0])
    return usual[0] - margin, usual[-1] + margin
