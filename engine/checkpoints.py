"""Checkpoints as data: written whole or not at all, read without executing anything."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from torch import nn

from engine.cli import UserError
from engine.files import whole_or_absent

# What DistributedDataParallel, torch.compile and Lightning put before all names of a model.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Keys under which programs keep weights; the first that a file has counts.
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "net")

# Optimizer options that a resumed run sets itself: kernels depend on the machine, a CUDA graph
# reads the rate from a tensor, and files of older torch lack some.
OWN_OPTIONS = ("lr", "foreach", "fused", "capturable", "differentiable", "maximize")


class Checkpoint(dict[str, Any]):
    """What a file holds; empty for a run that starts anew.

    `load` gives at least `state_dict`, its names without the PREFIXES of wrappers.
    """

    def __init__(self, path: Path = Path(), content: Mapping[str, Any] | None = None) -> None:
        super().__init__(content or {})
        self.path = path

    def error(self, message: str) -> UserError:
        return UserError(f"checkpoint {self.path}: {message}")

    def value(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `key` when it is a `kind`, None when the key is absent.

        Raises:
            UserError: a value of another type.
        """
        found = self.get(key)
        if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
            raise self.error(f"{key} is a {type(found).__name__}: damaged")
        return found

    def sums(self, width: int) -> list[list[float]] | None:
        """The sums of an unfinished epoch, a row of `width` numbers for each process."""
        rows: list[list[float]] | None = self.value("sums", list)
        for row in rows or ():
            if not (isinstance(row, list) and [type(x) for x in row] == [float] * width):
                raise self.error(f"sums are not rows of {width} numbers: damaged")
        return rows

    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
        """Load `state` into `model`, which errors call `what`.

        Raises:
            UserError: the first name, shape or type that is not the model's.
        """
        own = model.state_dict()
        for name in {**own, **state}:
            if name not in state or name not in own:
                where = "lacks" if name not in state else "has a superfluous"
                raise self.error(f"{where} {name}: not {what}")
            have, want = state[name], own[name]
            if have.shape != want.shape:
                raise self.error(
                    f"{name} has shape {tuple(have.shape)} instead of {tuple(want.shape)}"
                )
            if have.is_floating_point() != want.is_floating_point():
                raise self.error(f"{name} is {have.dtype} instead of {want.dtype}")
        # Through the model's own dict, in which some modules keep their version.
        own.update(state)
        model.load_state_dict(own)

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimizer's state, if there is one.

        Raises:
            UserError: the state of another optimizer, or of one for another model.
        """
        state = self.value("optimizer", dict)
        if not state:
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's
        try:
            # OWN_OPTIONS are set before the load: torch places AdamW's `step` by them.
            pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
            groups = [{**its, **{k: own[k] for k in OWN_OPTIONS if k in own}} for its, own in pairs]
            optimizer.load_state_dict({**state, "param_groups": groups})
            for group in optimizer.param_groups:
                if missing := optimizer.defaults.keys() - group.keys():
                    raise ValueError(f"no {type(optimizer).__name__}: {min(missing)} is missing")
            for parameter, values in optimizer.state.items():
                for name, tensor in values.items():
                    if name == "step" or tensor is None:  # AdamW's count; no momentum yet
                        continue
                    if tensor.shape != parameter.shape:
                        raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
                    # Fused kernels want the parameter's memory format.
                    values[name] = torch.empty_like(parameter.detach()).copy_(tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.error(f"its optimizer is not one for this model ({error})") from error

    def load_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Load the loss scale of an fp16 run. After a run of another precision it begins anew.

        Raises:
            UserError: a damaged state.
        """
        state = self.value("scaler", dict)
        if scaler is None or not state:
            return
        own = scaler.state_dict()
        if {k: type(v) for k, v in state.items()} != {k: type(v) for k, v in own.items()}:
            raise self.error("its scaler is none of torch's: damaged")
        scaler.load_state_dict(state)


