"""What a report trains: the ways to train a classifier, language models of one size, and seeds."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from engine.cli import ArgumentParser, UserError
from engine.launch import emulates_bf16
from image_classification.model import check_architecture
from report.steps import launched
from word_language_model.model import model_class
from word_language_model.settings import ModelSpec


class Way(NamedTuple):
    """A way to train the same classifier: its name, what it is, its YAML, and its flags."""

    title: str
    what: str
    config: str
    flags: Sequence[str] = ()


PARTS = 4  # of a batch: four processes, or four steps of one
PART_FLAGS = ("--gradient-accumulation-steps", str(PARTS))
WAYS = {
    "cpu": Way("one process", "on the CPU in float32, the reference", "cpu"),
    "cpu4": Way("four processes", "each takes, and normalises by, a quarter of a batch", "cpu4"),
    "parts4": Way("four parts", "one process takes these quarters one by one", "cpu", PART_FLAGS),
    "cpu_bf16": Way("bf16", "one process on the CPU, in bf16", "cpu_bf16"),
    "gpu1": Way("one GPU", "in bf16, or in fp16 if it lacks bf16", "gpu1"),
    "gpu4": Way("four GPUs", "as on one GPU, each with a quarter of a batch", "gpu4"),
}
CONTROL = "another seed"  # of the reference
LANGUAGE_MODELS = {"Transformer": 5, "LSTM": 20, "CNN": 20}  # and their learning rates
# Flags of the trainings that are this script's to set, or whose files it would not find.
OWN_FLAGS = {"data", "dummy", "model", "epochs", "evaluate", "dry_run", "resume", "overwrite"}
OWN_FLAGS |= {"output_dir", "save", "log_dir", "onnx_export", "seed", "gradient_accumulation_steps"}

Groups = dict[str, dict[int, str]]  # titles of trainings that differ in their seeds, to the steps


def check_flags(flag: str, text: str, training: ModuleType) -> dict[str, Any]:
    """All settings of `training` by the flags in `text`, which is of `flag`, and its defaults.

    Raises:
        UserError: what the training would refuse, as far as that is known at once, and OWN_FLAGS.
    """
    parser: ArgumentParser = training.make_parser()
    parser.prog = f"{training.__name__}.py"
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that what is parsed is what is given
    try:
        given = vars(parser.parse_args(shlex.split(text), argparse.Namespace()))
        for name in sorted(OWN_FLAGS & given.keys()):
            own = "--seed, by --seeds" if name == "seed" else f"--{name.replace('_', '-')} itself"
            raise ValueError(f"reproduce.py sets {own}: leave it out")
        settings: dict[str, Any] = defaults | given
        if settings["batch_size"] % PARTS:
            raise ValueError(f"{settings['batch_size']} cannot be cut into {PARTS} equal parts")
        if "arch" in settings:
            check_architecture(settings["arch"])
        for model in LANGUAGE_MODELS if "emsize" in settings else ():
            fields = {f: settings[f] for f in ModelSpec._fields if f != "words"}
            spec = ModelSpec(**fields | {"model": model}, words=0)
            model_class(model).check(spec, settings["bptt"])
        return settings
    except (UserError, ValueError) as error:  # the latter also of a quotation mark not closed
        raise UserError(f"{flag} {shlex.quote(text)}: {error}") from error


def control_seeds(args: argparse.Namespace) -> list[int]:
    """Those of the trainings that are repeated in any case: with one seed, also the next."""
    seeds: list[int] = args.seeds
    return seeds if len(seeds) > 1 else [seeds[0], seeds[0] + 1]


def image_trainings(args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands that train a classifier in every way that the machine allows."""
    bf16 = not emulates_bf16(torch.device("cpu"))
    gpus = torch.cuda.device_count()
    allowed = ["cpu", "cpu4", "parts4", *["cpu_bf16"] * bf16]
    allowed += [*["gpu1"] * (gpus > 0), *["gpu4"] * (gpus > 3)]
    flags = [args.data, "--epochs", args.epochs, *shlex.split(args.image_flags)]
    commands = {}
    for way in allowed:
        for seed in control_seeds(args) if way == "cpu" else args.seeds:
            name = f"{way}-seed{seed}"
            own = [*WAYS[way].flags, "--seed", seed, "--resume", "auto"]
            own += ["--output-dir", args.output_dir / name]
            commands[name] = launched(WAYS[way].config, "resnet_main.py", *flags, *own)
    return commands


def text_trainings(args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The commands that train language models of about the same number of parameters.

    A Transformer's --nhid is the width of its layers' second half alone. Twice as wide, a layer
    has as many parameters as one of the LSTM, whose --emsize is its --nhid.
    """
    config = "cpu" if emulates_bf16(torch.device("cpu")) else "cpu_bf16"
    if torch.cuda.is_available():
        config = "gpu1"
    commands = {}
    for model, lr in LANGUAGE_MODELS.items():
        for seed in control_seeds(args):
            flags = ["--data", args.text, "--model", model, "--lr", lr]
            flags += ["--epochs", args.text_epochs, *shlex.split(args.text_flags), "--seed", seed]
            if model == "Transformer" and not settings["tied"]:
                flags += ["--nhid", 2 * settings["nhid"]]
            name = f"{model}-seed{seed}"
            flags += ["--resume", "auto", "--save", args.output_dir / f"{name.lower()}.pt"]
            commands[name] = launched(config, "lm_main.py", *flags)
    return commands


def grouped(names: Sequence[str], args: argparse.Namespace) -> Groups:
    """Trainings that differ in their seeds, together. The control stands alone.

    Where the reference has failed, its other seed takes its place, and there is no control.
    """
    groups: Groups = {}
    for name in names:
        kind, _, seed = name.rpartition("-seed")
        title = WAYS[kind].title if kind in WAYS else kind
        if kind in WAYS and int(seed) not in args.seeds and title in groups:
            title = CONTROL
        groups.setdefault(title, {})[int(seed)] = name
    return groups
