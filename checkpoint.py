"""Checkpoints as data: written whole or not at all, read without executing anything."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from files import whole_or_absent
from runtime import UserError


def save(checkpoint: Mapping[str, Any], path: Path, *copies: Path) -> None:
    """Write `checkpoint` to each of `copies` and then to `path`, each whole or not at all.

    `path` comes last: a run that is killed in between resumes from the older `path` and writes
    the copies again, with the same bits.

    Raises:
        UserError: when the disk is full or not writable; what was there before is still whole.
    """
    target = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            torch.save(dict(checkpoint), temporary)
            for target in copies:
                with whole_or_absent(target) as copy:
                    shutil.copyfile(temporary, copy)
            target = path
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {target} ({reason}); the one before it is kept") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: the kit's, the original's, or a bare state dict.

    Returns a dict with at least `state_dict`, whose names have lost the `module.` that
    DistributedDataParallel and DataParallel put before them.

    Raises:
        UserError: a file that is missing, cut, not a checkpoint, or that holds code.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"checkpoint {path}: {what}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path}: holds more than tensors and plain values, or is no checkpoint; "
            "loading it could run code, so nothing was loaded: re-save its state_dict() alone "
            "with the program that wrote it"
        ) from error
    # A cut or damaged file fails in whichever layer meets the damage first, with its exception.
    except Exception as error:
        reason = f": {error}".splitlines()[0] if isinstance(error, (OSError, RuntimeError)) else ""
        raise UserError(f"checkpoint {path}: damaged, cut, or no checkpoint{reason}") from error
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    state = content["state_dict"] if isinstance(content, dict) else None
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items())
    ):
        raise UserError(f"checkpoint {path}: holds no state_dict of named tensors")
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    # DataParallel around `features` alone, as the original wraps AlexNet and VGG.
    state = {name.replace("features.module.", "features."): t for name, t in state.items()}
    # The original's best_acc1 is a tensor.
    plain = {
        k: v.item() if torch.is_tensor(v) and v.numel() == 1 else v for k, v in content.items()
    }
    return {**plain, "state_dict": state}


def value(
    checkpoint: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: Path
) -> Any:
    """`checkpoint[key]` when it is a `kind`, None when the key is absent.

    Raises:
        UserError: when the value is of another type.
    """
    found = checkpoint.get(key)
    if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
        raise UserError(f"checkpoint {path}: {key} is a {type(found).__name__}: damaged")
    return found


def sums(checkpoint: Mapping[str, Any], width: int, path: Path) -> list[list[float]] | None:
    """The metrics of an unfinished epoch, a row of `width` numbers for each process.

    Raises:
        UserError: when they are anything else.
    """
    rows: list[list[float]] | None = value(checkpoint, "sums", list, path)
    for row in rows or ():
        if not (isinstance(row, list) and [type(x) for x in row] == [float] * width):
            raise UserError(f"checkpoint {path}: sums are not rows of {width} numbers: damaged")
    return rows


def load_state(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str, path: Path
) -> None:
    """Load weights into `model`, which is `what`.

    Raises:
        UserError: when their names or shapes are not the model's; names the first that is not.
    """
    own = model.state_dict()
    for name in {**own, **state}:
        if name not in state or name not in own:
            where = "lacks" if name not in state else "has a superfluous"
            raise UserError(f"checkpoint {path}: {where} {name}: not {what}")
        if state[name].shape != own[name].shape:
            have, want = tuple(state[name].shape), tuple(own[name].shape)
            raise UserError(f"checkpoint {path}: {name} has shape {have} instead of {want}")
    model.load_state_dict(state)


def load_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any], path: Path
) -> None:
    """Load the optimizer's state, if the checkpoint has one.

    Raises:
        UserError: when it belongs to another model or optimizer.
    """
    state = value(checkpoint, "optimizer", dict, path)
    if not state:
        return
    try:
        optimizer.load_state_dict(state)
        for parameter, values in optimizer.state.items():
            for name, tensor in values.items():
                # `step` is AdamW's count; momentum is None before the first step.
                if name != "step" and tensor is not None and tensor.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path}: its optimizer is not one for this model ({error})"
        ) from error
