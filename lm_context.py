"""How far back do language models look? Compares what lm_main.py has trained.

    python lm_context.py transformer.pt lstm.pt cnn.pt
    python lm_context.py model.pt --data sample --max-context 32 --output-dir context
    accelerate launch --config_file accelerate_configs/cpu4.yaml lm_context.py *.pt

For words of the test text, evenly spaced in it:

- the loss of a word when only the n words before it are visible, n = 1, 2, 4, …: an RNN starts
  from a zero state n words back (Khandelwal et al. 2018). The smallest n whose loss is within 1 %
  of that with all words visible is the effective context;
- the influence of the word k places before: the mean norm of the gradient of a word's
  log-probability with respect to that word's embedding, as a share of all of them.

Prints a table and what it says, and writes context.csv and context.png.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.cli import ArgumentParser, UserError, nonempty, pathname, positive_int
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
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from engine.files import check_outputs, writing
from engine.launch import build_accelerator, describe_run
from word_language_model.checkpoint import load, refuse_other_words, restore_model
from word_language_model.data import corpus_files, load_corpus
from word_language_model.model import LanguageModel

BATCH = 64  # predictions at a time
TOLERANCE = 0.01  # of the loss with all words visible


class Context(NamedTuple):
    """What a model does with the words before a prediction."""

    name: str
    losses: dict[int, float]  # nats a word, by the number of words visible
    # Shares, of the word just before the prediction first. All are 0 where no word has any: an RNN
    # of dead ReLUs.
    influence: list[float]
    receptive_field: int  # 0 where the layers set no limit

    @property
    def full(self) -> float:
        """The loss with all words visible that the model can take."""
        return self.losses[max(self.losses)]

    @property
    def effective(self) -> int:
        """The smallest number of words with nearly the full loss; 0 if no word has influence."""
        enough = (n for n, loss in self.losses.items() if loss <= self.full * (1 + TOLERANCE))
        return next(enough) if any(self.influence) else 0


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    accelerator = build_accelerator()
    accelerator.print(describe_run(accelerator))
    if accelerator.is_main_process:
        outputs = [("--output-dir", args.output_dir / name) for name in (CSV, PICTURE)]
        inputs = [("CHECKPOINT", path) for path in args.checkpoints]
        check_outputs(outputs, inputs=[*inputs, *corpus_files(args.data)])
    with accelerator.local_main_process_first():  # a node's first process downloads
        corpus = load_corpus(args.data)
    places = choose_places(len(corpus.test), args)
    checkpoints = [load(path) for path in args.checkpoints]
    for checkpoint in checkpoints:  # all, before minutes are spent on the first
        refuse_other_words(checkpoint, corpus.vocabulary)
    models = [restore_model(checkpoint)[0] for checkpoint in checkpoints]
    kinds = [checkpoint["model"] for checkpoint in checkpoints]
    contexts = []
    for checkpoint, kind, model in zip(checkpoints, kinds, models, strict=True):
        # A Transformer met no position beyond its --bptt.
        longest = checkpoint.value("bptt", int) if model.has_positions else None
        most = min(args.max_context, longest or args.max_context)
        name = kind if kinds.count(kind) == 1 else f"{kind} {checkpoint.path}"
        context = measure(accelerator, model, name, corpus.test, places, most)
        if not all(map(math.isfinite, [*context.losses.values(), *context.influence])):
            raise checkpoint.error(
                "its weights give no finite loss and gradients: the training diverged"
            )
        contexts.append(context)
    if accelerator.is_main_process:
        report(contexts, len(places), args)


def choose_places(length: int, args: argparse.Namespace) -> torch.Tensor:
    """Positions in a text of `length` words, each with `--max-context` words before it."""
    there = length - args.max_context
    if there < 1:
        raise UserError(
            f"the test text of {args.data} has {length} words, too few to have "
            f"--max-context {args.max_context} before one: use a smaller one"
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
    # In training mode, although nothing is drawn: cuDNN has no gradient of an RNN otherwise.
    model.to(device).train()
    text, places = text.to(device), places.to(device)
    marks = {2**i for i in range(most.bit_length())} | {model.receptive_field, most}
    lengths = sorted(length for length in marks if 0 < length <= most)
    losses = torch.zeros(len(lengths), len(places), device=device)
    norms = torch.zeros(len(places), most, device=device)
    own = range(accelerator.process_index * BATCH, len(places), accelerator.num_processes * BATCH)
    bar = tqdm(
        desc=name,
        total=sum(lengths) * sum(len(places[i : i + BATCH]) for i in own),
        unit=" words",
        unit_scale=True,
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    with bar:
        for row, length in enumerate(lengths):
            for batch in (slice(i, i + BATCH) for i in own):
                is_last = length == most
                with torch.set_grad_enabled(is_last), accelerator.autocast():
                    loss, embedded = predict(model, text, places[batch], length)
                losses[row, batch] = loss.detach()
                if is_last:
                    (gradient,) = torch.autograd.grad(loss.sum(), embedded)
                    found = torch.linalg.vector_norm(gradient.float(), dim=2)  # oldest word first
                    norms[batch, : len(found)] = found.flip(0).t()
                bar.update(length * len(loss))
    # Only one process has a figure for each place, the others zero: the sums are exact.
    means = accelerator.reduce(losses, "sum").cpu().double().mean(1).tolist()
    influence = accelerator.reduce(norms, "sum").cpu().double().mean(0)
    return Context(
        name,
        dict(zip(lengths, means, strict=True)),
        (influence / (influence.sum() or 1)).tolist(),
        model.receptive_field,
    )


def predict(
    model: LanguageModel, text: torch.Tensor, places: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [columns] of the words at `places` after the `length` words before each.

    Returns also the embeddings [t, columns, emsize] of the words that the model has read, the
    oldest first: all of them, or of a CNN those in its receptive field.
    """
    embedded: list[torch.Tensor] = []
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    hook = embedding.register_forward_hook(lambda _module, _inputs, out: embedded.append(out))
    back = torch.arange(length, 0, -1, device=text.device)
    tokens = text[places - back[:, None]]
    features, _ = model.last_features(tokens, model.initial_hidden(len(places)))
    hook.remove()
    logits = model.decoder(features).float()
    loss: torch.Tensor = F.cross_entropy(logits, text[places], reduction="none")
    return loss, embedded[0]


