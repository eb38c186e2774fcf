"""The curves that a training has written for TensorBoard, read again and drawn into one picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.files import writing

Curve = dict[int, float]  # by epoch


def read_curves(folder: Path) -> dict[str, Curve]:
    """TensorBoard's curves, as it shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def draw_curves(runs: Mapping[str, dict[str, Curve]], metrics: Collection[str], path: Path) -> None:
    """Draw the curves of several runs over each other into a PNG file, a panel for each metric."""
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for number, (name, curves) in enumerate(runs.items()):
            for split, style in (("train", "--"), ("val", "-")):
                points = curves.get(f"{metric}/{split}", {})
                marks = {"c": f"C{number}", "ls": style, "marker": ".", "alpha": 0.8}
                axes.plot([*points], [*points.values()], label=f"{name}, {split}", **marks)
        axes.set(title=metric, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
