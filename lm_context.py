"""How far back do language models look? Compares what lm_main.py has trained.

    python lm_context.py transformer.pt lstm.pt cnn.pt
    python lm_context.py model.pt --data sample --max-context 32 --output-dir context
    accelerate launch --config_file accelerate_configs/cpu4.yaml lm_context.py *.pt

For words of the test text, evenly spaced in it:

- the loss of a word when only the n words before it are visible, n = 1, 2, 4, … The smallest n
  whose loss is within 1 % of the lowest is the effective context;
- the rise of the loss when of the last 32 words only the last k are in order and those further
  back are shuffled. Where it does not rise, the model makes no use of their order.

Both are experiments of Khandelwal et al., "Sharp nearby, fuzzy far away", 2018. All comparisons are
paired over the same words and have standard errors. Prints tables and what they say, and writes
context.csv and context.png.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import argparse
import csv
from collections.abc import Iterator, Sequence
from itertools import combinations, takewhile
from pathlib import Path
from typing import NamedTuple

from engine.cli import ArgumentParser, UserError, listed, nonempty, pathname, positive_int
from word_language_model.settings import WIKITEXT

CSV, PICTURE = "context.csv", "context.png"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="+", type=pathname, metavar="CHECKPOINT", help="models of lm_main.py")
    add("--data", type=nonempty, metavar="DIR", default=str(WIKITEXT),
        help="folder of the corpus that they were trained on, or `sample`")
    add("--max-context", type=positive_int, default=128, metavar="N",
        help="words that are visible at most")
    add("--words", type=positive_int, default=4000, metavar="N",
        help="words of the test text whose predictions are looked at")
    add("--output-dir", type=pathname, default=Path(), metavar="DIR",
        help=f"for {CSV} and {PICTURE}")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser())


import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from engine.files import check_outputs, writing
from engine.launch import build_accelerator, describe_run
from word_language_model.checkpoint import load, refuse_other_words, restore_model
from word_language_model.data import corpus_files, load_corpus
from word_language_model.model import LanguageModel

BATCH = 64  # predictions at a time
TOLERANCE = 0.01  # of the lowest loss
SHUFFLED = 32  # words at most among which some are shuffled
# The losses of neighbouring words depend on each other, so the text is cut into stretches. Their
# means are nearly independent, and standard errors and resamples are taken of them.
STRETCHES, RESAMPLES = 100, 1000


class Estimate(NamedTuple):
    """A mean over words and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"

    @property
    def real(self) -> bool:
        """Whether it differs from zero by more than chance."""
        return abs(self.value) > 2 * self.error


def stretch_means(losses: torch.Tensor) -> torch.Tensor:
    """Means [..., stretches] of neighbours in losses [..., words]."""
    parts = losses.tensor_split(min(STRETCHES, losses.shape[-1]), dim=-1)
    return torch.stack([part.mean(-1) for part in parts], dim=-1)


def estimate(losses: torch.Tensor) -> Estimate:
    """The mean of losses [words], or of their differences, which are then paired."""
    means = stretch_means(losses)
    return Estimate(losses.mean().item(), (means.std() / len(means) ** 0.5).item())


