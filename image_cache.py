"""Small images, decoded once into a memory-mapped file that all processes of a node share."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from files import whole_or_absent
from runtime import UserError, leave_signals_to_parent

SMALL = 128  # pixels a side; larger images are decoded by worker processes in every epoch
PROBES = 64
BATCH = 256
MOST_NAMED = 1000  # bad files in one message; more than that, and the disk has gone


class BadImageError(Exception):
    """An image file that cannot be decoded; the argument is its path."""


def open_image(path: str) -> Image.Image:
    """Decode an image file to RGB, as the original does.

    Raises:
        BadImageError: an empty, truncated or foreign file, or none.
    """
    try:
        # PIL warns of odd EXIF blocks, once a file.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(path) from error


def _problem(path: str) -> str:
    try:
        open_image(path)
    except BadImageError as error:
        cause = error.__cause__
        if not Path(path).exists():
            return "missing"
        if Path(path).stat().st_size == 0:
            return "empty"
        if isinstance(cause, UnidentifiedImageError):
            return "not an image"
        return "truncated" if "truncated" in str(cause).lower() else f"damaged: {cause}"
    return ""


class _Decoded(Dataset[tuple[torch.Tensor, str]]):
    """(pixels [3, side, side] uint8, problem) of each file; side 0 only looks for problems."""

    def __init__(self, paths: Sequence[str], side: int) -> None:
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.paths[index]
        blank = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
        try:
            image = open_image(path)
        except BadImageError:
            return blank, _problem(path)
        if not self.side:
            return blank, ""
        if image.size != (self.side, self.side):  # a stray among images of one size
            image = TF.center_crop(TF.resize(image, [self.side]), [self.side, self.side])
        return TF.pil_to_tensor(image), ""


def _decode(paths: Sequence[str], side: int, workers: int) -> DataLoader[tuple[torch.Tensor, str]]:
    return DataLoader(
        _Decoded(paths, side),
        batch_size=BATCH,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )


def refuse_bad_images(root: Path, paths: Sequence[str], workers: int) -> NoReturn:
    """Raise one `UserError` for all the bad files of a dataset, one of which was met.

    Only decoding everything tells which others are bad: said in one go, not one a run.
    """
    if not any(map(os.path.exists, paths[:: max(1, len(paths) // PROBES)])):
        raise UserError(f"the images of {root} have gone: restore them, and --resume auto goes on")
    problems: list[str] = []
    with tqdm(total=len(paths), desc="looking for bad images", disable=None) as bar:
        for pixels, reasons in _decode(paths, 0, workers):
            problems.extend(reasons)
            bar.update(len(pixels))
    _refuse(paths, problems)
    raise UserError("an image could not be read, but all can now: check the disk")


def _refuse(paths: Sequence[str], problems: Sequence[str]) -> None:
    bad = [f"{path} ({why})" for path, why in zip(paths, problems, strict=True) if why]
    if bad:
        more = f", and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise UserError(
            f"{len(bad)} of {len(paths)} image files cannot be read; restore or delete: "
            + ", ".join(bad[:MOST_NAMED])
            + more
        )


def small_side(paths: Sequence[str]) -> int | None:
    """The side of the images when they are small squares of one size, else None.

    Reads the headers of a sample of files, evenly spread.
    """
    sizes = set()
    for path in paths[:: max(1, len(paths) // PROBES)]:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                sizes.add(image.size)
        except (OSError, SyntaxError, ValueError):
            continue  # decoding will name it
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return width if width == height <= SMALL else None


def decoded_images(
    root: Path, paths: Sequence[str], stamps: Sequence[tuple[int, int]], side: int, workers: int
) -> torch.Tensor:
    """All images as one memory-mapped uint8 tensor [len(paths), 3, side, side].

    The first call decodes them into a file in `root`, or in the system's temporary folder when
    `root` is read-only; later calls only map it. The file's name carries a fingerprint of the
    images' names, sizes and modification times, so it is rebuilt when any of them changed.

    Raises:
        UserError: image files that cannot be decoded, all in one message, or a full disk.
    """
    content = [(os.path.relpath(p, root), *stamp) for p, stamp in zip(paths, stamps, strict=True)]
    fingerprint = hashlib.sha256(repr((side, content)).encode()).hexdigest()[:24]
    name = f".decoded-{fingerprint}.uint8"
    shape = (len(paths), 3, side, side)
    size = len(paths) * 3 * side * side

    beside, temporary = root / name, Path(tempfile.gettempdir()) / name
    for cache in (beside, temporary):
        if cache.is_file() and cache.stat().st_size == size:
            break
    else:
        cache = beside if os.access(root, os.W_OK) else temporary
        print(f"=> decoding {len(paths)} images of {root} into {cache}, once", flush=True)
        _build(cache, paths, side, workers)
        for outdated in cache.parent.glob(".decoded-*.uint8") if cache is beside else ():
            if outdated != cache:
                outdated.unlink(missing_ok=True)
    return torch.from_file(str(cache), size=size, dtype=torch.uint8).view(shape)


def _build(cache: Path, paths: Sequence[str], side: int, workers: int) -> None:
    problems: list[str] = []
    try:
        with (
            whole_or_absent(cache) as temporary,
            temporary.open("wb") as output,
            tqdm(total=len(paths), unit="images", desc="decoding", disable=None) as bar,
        ):
            for pixels, reasons in _decode(paths, side, workers):
                output.write(pixels.numpy().tobytes())
                problems.extend(reasons)
                bar.update(len(pixels))
            _refuse(paths, problems)
    except OSError as error:
        raise UserError(f"cannot write the decoded images to {cache}: {error.strerror}") from error
