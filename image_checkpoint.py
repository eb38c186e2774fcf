"""What a checkpoint of an image classifier holds: a model, and where its training was."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import checkpoint as checkpoints
import image_model
from image_model import DEFAULT_ARCH, DEFAULT_SIZE, DEFAULT_STEM, STEMS, ModelSpec
from metrics import RunningSums
from runtime import UserError

LARGEST_SIZE = 4096  # pixels a side, of an image size that is not asked for by a flag

# The original's defaults.
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256}


def read_spec(
    checkpoint: Mapping[str, Any], path: Path, arch: str | None, stem: str | None
) -> ModelSpec:
    """What model a checkpoint holds: its own keys, else flags, else the defaults.

    A checkpoint of the original or a bare state dict has no stem; torchvision's own is meant.

    Raises:
        UserError: keys of the wrong type or an architecture that torchvision does not have.
    """
    found_arch = checkpoints.value(checkpoint, "arch", str, path) or arch or DEFAULT_ARCH
    image_model.check_architecture(found_arch)
    found_stem = None
    if image_model.has_stem(found_arch):
        found_stem = checkpoints.value(checkpoint, "stem", str, path) or stem or "stock"
        if found_stem not in STEMS:
            raise UserError(f"checkpoint {path}: unknown stem {found_stem!r}: damaged")
    # The head is the last layer of every classifier of torchvision.
    head = next(reversed(checkpoint["state_dict"].values()))
    num_classes = head.shape[0] if head.dim() else 0
    size = checkpoints.value(checkpoint, "image_size", int, path) or DEFAULT_SIZE
    if num_classes < 1 or not 1 <= size <= LARGEST_SIZE:
        raise UserError(f"checkpoint {path}: {num_classes} classes at {size} px: damaged")
    return ModelSpec(found_arch, found_stem, num_classes, size)


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path, arch: str) -> None:
    """Load a checkpoint's state dict.

    Raises:
        UserError: when its names or shapes are not those of the model.
    """
    own = model.state_dict()
    # Auxiliary heads of googlenet and inception_v3, which the kit builds without.
    state = {
        k: v
        for k, v in checkpoint["state_dict"].items()
        if k in own or not k.lower().startswith("aux")
    }
    checkpoints.load_state(model, state, f"a {arch}; -a says what it is", path)


def refuse_other_classes(checkpoint: Mapping[str, Any], classes: list[str], path: Path) -> None:
    own = checkpoints.value(checkpoint, "classes", list, path)
    count = len(own) if own else next(reversed(checkpoint["state_dict"].values())).shape[0]
    if count != len(classes):
        raise UserError(f"checkpoint {path} has {count} classes and the dataset {len(classes)}")
    if own and own != classes:
        first = next(pair for pair in zip(own, classes, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"checkpoint {path} knows other classes than the dataset: "
            f"{first[0]} where the dataset has {first[1]}"
        )


def settle(args: argparse.Namespace, checkpoint: dict[str, Any], accelerator: Accelerator) -> None:
    """Fill in what the model and its training are.

    Architecture and stem are the checkpoint's, and a flag that disagrees is named; the image size
    and `SETTINGS` are the flags', else the checkpoint's; else the defaults are taken.
    """
    settings = _read_settings(checkpoint, args.resume)
    for name, default in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name, default))
    if checkpoint:
        spec = read_spec(checkpoint, args.resume, args.arch, args.stem)
        args.image_size = args.image_size or spec.image_size
        for key, value in {"arch": spec.arch, "stem": spec.stem}.items():
            asked = getattr(args, key)
            if asked is not None and asked != value:
                accelerator.print(f"=> {args.resume} has {key} {value}: --{key} {asked} is ignored")
            setattr(args, key, value)
    args.arch = args.arch or DEFAULT_ARCH
    if not image_model.has_stem(args.arch):
        if args.stem is not None:
            accelerator.print(f"=> {args.arch} is no ResNet: --stem {args.stem} is ignored")
        args.stem = None
    elif args.stem is None:
        args.stem = DEFAULT_STEM
    args.image_size = args.image_size or DEFAULT_SIZE


def _read_settings(checkpoint: Mapping[str, Any], path: Path) -> dict[str, float]:
    """What of `SETTINGS` a checkpoint knows: the optimizer's own, as the original resumes it."""
    optimizer = checkpoints.value(checkpoint, "optimizer", dict, path) or {}
    try:
        found = dict(optimizer["param_groups"][0]) if optimizer else {}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: its optimizer has no settings: damaged") from error
    found["lr"] = found.get("initial_lr")
    found["batch_size"] = checkpoints.value(checkpoint, "batch_size", int, path)
    settings = {name: found[name] for name in SETTINGS if found.get(name) is not None}
    for name, value in settings.items():
        least = 1 if name == "batch_size" else 0
        if not isinstance(value, (int, float)) or not least <= value < 2**63:
            raise UserError(f"checkpoint {path}: {name} is {value!r}: damaged")
    return settings


class TrainingState:
    """Where a run is: all that its checkpoint adds to weights and optimizer.

    Attributes:
        epoch: the epoch under way, from 0.
        step: its steps that are done.
        best_acc1: the best of the epochs before it, in percent; below 0 before the first.
        sums: its metrics so far, None before its first step.
        carried: what `sums` starts from when a run is resumed within an epoch.
    """

    def __init__(self, epoch: int = 0, step: int = 0, best_acc1: float = -1.0) -> None:
        self.epoch, self.step, self.best_acc1 = epoch, step, best_acc1
        self.sums: RunningSums | None = None
        self.carried: list[list[float]] | None = None


def restore(
    checkpoint: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    samples: int,
    steps: int,
    args: argparse.Namespace,
) -> TrainingState:
    """Take up the run that `checkpoint` holds; a bare state dict only has weights.

    Args:
        samples: training images, in `steps` global batches.

    Raises:
        UserError: damaged values, or a checkpoint within an epoch of other batches.
    """
    path: Path = args.resume
    epoch = checkpoints.value(checkpoint, "epoch", int, path)
    run = TrainingState(
        args.start_epoch if epoch is None else epoch,
        checkpoints.value(checkpoint, "step", int, path) or 0,
    )
    best = checkpoints.value(checkpoint, "best_acc1", (int, float), path)
    run.best_acc1 = run.best_acc1 if best is None else best
    run.carried = checkpoints.sums(checkpoint, 4, path)
    if run.epoch < 0 or not 0 <= run.step <= steps:
        raise UserError(f"checkpoint {path}: epoch {run.epoch}, step {run.step}: damaged")
    now = {"batch_size": args.batch_size, "seed": args.seed, "samples": samples}
    for name, value in now.items() if run.step else ():
        if checkpoint.get(name) != value:
            raise UserError(
                f"checkpoint {path} lies within an epoch of {name} {checkpoint.get(name)}, and "
                f"this run has {value}: resume it as it was, or from the end of an epoch"
            )
    checkpoints.load_optimizer(optimizer, checkpoint, path)
    return run