class Context(NamedTuple):
    """What a model does with the words before a prediction. Losses are in nats, [words] each."""

    name: str
    visible: dict[int, torch.Tensor]  # by the number of words visible
    shuffled: dict[int, torch.Tensor]  # by the number of words in order, of the last `window`
    window: int
    receptive_field: int  # 0 where the layers set no limit

    @property
    def most(self) -> int:
        """The largest number of words visible."""
        return max(self.visible)

    @property
    def lowest(self) -> int:
        """The number of words visible with the lowest loss."""
        return min(self.visible, key=lambda n: self.visible[n].mean().item())

    def above_lowest(self, n: int) -> Estimate:
        return estimate(self.visible[n] - self.visible[self.lowest])

    def disorder(self, k: int) -> Estimate:
        """The rise of the loss when only the last `k` words are in order."""
        return estimate(self.shuffled[k] - self.visible[self.window])

    @property
    def effective(self) -> tuple[int, int, int]:
        """The smallest number of words with nearly the lowest loss, and its 95 % interval.

        The interval is that of a bootstrap over stretches of the text (Efron 1979).
        """
        means = stretch_means(torch.stack([*self.visible.values()]))
        count = means.shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
        words = torch.stack([losses.mean() for losses in self.visible.values()])
        found = torch.cat([words[:, None], means[:, drawn].mean(2)], dim=1)
        enough = found <= found.amin(0) * (1 + TOLERANCE)
        first, *others = torch.tensor([*self.visible])[enough.int().argmax(0)].tolist()
        others.sort()
        return first, others[RESAMPLES // 40], others[-1 - RESAMPLES // 40]


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    accelerator = build_accelerator()
    accelerator.print(describe_run(accelerator))
    if accelerator.is_main_process:
        outputs = [("--output-dir", args.output_dir / name) for name in (CSV, PICTURE)]
        inputs = [("CHECKPOINT", path) for path in args.checkpoints]
        check_outputs(outputs, inputs=[*inputs, *corpus_files(args.data)])
    checkpoints = [load(path) for path in args.checkpoints]
    with accelerator.local_main_process_first():  # a node's first process downloads
        corpus = load_corpus(args.data)
    places = choose_places(len(corpus.test), args)
    for checkpoint in checkpoints:  # all, before minutes are spent on the first
        refuse_other_words(checkpoint, corpus.vocabulary)
    models = [restore_model(checkpoint)[0] for checkpoint in checkpoints]
    kinds = [checkpoint["model"] for checkpoint in checkpoints]
    contexts = []
    for checkpoint, kind, model in zip(checkpoints, kinds, models, strict=True):
        # A Transformer met no position beyond its --bptt, a CNN sees nothing before its field.
        limit = checkpoint.value("bptt", int) if model.has_positions else model.receptive_field
        most = min(args.max_context, limit or args.max_context)
        name = kind if kinds.count(kind) == 1 else f"{kind} {checkpoint.path}"
        context = measure(accelerator, model, name, corpus.test, places, most)
        losses = [*context.visible.values(), *context.shuffled.values()]
        if not torch.stack(losses).isfinite().all():
            raise checkpoint.error("its weights give no finite loss: the training diverged")
        contexts.append(context)
    if accelerator.is_main_process:
        report(contexts, len(places), args)


def choose_places(length: int, args: argparse.Namespace) -> torch.Tensor:
    """Positions in a text of `length` words, each with `--max-context` words before it."""
    if args.words < 2:
        raise UserError("--words 1: a standard error takes at least 2")
    there = length - args.max_context
    if there < 2:
        raise UserError(
            f"the test text of {args.data} has {length} words, too few to have "
            f"--max-context {args.max_context} before two: use a smaller one"
        )
    count = min(args.words, there)
    places: torch.Tensor = args.max_context + torch.arange(count) * there // count
    return places


def measure(
    accelerator: Accelerator,
    model: LanguageModel,
    name: str,
    text: torch.Tensor,
    places: torch.Tensor,
    most: int,
) -> Context:
    """What `model`, called `name`, does with up to `most` words before each of the `places`.

    A batch goes whole to one process or another, so the figures do not depend on their number.

    Args:
        model: without dropout.
        text: [length].
        places: [count] positions in `text` of the words to predict.
    """
    device = accelerator.device
    model.to(device).eval()
    text, places = text.to(device), places.to(device)
    lengths = sorted({2**i for i in range(most.bit_length())} | {most})
    window = max(n for n in lengths if n <= SHUFFLED)
    near = [n for n in lengths if n < window - 1]  # leave at least two words to shuffle
    passes = [(n, n) for n in lengths] + [(window, k) for k in near]
    # The same order for every model of the same window.
    keys = torch.rand(window, len(places), generator=torch.Generator().manual_seed(0)).to(device)
    losses = torch.zeros(len(passes), len(places), device=device)
    own = range(accelerator.process_index * BATCH, len(places), accelerator.num_processes * BATCH)
    bar = tqdm(
        desc=name,
        total=sum(n for n, _ in passes) * sum(len(places[i : i + BATCH]) for i in own),
        unit=" words",
        unit_scale=True,
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    with bar:
        for row, (length, ordered) in enumerate(passes):
            for batch in (slice(i, i + BATCH) for i in own):
                shuffle = keys[: length - ordered, batch].argsort(0)
                with torch.inference_mode(), accelerator.autocast():
                    losses[row, batch] = loss = predict(model, text, places[batch], length, shuffle)
                bar.update(length * len(loss))
    # Only one process has a figure for each place, the others zero: the sums are exact.
    found = accelerator.reduce(losses, "sum").cpu().double()
    return Context(
        name,
        dict(zip(lengths, found, strict=False)),
        dict(zip(near, found[len(lengths) :], strict=True)),
        window,
        model.receptive_field,
    )


def predict(
    model: LanguageModel,
    text: torch.Tensor,
    places: torch.Tensor,
    length: int,
    shuffle: torch.Tensor,
) -> torch.Tensor:
    """Loss [columns] of the words at `places` after the `length` words before each.

    Args:
        shuffle: [t, columns] permutations of the first t of these words; t = 0 leaves all in order.
    """
    rows = torch.arange(length, device=text.device)[:, None].expand(length, len(places))
    rows = torch.cat([shuffle, rows[len(shuffle) :]])
    tokens = text[places - length + rows]
    features, _ = model.last_features(tokens, model.initial_hidden(len(places)))
    logits = model.decoder(features).float()
    return F.cross_entropy(logits, text[places], reduction="none")


def report(contexts: list[Context], count: int, args: argparse.Namespace) -> None:
    """Print the tables, and write them and their picture."""
    print(f"Loss of {count} test words by the number of words visible before each:")
    rows = []
    for c in contexts:
        effective, low, high = c.effective
        ends = [f"{effective} ({low} to {high})", str(c.receptive_field or "")]
        rows.append((c.name, {n: f"{loss.mean():.3f}" for n, loss in c.visible.items()}, ends))
        errors = {n: f"{c.above_lowest(n).error:.3f}" for n in c.visible}
        rows.append(("  ± to the lowest", errors, []))
    print_table(rows, ["effective context", "receptive field"])
    rows = []
    for c in contexts:
        if rises := {k: c.disorder(k) for k in c.shuffled}:
            name = f"{c.name} (of the last {c.window})"
            rows.append((name, {k: f"{rise.value:+.3f}" for k, rise in rises.items()}, []))
            errors = {k: f"{rise.error:.3f}" for k, rise in rises.items()}
            rows.append(("  ± standard error", errors, []))
    if rows:
        print("Its rise by the words in order, those further back shuffled:")
        print_table(rows, [])
    print("", *findings(contexts), sep="\n")
    with writing(args.output_dir / CSV) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "measure", "words", "value", "standard_error"])
        least = min((c.visible[c.most] for c in contexts), key=torch.mean)
        for c in contexts:
            measures = {
                "loss": {n: estimate(losses) for n, losses in c.visible.items()},
                "loss above lowest": {n: c.above_lowest(n) for n in c.visible},
                "rise when shuffled": {k: c.disorder(k) for k in c.shuffled},
            }
            for measure, found in measures.items():
                table.writerows([c.name, measure, n, *figures] for n, figures in found.items())
            behind = estimate(c.visible[c.most] - least)  # with all words visible
            table.writerow([c.name, "loss above best", "", *behind])
            for end, n in zip(("", " low", " high"), c.effective, strict=True):
                table.writerow([c.name, f"effective context{end}", "", n, ""])
            if c.receptive_field:
                table.writerow([c.name, "receptive field", "", c.receptive_field, ""])
    with writing(args.output_dir / PICTURE) as temporary:
        draw(contexts).savefig(temporary, format="png", dpi=120)
    print(f"=> {args.output_dir / CSV}, {args.output_dir / PICTURE}")