def save(
    checkpoint: Mapping[str, Any], path: Path, *copies: Path, previous: Path | None = None
) -> None:
    """Write `checkpoint` to each of `copies` and then to `path`, each whole or not at all.

    `path` comes last: a run that is killed before that resumes from the older file at `path`, and
    writes the same copies again.

    Args:
        previous: gets the file that was at `path`.

    Raises:
        UserError: when the disk is full or not writable; what was there before is still whole.
    """
    target = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = Path(os.path.realpath(path))  # some systems hard-link to a link itself
        with contextlib.ExitStack() as afterwards:
            if previous is not None:
                # A temporary second name, renamed to `previous` after `path` has its new file:
                # at every moment there are two whole files, in case one gets damaged.
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
    """Writes a run's checkpoints in a thread of its own, and keeps the one before the latest.

    A failure is raised by the next call of any method. Leaving the context waits.

    Args:
        resumed: the file that the run goes on from. If it is not `latest`, the file at `latest`
            is another run's and is not kept as `previous`.
    """

    def __init__(self, latest: Path, resumed: Path | None) -> None:
        self.latest, self.previous = latest, previous_of(latest)
        self.newest = resumed and resumed.resolve()
        self.executor = concurrent.futures.ThreadPoolExecutor(1)
        self.written: concurrent.futures.Future[None] = self.executor.submit(lambda: None)

    def save(self, checkpoint: Mapping[str, Any], *copies: Path) -> None:
        """Copy `checkpoint` to main memory, then write it while training goes on."""
        self.wait()
        snapshot = _to_host(checkpoint, {})
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # once, for all the copies
        self.written = self.executor.submit(self._write, snapshot, copies)

    def _write(self, checkpoint: Mapping[str, Any], copies: tuple[Path, ...]) -> None:
        is_ours = self.newest == self.latest.resolve() and self.latest.exists()
        save(checkpoint, self.latest, *copies, previous=self.previous if is_ours else None)
        if not is_ours and self.newest != self.previous.resolve():
            self.previous.unlink(missing_ok=True)
        self.newest = self.latest.resolve()

    def check(self) -> None:
        """Raise what the last write raised, if it has ended."""
        if self.written.done():
            self.written.result()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk, or raise what its write raised."""
        self.written.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.executor.shutdown()
        if error is None:
            self.check()


def _to_host(value: Any, copied: dict[object, torch.Tensor]) -> Any:
    """A copy of `value` with its tensors in main memory, pinned for those of a GPU.

    Args:
        copied: tensors that have been copied. Tied weights share memory: one copy keeps them tied.
    """
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copied:
            copied[key] = value.detach().to("cpu", non_blocking=value.is_cuda, copy=True)
        return copied[key]
    if isinstance(value, Mapping):
        return {name: _to_host(item, copied) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(item, copied) for item in value)
    return value


def newest_whole(paths: Sequence[Path]) -> Path:
    """The first whole file of `paths`, newest first; prints what is wrong with those before it.

    Raises:
        UserError: all are damaged.
    """
    problems = []
    for path in paths:
        try:
            load(path)
            return path
        except UserError as error:
            problems.append(str(error))
            print(f"=> {error}")
    damaged = "; ".join(problems)
    raise UserError(f"{damaged}: no whole checkpoint is left; move these away to start afresh")


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU: the kit's, the original's, or weights under other keys.

    Other keys are `model` (torchvision's references), `model_state_dict` and `net`. Lightning's
    files and bare state dicts are read too, the latter also as safetensors.

    Raises:
        UserError: a file that is missing, cut, damaged, not a checkpoint, or that holds code.
    """
    checkpoint = Checkpoint(path)
    if not path.is_file():
        raise checkpoint.error(
            "is a directory: name the file in it" if path.is_dir() else "no such file"
        )
    try:
        _verify_archive(path)
        content: Any
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # torchvision's references keep their flags, plain values, in a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise checkpoint.error(
            _other_kind(path)
            or "holds more than tensors and plain values, or is no checkpoint; loading it could "
            "run code, so nothing was loaded. If you trust it, this turns it into weights: "
            f"python -c \"import torch; m = torch.load('{path}', weights_only=False); "
            "torch.save(getattr(m, 'state_dict', lambda: m['state_dict'])(), 'weights.pth')\""
        ) from error
    # A cut or damaged file fails in whichever layer meets the damage first, with its exception.
    except Exception as error:
        spoken = isinstance(error, (OSError, RuntimeError, ValueError, zipfile.BadZipFile))
        reason = f": {error}".splitlines()[0] if spoken else ""
        kind = _other_kind(path)
        raise checkpoint.error(kind or f"damaged, cut, or no checkpoint{reason}") from error
    state = _find_weights(checkpoint, content)
    checkpoint.update(content if state is not content else {}, state_dict=_unwrapped(state))
    best = checkpoint.get("best_acc1")
    if torch.is_tensor(best) and best.numel() == 1:  # as the original has it
        checkpoint["best_acc1"] = best.item()
    if "lr_scheduler" in checkpoint and isinstance(checkpoint.get("epoch"), int):
        checkpoint["epoch"] += 1  # torchvision's references save the index of the last epoch
    return checkpoint


