"""A training of a language model, set up: its settings, model, optimizer and text."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from engine.checkpoints import Checkpoint
from engine.cli import ArgumentParser, UserError
from engine.graphs import can_use_graphs, make_capturable
from engine.launch import check_compiler
from engine.run import Run
from word_language_model.checkpoint import load, load_weights, read_spec
from word_language_model.data import corpus_files, segment_count
from word_language_model.export import check_exporter, onnx_files
from word_language_model.model import LanguageModel, build_model
from word_language_model.settings import MODEL_SETTINGS, SETTINGS, ModelSpec, check_spec


def make_run(accelerator: Accelerator, args: argparse.Namespace) -> Run:
    save: Path = args.save
    latest, log_dir = beside(save)
    twin = save.with_name(f"{save.stem}.pt")  # whose state may be where this run's was
    former = save.with_name(f"{save.stem}.checkpoint.pt")
    return Run(
        accelerator,
        latest=latest,
        best=save,
        log_dir=args.log_dir or log_dir,
        flag="--save",
        former=None if save == twin or twin.exists() else former,
        figure="best_val_loss",
        best_of=best_of,
        # How many times the learning rate was divided by four, the lowest validation loss of the
        # epochs done, and the hidden state of this process's columns after the steps done.
        values={"annealed": 0, "best_val_loss": None, "hidden": ()},
        width=2,  # losses since the last line, and over the epoch times rows
        average=True,
        first_epoch=1,
        checkpoint_every=args.checkpoint_every,
        is_dry=args.dry_run,
    )


@contextlib.contextmanager
def dry(run: Run, args: argparse.Namespace) -> Iterator[None]:
    """With --dry-run all files go to a folder beside --save, which is removed at the end.

    So a disk that is full or read-only shows, and no model of an earlier run is replaced.
    """
    if not (args.dry_run and run.accelerator.is_main_process):
        yield
        return
    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=args.save.parent) as folder:
        run.latest, run.best = Path(folder, run.latest.name), Path(folder, run.best.name)
        run.log_dir = Path(folder, "logs")
        args.onnx_export = args.onnx_export and Path(folder, args.onnx_export.name)
        yield
    print("=> dry run: its files are removed again")


def beside(save: Path) -> tuple[Path, Path]:
    """Where a run with this --save keeps its state and its curves.

    No two names share one: neither `lr0.2` and `lr0.5` nor `m`, `m.pt` and `m.pth`.
    """
    stem = save.name.removesuffix(".pt")
    stem += "." if stem != save.name else "-"
    return save.with_name(f"{stem}checkpoint.pt"), save.with_name(f"{stem}logs")


def best_of(latest: Path) -> Path:
    """The --save of a run that keeps its state at `latest`, or kept it there before."""
    name = re.sub(r"\.checkpoint(\.previous)?(?=\.pt$)", "", latest.name)
    return latest.with_name(re.sub(r"-checkpoint(\.previous)?\.pt$", "", name))


def find_checkpoint(run: Run, args: argparse.Namespace) -> Checkpoint:
    """What --resume means, after all paths of the command were looked at; empty for none."""
    if args.onnx_export:
        check_exporter()
    asked = args.resume or (args.save if args.evaluate else None)
    paths = onnx_files(args.onnx_export), corpus_files(args.data)
    args.resume = run.find(asked, args.evaluate, args.overwrite, *paths)
    return load(args.resume) if args.resume else Checkpoint()


def settle(
    parser: ArgumentParser,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
) -> ModelSpec:
    """Give every setting its value, and refuse those that do not go together.

    Returns the model to build, still without its words.
    """
    found: dict[str, Any] = {}
    if checkpoint:
        found = {name: checkpoint.get(name) for name in SETTINGS}
        found |= read_spec(checkpoint)._asdict()
        if found["use_optimizer"] is None and "algorithm" in checkpoint:  # as it was called once
            found["use_optimizer"] = checkpoint["algorithm"] == "AdamW"
        if found["layer_dropout"] is None:  # --dropout used to reach the layers as well
            found["layer_dropout"] = found["dropout"]
    parser.settle(args, found, args.resume, accelerator.print, fixed=MODEL_SETTINGS)
    if args.dry_run:
        args.epochs = 1
    if args.batch_size % accelerator.num_processes and not args.evaluate:
        raise UserError(
            f"--batch-size {args.batch_size} is for all processes together and cannot be divided "
            f"by {accelerator.num_processes}: use a multiple"
        )
    sizes = {name: getattr(args, name) for name in ModelSpec._fields if name != "words"}
    spec = ModelSpec(words=0, **sizes)
    check_spec(spec, args.bptt)
    return spec


def set_up(
    run: Run, spec: ModelSpec, text: torch.Tensor, args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """Model, optimizer and this process's columns, as new or as `checkpoint` has them.

    Args:
        text: [rows, columns] of all processes.

    Returns:
        Model and optimizer as prepared, and the text [rows, columns of this process] on the device.
    """
    accelerator = run.accelerator
    torch.manual_seed(args.seed)
    model = build_model(spec, args.dropout, args.layer_dropout)
    if checkpoint:
        load_weights(model, checkpoint)
    # The original's `p -= lr * grad`, or its AdamW.
    kind = torch.optim.AdamW if args.use_optimizer else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=args.lr)
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    columns = slice(first, first + share)
    if checkpoint and not args.evaluate:
        batches = {"batch_size": args.batch_size, "bptt": args.bptt}
        steps = segment_count(text, args.bptt)
        run.resume(checkpoint, optimizer, steps, batches)
        former_logs = args.save.with_name(f"{args.save.stem}.logs")
        goes_on = args.resume == run.former and not args.log_dir and former_logs.is_dir()
        if goes_on and accelerator.is_main_process:
            shutil.copytree(former_logs, run.log_dir, dirs_exist_ok=True)
        resume_values(run, checkpoint, model, columns, args.batch_size)
    # Not with AdamW, whose step count is on the CPU.
    graphable = can_use_graphs(accelerator) and not args.use_optimizer
    run.graphed = graphable and args.compile is not False
    if run.graphed:
        make_capturable(optimizer, accelerator.device)
    elif args.compile:
        check_compiler()
        model.compile()
    return *run.prepare(model, optimizer), text[:, columns].contiguous().to(accelerator.device)


def resume_values(
    run: Run, checkpoint: Checkpoint, model: LanguageModel, columns: slice, batch_size: int
) -> None:
    """Take up annealing, best loss and, within an epoch, the hidden state of `columns`."""
    annealed = checkpoint.value("annealed", int) or 0
    if annealed < 0:
        raise checkpoint.error(f"annealed is {annealed}: damaged")
    run.values["annealed"] = annealed
    run.values["best_val_loss"] = checkpoint.value("best_val_loss", float)
    if not run.step:
        return
    hidden = checkpoint.value("hidden", list) or []
    shapes = [h.shape for h in model.initial_hidden(batch_size)]
    if [getattr(h, "shape", None) for h in hidden] != shapes or not run.carried:
        raise checkpoint.error(f"sums or hidden state are not those of a {checkpoint['model']}")
    device = run.accelerator.device
    run.values["hidden"] = tuple(h[:, columns].contiguous().to(device) for h in hidden)


def take_best(run: Run, model: LanguageModel) -> None:
    """Give `model` the weights that did best on the validation text, on every process."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        best_loss = run.values["best_val_loss"]
        best = load(run.best) if best_loss is not None and run.best.is_file() else Checkpoint()
        if best and best.get("best_val_loss") == best_loss:
            load_weights(model, best)
        elif best_loss is None:
            print("=> no epoch is done: testing the weights as they are")
        else:  # resumed with another --save
            print(f"=> {run.best} does not hold this run's best weights: testing the last ones")
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            parameter.data.copy_(broadcast(parameter.data))