def print_table(rows: list[tuple[str, dict[int, str], list[str]]], more: list[str]) -> None:
    """Print rows of a name, figures by the number of words, and values of the `more` columns."""
    columns = sorted({n for _, figures, _ in rows for n in figures})
    width = max(len(name) for name, _, _ in rows)
    heads = {n: str(n) for n in columns}
    for name, figures, ends in [("", heads, more), *rows]:
        cells = "".join(f"{figures.get(n, ''):>8}" for n in columns)
        print(f"{name:{width}}{cells}{''.join(f'{end:>20}' for end in ends)}".rstrip())


def findings(contexts: list[Context]) -> Iterator[str]:
    """What the tables say, a sentence each. What chance explains is called so."""
    needs = []
    for c in contexts:
        words, low, high = c.effective
        interval = f"95 % interval {low} to {high}"
        field = ", its receptive field" if c.most == c.receptive_field else ""
        needs.append(f"the {c.name} needs the last {words} of {c.most}{field} ({interval})")
    yield (
        f"To come within {100 * TOLERANCE:g} % of its lowest loss, {listed(needs)}. Tried were 1, "
        "2, 4, … and the most words that each was shown."
    )
    falls = []
    for c in contexts:
        fall = c.above_lowest(1)
        how = f"by {fall} nats" if fall.real else f"by no more than chance ({fall})"
        falls.append(f"{how} for the {c.name} (to {c.lowest})")
    yield f"From one visible word to the best number of them, the loss falls {listed(falls)}."
    for c in contexts:
        if (harm := c.above_lowest(c.most)).real:
            yield (
                f"With all {c.most} words visible, the loss of the {c.name} is {harm} nats above "
                f"its lowest, which it has with {c.lowest}."
            )
    orders = []
    for c in contexts:
        rises = [(k, c.disorder(k)) for k in c.shuffled]
        # From the nearest words outwards until a test fails: with five tests each by itself, one
        # in nine models that use no order would seem to.
        found = [*takewhile(lambda pair: pair[1].real and pair[1].value > 0, rises)]
        if found:
            k, rise = found[-1]
            orders.append(f"beyond the last {k} for the {c.name} ({rise} nats)")
        elif rises:
            orders.append(f"nowhere beyond the last word for the {c.name}")
    if orders:
        yield (
            f"The order of words counts {listed(orders)}: so far back, shuffling raises the loss "
            "by more than chance."
        )
    for a, b in combinations(sorted(contexts, key=lambda c: c.visible[c.most].mean().item()), 2):
        less = estimate(b.visible[b.most] - a.visible[a.most])
        yield (
            f"With all words visible, the loss of the {a.name} is {less} nats below that of the "
            f"{b.name}{'' if less.real else ', no more than chance'}."
        )
    yield (
        "Where words are missing, an RNN starts from a zero state, as in training only the text's "
        "first segment does, so it may seem to need more words than it does; a Transformer and a "
        "CNN read the visible words as a segment's first, as in training."
    )