# The first bytes of files that people take for checkpoints, and what these are.
OTHER_FILES = {
    b"\x89HDF": "is an HDF5 file, of Keras perhaps, whose networks are others than torchvision's",
    b"\x1f\x8b": "is an archive: unpack it (tar -xf, or gunzip), and name the file in it",
    b"version https://git-lfs": "is the pointer to a file in git LFS: `git lfs pull` fetches it",
    b"<": "is a web page: the download has gone wrong",
    b"\xff\xd8\xff": "is an image, where a checkpoint is wanted",
    b"\x89PNG": "is an image, where a checkpoint is wanted",
}


def _other_kind(path: Path) -> str | None:
    """What kind of file this is instead of a checkpoint; None if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    except Exception:  # a damaged file, which the caller reports
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            'is a TorchScript program. This turns it into weights: python -c "import torch; '
            f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')\""
        )
    of_torch = ("/data.pkl", "/version")
    if names and not any("/data/" in name or name.endswith(of_torch) for name in names):
        return "is a zip archive: unpack it, and name the file in it"
    return next((what for magic, what in OTHER_FILES.items() if head.startswith(magic)), None)


def _find_weights(checkpoint: Checkpoint, content: Any) -> dict[str, torch.Tensor]:
    """The state dict in a file's content, or the content if it is one itself."""
    found: list[dict[str, torch.Tensor]] = []
    if isinstance(content, dict):
        found = [content[key] for key in WEIGHT_KEYS if _are_weights(content.get(key))]
        found = found or [value for value in content.values() if _are_weights(value)][:1]
    if found:
        return found[0]
    if _are_weights(content):
        return content  # type: ignore[no-any-return]
    keys = f" (it has {', '.join(map(str, [*content][:5]))})" if isinstance(content, dict) else ""
    raise checkpoint.error(f"holds no state_dict of named tensors{keys}")


def _are_weights(state: object) -> bool:
    return isinstance(state, dict) and bool(state) and all(map(_is_weight, state, state.values()))


def _unwrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # DataParallel around `features` alone, as the original wraps AlexNet and VGG.
    return {name.replace("features.module.", "features."): t for name, t in state.items()}


def _is_weight(name: object, tensor: object) -> bool:
    if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    # An expanded tensor has more values than its file.
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _verify_archive(path: Path) -> None:
    """Raise for a damaged archive, whose checksums torch's own reader does not look at."""
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6, or no checkpoint: torch.load tells
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("is compressed, and may unfold into more than its file's size")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} in it is wrong")
