"""Write text with a language model that lm_main.py has trained.

    python lm_generate.py --checkpoint model.pt --words 200 --outf -
    python lm_generate.py --prompt "The history of the" --temperature 0.8 --top-k 50

pytorch/examples' word_language_model/generate.py with a cost a word that does not grow: an RNN
carries its hidden state, and the Transformer and the CNN read the last words that fit into the
window that they were trained on (--bptt). The Transformer never met a position beyond that one, so
a longer context would be of no use to it. The checkpoint has the
vocabulary; no corpus is needed.

At the default sizes two CPU cores write a word in 1.4 ms, the thousandth as fast as the first.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from engine.cli import (
    ArgumentParser,
    UserError,
    non_negative_int,
    nonempty,
    number,
    pathname,
    positive_int,
    product,
)
from word_language_model.settings import MODELS


def temperature(text: str) -> float:
    value = number(float, text)
    if not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 1e-3, not {text}")
    return value


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", metavar="DIR",
        help="accepted and not needed: the vocabulary is in the checkpoint")
    add("--model", choices=MODELS, help="what the checkpoint should hold")
    add("--checkpoint", type=pathname, default=Path("model.pt"), metavar="PATH",
        help="model of lm_main.py")
    add("--outf", type=nonempty, default="generated.txt", metavar="PATH",
        help="for the text, - for standard output")
    add("--words", type=positive_int, default=1000, metavar="N", help="words to generate")
    add("--seed", type=non_negative_int, default=1111, metavar="N", help="random seed")
    add("--temperature", type=temperature, default=1.0, metavar="T",
        help="likelihoods are taken to the power of 1/T: below 1 safer, above more diverse")
    add("--log-interval", type=positive_int, default=100, metavar="N",
        help="words between two reports")
    # The original's end here; these are new.
    add("--prompt", default="", metavar="TEXT",
        help="words that the text begins with, with spaces around punctuation; else it follows one "
        "that is drawn at random")
    add("--top-k", type=positive_int, metavar="K", help="draw from the K likeliest words only")
    for flag in ("--cuda", "--accel"):
        add(flag, action="store_true", help=argparse.SUPPRESS)
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser(), alone=True)


import torch

from engine.files import check_outputs, writing
from word_language_model.checkpoint import load, restore_model
from word_language_model.model import LanguageModel
from word_language_model.settings import MAX_POSITIONS

WORDS_A_LINE = 20
UNKNOWN = "<unk>"  # WikiText's own word for rare words
DEFAULT_BPTT = 35


class Reader:
    """A model that has read some words, and reads on.

    Args:
        model: ready to evaluate.
        window: how many of the last words are read anew for each; an RNN has its hidden state.
    """

    def __init__(self, model: LanguageModel, window: int) -> None:
        self.model, self.window = model, window
        torch.backends.mkldnn.set_flags(False)  # oneDNN's LSTM takes one word four times as long
        # One word's product with the decoder's rows takes a CPU four times as long.
        self.columns = model.decoder.weight.detach().t().contiguous()
        self.hidden = model.initial_hidden(1)
        self.context: list[int] = []

    @torch.inference_mode()
    def read(self, words: list[int]) -> torch.Tensor:
        """Read at least one word; returns the logits [words] of the next."""
        if not self.hidden:
            words = self.context = [*self.context, *words][-self.window :]
        tokens = torch.tensor(words, device=self.model.decoder.weight.device)[:, None]
        features, self.hidden = self.model.last_features(tokens, self.hidden)
        return torch.addmm(self.model.decoder.bias, features, self.columns)[0]


def generate(
    reader: Reader, start: list[int], generator: torch.Generator, args: argparse.Namespace
) -> Iterator[int]:
    """Yield `args.words` words that follow `start`.

    Raises:
        UserError: when the model's logits are not finite.
    """
    words = start
    for _ in range(args.words):
        logits = reader.read(words).cpu() / args.temperature
        if args.top_k is not None and args.top_k < len(logits):
            logits[logits < logits.topk(args.top_k).values[-1]] = -torch.inf
        # Not torch.multinomial, which draws a number for every word of the vocabulary.
        # `cumsum(dtype=...)` takes twice as long as these two.
        likelihood = logits.softmax(0).double().cumsum(0)
        if likelihood[-1].isnan():
            raise UserError(
                f"checkpoint {args.checkpoint}: its weights give no finite likelihoods: the "
                "training diverged; use an earlier checkpoint, or train with a lower --lr"
            )
        drawn = torch.rand(1, dtype=torch.float64, generator=generator) * likelihood[-1]
        words = [int(torch.searchsorted(likelihood, drawn, right=True))]
        yield words[0]


def encode(prompt: str, vocabulary: list[str]) -> list[int]:
    """Numbers of the prompt's words; one that the model does not know is named, and replaced by
    <unk> where it knows that, else left out."""
    numbers = {word: number for number, word in enumerate(vocabulary)}
    words = prompt.split()
    if unknown := [word for word in words if word not in numbers]:
        instead = f"read as {UNKNOWN}" if UNKNOWN in numbers else "left out"
        print(f"=> not in the vocabulary, {instead}: {' '.join(unknown)}", file=sys.stderr)
    found = (numbers.get(word, numbers.get(UNKNOWN)) for word in words)
    return [number for number in found if number is not None]


@contextlib.contextmanager
def output(name: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is whole."""
    if name == "-":
        with product():
            yield sys.stdout
        return
    with writing(Path(name)) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    if args.outf in ("/dev/stdout", "/dev/fd/1"):  # maybe a file to which a shell appends
        args.outf = "-"
    report = sys.stderr if args.outf == "-" else sys.stdout
    for flag in ("cuda", "accel"):
        if getattr(args, flag):
            print(f"=> --{flag} changes nothing: a GPU is used where there is one", file=report)
    if not args.checkpoint.exists():
        raise UserError(
            f"no checkpoint {args.checkpoint}: train one with lm_main.py, or name it: --checkpoint"
        )
    if args.outf != "-":
        check_outputs([("--outf", Path(args.outf))], inputs=[("--checkpoint", args.checkpoint)])

    checkpoint = load(args.checkpoint)
    if args.model is not None and args.model != checkpoint["model"]:
        raise checkpoint.error(f"holds a {checkpoint['model']}, not a {args.model}")
    model, vocabulary = restore_model(checkpoint)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    window = checkpoint.value("bptt", int) or DEFAULT_BPTT
    reader = Reader(model, min(max(window, 1), MAX_POSITIONS))

    generator = torch.Generator().manual_seed(args.seed)
    prompt = encode(args.prompt, vocabulary)
    start = prompt or [int(torch.randint(len(vocabulary), (1,), generator=generator))]
    with output(args.outf) as text:
        words = itertools.chain(prompt, generate(reader, start, generator, args))
        count = len(prompt) + args.words
        for place, word in enumerate(words, 1):
            text.write(vocabulary[word] + (" " if place % WORDS_A_LINE and place < count else "\n"))
            done = place - len(prompt) - 1
            if done >= 0 and done % args.log_interval == 0:
                print(f"| Generated {done}/{args.words} words", file=report)
    if args.outf != "-":
        print(f"=> {args.outf}")


if __name__ == "__main__":
    run_script(main)