def report(contexts: list[Context], count: int, args: argparse.Namespace) -> None:
    """Print the table, and write it and its picture."""
    lengths = sorted({length for context in contexts for length in context.losses})
    width = max(len(context.name) for context in contexts)
    print(f"Loss of {count} test words by the number of words visible before each:")
    head = "".join(f"{length:>7}" for length in lengths)
    print(f"{'':{width}}{head}   effective context   receptive field")
    for context in contexts:
        found = [context.losses.get(length) for length in lengths]
        row = "".join("       " if loss is None else f"{loss:7.3f}" for loss in found)
        field = str(context.receptive_field or "")
        print(f"{context.name:{width}}{row}{context.effective:20}{field:>18}".rstrip())
    print("", *findings(contexts), sep="\n")
    with writing(args.output_dir / CSV) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "measure", "words", "value"])
        for context in contexts:
            rows: list[tuple[str, int | str, float]] = []
            rows += [("loss", n, loss) for n, loss in context.losses.items()]
            rows += [("influence", k, share) for k, share in enumerate(context.influence, 1)]
            rows.append(("effective context", "", context.effective))
            if context.receptive_field:
                rows.append(("receptive field", "", context.receptive_field))
            table.writerows([context.name, *row] for row in rows)
    with writing(args.output_dir / PICTURE) as temporary:
        draw(contexts).savefig(temporary, format="png", dpi=120)
    print(f"=> {args.output_dir / CSV}, {args.output_dir / PICTURE}")


def findings(contexts: list[Context]) -> Iterator[str]:
    """What the table and the influence say, a sentence each."""
    seeing = [c for c in contexts if any(c.influence)]
    for c in contexts:
        if c not in seeing:
            yield f"The predictions of the {c.name} depend on no word before."
    needs = [
        f"the {c.name} needs the last {c.effective} of {c.receptive_field or max(c.losses)}"
        for c in seeing
    ]
    if needs:
        yield (
            f"To come within {100 * TOLERANCE:g} % of its loss with all words visible, "
            f"{listed(needs)}."
        )
    falls = [f"{c.losses[1] - c.full:.3f} nats for the {c.name}" for c in contexts]
    lowest = min(contexts, key=lambda c: c.full)
    yield (
        f"From one visible word to all of them the loss falls by {listed(falls)}; it ends lowest "
        f"for the {lowest.name}, at {lowest.full:.3f}."
    )
    far = next((c.receptive_field for c in seeing if c.receptive_field), 7)
    shares = [
        f"{100 * sum(c.influence[far:]):.1f} % in the {c.name}"
        + " (its receptive field ends there)" * (c.receptive_field == far)
        for c in seeing
    ]
    if shares:
        yield (
            f"Of all influence on a prediction, words more than {far} places back have "
            f"{listed(shares)}."
        )


def listed(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def draw(contexts: list[Context]) -> Figure:
    """Losses by the words visible, and influence by distance, both with receptive fields."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, influence = figure.subplots(1, 2, sharex=True)
    for number, context in enumerate(contexts):
        colour = f"C{number}"
        loss.plot([*context.losses], [*context.losses.values()], ".-", c=colour, label=context.name)
        for effective in {context.effective} & context.losses.keys():
            loss.plot([effective], [context.losses[effective]], "o", c=colour, ms=10, mfc="none")
        shares = [share or float("nan") for share in context.influence]
        name = context.name if any(context.influence) else f"{context.name}: none"
        influence.plot(range(1, 1 + len(shares)), shares, ".-", c=colour, ms=3, label=name)
        for axes in (loss, influence) if context.receptive_field else ():
            axes.axvline(
                context.receptive_field, c=colour, ls=":", label=f"{context.name}: receptive field"
            )
    loss.set(xlabel="words visible", ylabel="loss of the next word (nats)")
    loss.set_title("Loss by context; ring: effective context", fontsize="medium")
    influence.set(xlabel="words back", ylabel="share of all influence", yscale="log")
    influence.set_ylim(1e-5, 1)
    influence.set_title("Influence by distance", fontsize="medium")
    for axes in (loss, influence):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    run_script(main)