def draw(contexts: list[Context]) -> Figure:
    """Losses by the words visible, and their rises by the words in order."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, c in enumerate(contexts):
        colour = f"C{number}"
        losses = {n: c.visible[n].mean().item() for n in c.visible}
        errors = [c.above_lowest(n).error for n in c.visible]
        band(left, losses, errors, colour, c.name)
        effective = c.effective[0]
        left.plot([effective], [losses[effective]], "o", c=colour, ms=10, mfc="none")
        if c.receptive_field:
            label = f"{c.name}: receptive field"
            left.axvline(c.receptive_field, c=colour, ls=":", label=label)
        if c.shuffled:
            rises = {k: c.disorder(k) for k in c.shuffled}
            values = {k: rise.value for k, rise in rises.items()}
            errors = [rise.error for rise in rises.values()]
            band(right, values, errors, colour, f"{c.name}, of the last {c.window}")
    left.set(xlabel="words visible", ylabel="loss of the next word (nats)")
    left.set_title(
        "Loss by words visible; ring: effective context\n"
        "band: 2 standard errors of the distance from the lowest",
        fontsize="medium",
    )
    right.axhline(0, c="black", lw=0.8)
    right.set(xlabel="last words in order", ylabel="rise of the loss (nats)")
    right.set_title(
        "Rise when the words further back are shuffled\nband: 2 standard errors", fontsize="medium"
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # not where there are too few words to shuffle
            axes.legend(fontsize="small")
    return figure


def band(
    axes: Axes, values: dict[int, float], errors: list[float], colour: str, label: str
) -> None:
    """A curve between two standard errors below and above it."""
    pairs = [*zip(values.values(), errors, strict=True)]
    low, high = [v - 2 * e for v, e in pairs], [v + 2 * e for v, e in pairs]
    axes.fill_between([*values], low, high, color=colour, alpha=0.2, lw=0)
    axes.plot([*values], [*values.values()], ".-", c=colour, label=label)


if __name__ == "__main__":
    run_script(main)
