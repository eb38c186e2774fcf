"""Checkpoints as data: written whole or not at all, read without executing anything."""

from __future__ import annotations

import contextlib
import copy
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from files import whole_or_absent
from runtime import Preemption, Stopped, UserError

# Values in a checkpoint, where an ImageNet model has some thousands and a vocabulary of
# WikiText-103 a quarter of a million: a small file can unfold into any number of them.
MOST_VALUES = 10_000_000


def save(
    checkpoint: Mapping[str, Any], path: Path, *copies: Path, previous: Path | None = None
) -> None:
    """Write `checkpoint` to each of `copies` and then to `path`, each whole or not at all.

    `path` comes last: a run that is killed in between resumes from the older `path` and writes
    the copies again, with the same bits.

    Args:
        previous: takes what was at `path`.

    Raises:
        UserError: when the disk is full or not writable; what was there before is still whole.
    """
    target = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as afterwards:
            if previous is not None:
                # A second name for now, which takes its place when `path` has its new file: at
                # every moment there are two files, and one may be damaged.
                older = afterwards.enter_context(whole_or_absent(previous))
                try:
                    older.hardlink_to(path)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, older)
            with whole_or_absent(path) as temporary:
                torch.save(dict(checkpoint), temporary)
                for target in copies:
                    with whole_or_absent(target) as duplicate:
                        shutil.copyfile(temporary, duplicate)
                target = path
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write {target} ({reason}); the one before it is kept, and --resume auto "
            "goes on from there once there is room"
        ) from error


def previous_of(latest: Path) -> Path:
    """Where the checkpoint before the latest one is kept, in case that is damaged."""
    return latest.with_name(f"{latest.stem}.previous{latest.suffix}")


class Writer:
    """Writes a run's checkpoints beside its training, and keeps the one before the latest.

    A failure is raised by the next call of any method. Leaving the context waits.

    Args:
        resumed: the file that the run goes on from; another run's previous one is not kept.
    """

    def __init__(self, latest: Path, resumed: Path | None) -> None:
        self.latest, self.previous = latest, previous_of(latest)
        self.newest = resumed and resumed.resolve()
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.place = ""

    def save(self, checkpoint: Mapping[str, Any], *copies: Path) -> None:
        """Copy `checkpoint` in memory, which takes its time from training, and write it later."""
        self.wait()
        self.place = f"epoch {checkpoint.get('epoch')}, step {checkpoint.get('step')}"
        # Keeps tensors that share their memory together, as tied weights do.
        snapshot = copy.deepcopy(dict(checkpoint))
        self.thread = threading.Thread(target=self._write, args=(snapshot, copies))
        self.thread.start()

    def _write(self, checkpoint: Mapping[str, Any], copies: tuple[Path, ...]) -> None:
        try:
            is_ours = self.newest == self.latest.resolve() and self.latest.exists()
            save(checkpoint, self.latest, *copies, previous=self.previous if is_ours else None)
            if not is_ours and self.newest != self.previous.resolve():
                self.previous.unlink(missing_ok=True)
            self.newest = self.latest.resolve()
        except Exception as error:
            self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        if self.thread is not None:
            self.thread.join()
        self.check()

    def stop_if_asked(
        self, accelerator: Accelerator, preemption: Preemption, save: Callable[[], None]
    ) -> None:
        """Where a run can end: all processes call this after each step.

        Raises:
            Stopped: when a signal came to any of them, once what `save` saves is on the disk.
        """
        self.check()
        try:
            preemption.check()
        except Stopped:
            save()
            self.wait()
            accelerator.wait_for_everyone()  # the first to leave has a launcher end the others
            accelerator.print(f"=> {self.place}: saved to {self.latest}")
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.thread.join()
        if error is None:
            self.check()


def find(
    asked: Path | None, latest: Path, accelerator: Accelerator, *, needed: bool
) -> Path | None:
    """What `--resume` means: the path asked for; for `auto` the newest whole checkpoint, or None.

    Raises:
        UserError: when there are checkpoints and all are damaged, or none is there and `needed`.
    """
    if asked is None or str(asked) != "auto":
        return asked
    # The main process decides, since the others may see an older state of a network disk.
    answer: list[Path | UserError | None] = [None]
    if accelerator.is_main_process:
        answer = [_newest_whole(latest)]
    broadcast_object_list(answer)
    found = answer[0]
    if isinstance(found, UserError):
        raise found
    if found is None and needed:
        raise UserError(f"no checkpoint {latest} to evaluate: name one with --resume")
    if found is None:
        accelerator.print(f"=> no checkpoint {latest}: starting afresh")
    return found


def _newest_whole(latest: Path) -> Path | UserError | None:
    problems = []
    for path in (latest, previous_of(latest)):
        if path.exists():
            try:
                load(path)
            except UserError as error:
                problems.append(str(error))
                print(f"=> {error}")
            else:
                return path
    if not problems:
        return None
    return UserError(
        f"{'; '.join(problems)}: no whole checkpoint is left; move what is there away to start "
        "afresh"
    )


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: the kit's, the original's, or a bare state dict.

    Returns a dict with at least `state_dict`, whose names have lost the `module.` that
    DistributedDataParallel and DataParallel put before them.

    Raises:
        UserError: a file that is missing, cut, damaged, not a checkpoint, that holds code, or
            that would unfold into more than it holds.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"checkpoint {path}: {what}")
    try:
        _verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_unfolding(content)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path}: holds more than tensors and plain values, or is no checkpoint; "
            "loading it could run code, so nothing was loaded: re-save its state_dict() alone "
            "with the program that wrote it"
        ) from error
    # A cut or damaged file fails in whichever layer meets the damage first, with its exception.
    except Exception as error:
        spoken = isinstance(error, (OSError, RuntimeError, ValueError, zipfile.BadZipFile))
        reason = f": {error}".splitlines()[0] if spoken else ""
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


def _verify_archive(path: Path) -> None:
    """Raise for a damaged archive, whose checksums torch's own reader does not look at."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return  # torch before 1.6, or no checkpoint, as torch.load will say
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("would unfold into more than its file's size")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} in it is wrong")


def _refuse_unfolding(content: object) -> None:
    """Raise for values that take more memory than the file they came from."""
    rest, count = [content], 0
    while rest:
        item = rest.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError("holds too many values")
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu":
                raise ValueError(f"holds a tensor that is {item.layout}, {item.device}")
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError(f"holds a tensor {tuple(item.shape)} of fewer values")
        elif isinstance(item, Mapping):
            rest.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            rest.extend(item)


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
        UserError: when names, shapes or types are not the model's; names the first that is not.
    """
    own = model.state_dict()
    for name in {**own, **state}:
        if name not in state or name not in own:
            where = "lacks" if name not in state else "has a superfluous"
            raise UserError(f"checkpoint {path}: {where} {name}: not {what}")
        if state[name].shape != own[name].shape:
            have, want = tuple(state[name].shape), tuple(own[name].shape)
            raise UserError(f"checkpoint {path}: {name} has shape {have} instead of {want}")
        if state[name].is_floating_point() != own[name].is_floating_point():
            kinds = f"{state[name].dtype} instead of {own[name].dtype}"
            raise UserError(f"checkpoint {path}: {name} is {kinds}")
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
