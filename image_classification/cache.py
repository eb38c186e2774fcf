"""Small images, decoded once into a memory-mapped file that all processes of a node share."""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from engine.cli import UserError
from engine.files import writing
from engine.stop import leave_signals_to_parent, start_workers

SMALL = 128  # pixels a side; larger images are decoded by worker processes in every epoch
PROBES = 64  # files whose headers tell whether a dataset's images are small
BATCH = 64  # images; all workers' batches fit the 64 MB of shared memory that containers have
MOST_NAMED = 1000  # bad files in one message
DECODING = 2  # raised when a file's pixels become others: no older cache is used
JPEG = b"\xff\xd8\xff"  # how such a file begins
NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)  # faults of the machine


class BadImageError(Exception):
    """An image file that cannot be decoded; the argument is its path."""


def open_image(path: str) -> Image.Image:
    """Decode an image file to RGB, 8 bits a channel.

    Raises:
        BadImageError: the file is missing, empty, truncated, damaged or not an image.
    """
    try:
        # PIL warns of odd EXIF blocks, once for every file.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return _to_8_bits(image).convert("RGB")
    # A damaged file raises what its parser happened to meet: struct.error, EOFError, KeyError, …
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_FILES:
            raise
        raise BadImageError(path) from error


def decode(path: str) -> torch.Tensor:
    """`open_image` as pixels, [3, height, width] uint8, in channels-last order.

    JPEGs by torchvision: the same pixels as PIL's, sooner. It leaves EXIF's rotation alone as well.
    """
    try:
        # Deprecated since torchvision 0.29: from the version without it on, PIL decodes all.
        from torchvision.io import decode_jpeg

        content = np.fromfile(path, np.uint8)
        if content[: len(JPEG)].tobytes() == JPEG:
            pixels: torch.Tensor = decode_jpeg(torch.from_numpy(content))
            if len(pixels) in (1, 3):  # no CMYK
                return pixels.expand(3, -1, -1)
    except (ImportError, OSError, RuntimeError):
        pass  # PIL says what is wrong with it
    return to_pixels(open_image(path))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """[3, height, width] uint8, in channels-last order."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _is_deep(mode: str) -> bool:
    """Whether it is one of PIL's modes for more than 8 bits, all of them grey: I, I;16, F, …"""
    return mode.startswith(("I", "F"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale pixels of more than 8 bits, which PIL would clip to white.

    16 bits lose the lower 8, as PIL does itself to colour images. 32-bit numbers do not say what
    white is: 1 in floats up to 1, 255 up to 255, else 65,535. (PIL gives PGM files 65,535.)
    """
    if not _is_deep(image.mode):
        return image
    grey = image.convert("F")
    largest: Any = grey.getextrema()[1]
    if image.mode == "F" and largest <= 1:
        grey = grey.point(lambda value: value * 255 + 0.5)
    elif image.mode.startswith("I;16") or image.format == "PPM" or largest > 255:
        grey = grey.point(lambda value: value / 256)
    return grey.convert("L")


def describe(error: BadImageError) -> str:
    """What is wrong with the file, in a word or two."""
    path, cause = Path(error.args[0]), error.__cause__
    if not path.exists():
        return "missing"
    if path.stat().st_size == 0:
        return "empty"
    if isinstance(cause, UnidentifiedImageError):
        return "not an image"
    return "truncated" if "truncated" in str(cause).lower() else f"damaged: {cause}"


def whole_image(path: str, side: int) -> torch.Tensor:
    """Decode a small image, [3, side, side] uint8, as it lies in the decoded file.

    Raises:
        BadImageError: see `open_image`.
    """
    return _squared(open_image(path), side)


def _squared(image: Image.Image, side: int) -> torch.Tensor:
    if image.size != (side, side):  # a stray among images of one size
        image = TF.center_crop(TF.resize(image, [side]), [side, side])
    pixels: torch.Tensor = TF.pil_to_tensor(image)
    return pixels


class _Decoded(Dataset[tuple[torch.Tensor, str]]):
    """(pixels [3, side, side] uint8, problem or "") of each file; side 0 only finds problems."""

    def __init__(self, paths: Sequence[str], side: int) -> None:
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        blank = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
        try:
            image = open_image(self.paths[index])
        except BadImageError as error:
            return blank, describe(error)
        return _squared(image, self.side) if self.side else blank, ""


def _decode(
    paths: Sequence[str], side: int, workers: int, description: str
) -> Iterator[torch.Tensor]:
    """Yield batches of images in the order of `paths`, [n, 3, side, side] uint8; shows a bar.

    Raises:
        UserError: at the end, one for all the files that could not be decoded.
    """
    loader = DataLoader(
        _Decoded(paths, side),
        batch_size=BATCH,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )
    problems: list[str] = []
    with tqdm(total=len(paths), unit="images", desc=description, disable=None) as bar:
        for pixels, reasons in start_workers(loader):
            yield pixels
            problems.extend(reasons)
            bar.update(len(pixels))
    bad = [f"{path} ({why})" for path, why in zip(paths, problems, strict=True) if why]
    if bad:
        more = f", and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise UserError(
            f"{len(bad)} of {len(paths)} image files cannot be read; restore or delete: "
            f"{', '.join(bad[:MOST_NAMED])}{more}"
        )


def refuse_bad_images(
    met: BadImageError, root: Path, paths: Sequence[str], workers: int, processes: int
) -> NoReturn:
    """Raise one `UserError` for all the bad files of a dataset, after one of them was met.

    Only decoding every file tells which others are bad. Of several processes none can wait for
    that, and the one file is named.
    """
    if not any(map(os.path.exists, _sample(paths))):
        raise UserError(f"the images of {root} have gone: restore them, and --resume auto goes on")
    if processes > 1:
        path = str(met).rpartition("BadImageError: ")[2].strip()  # of a worker, after its traceback
        raise UserError(f"{path} cannot be read: restore or delete it")
    for _ in _decode(paths, 0, workers, "looking for bad images"):
        pass
    raise UserError("an image could not be read, but all can now: check the disk")


def _headers(paths: Sequence[str]) -> Iterator[tuple[tuple[int, int], str]]:
    """(width, height) and PIL's mode of a sample of files."""
    for path in _sample(paths):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                yield image.size, image.mode
        except Exception:
            continue  # decoding will name it


def small_side(paths: Sequence[str]) -> int | None:
    """The side of the images when they are small squares of one size, else None.

    Fewer than a tenth of a sample may have another size, so that a stray does not decide how all
    others are read.
    """
    sizes = Counter(size for size, _ in _headers(paths))
    if not sizes:
        return None
    (width, height), count = sizes.most_common(1)[0]
    is_common = count > 0.9 * sizes.total()
    return width if is_common and width == height <= SMALL else None


def deep_modes(paths: Sequence[str]) -> list[str]:
    """PIL's modes for more than 8 bits among a sample of the images, which are scaled to 8."""
    return sorted({mode for _, mode in _headers(paths) if _is_deep(mode)})


def decoded_images(root: Path, paths: Sequence[str], side: int, workers: int) -> torch.Tensor:
    """All images as one memory-mapped uint8 tensor [len(paths), 3, side, side].

    The first call decodes them into a file in `root`, or in the system's temporary folder when
    `root` is read-only; later calls only map it. The file's name has a fingerprint of the dataset
    (see `_fingerprint`), so that a change of any image makes a new file.

    Raises:
        UserError: image files that cannot be decoded, all in one message, or a full disk.
    """
    shape = (len(paths), 3, side, side)
    size = math.prod(shape)
    dataset = _fingerprint(root, paths, side)
    cache = beside = root / f".decoded-{dataset}.uint8"

    def is_whole() -> bool:
        return cache.is_file() and cache.stat().st_size == size

    if not (is_whole() or os.access(root, os.W_OK)):
        # All datasets share that folder, so the place counts as well.
        where = root.stat()
        place = _digest(str(root.resolve()), where.st_dev, where.st_ino)
        cache = Path(tempfile.gettempdir(), f".decoded-{place}-{dataset}.uint8")
    if not is_whole():
        print(f"=> decoding {len(paths)} images of {root} into {cache}, once", flush=True)
        with writing(cache) as unfinished, unfinished.open("wb") as output:
            for pixels in _decode(paths, side, workers, "decoding"):
                output.write(pixels.numpy().tobytes())
        for outdated in root.glob(".decoded-*.uint8") if cache is beside else ():
            if outdated != cache:
                outdated.unlink(missing_ok=True)
    # Not torch.from_file, which takes no name that is not UTF-8.
    with cache.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8).view(shape)


def _digest(*identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:24]


def _fingerprint(root: Path, paths: Sequence[str], side: int) -> str:
    """Of the images' names, sizes and times, and of the content of a sample of them.

    Copies and reproducible archives may set modification times, but nobody can set the time of a
    file's last change. A read-only image of a file system may have neither: hence the sample.
    """
    stamps: list[object] = []
    try:
        for path in paths:
            stat = os.stat(path)  # noqa: PTH116
            times = stat.st_mtime_ns, stat.st_ctime_ns
            stamps.append((os.path.relpath(path, root), stat.st_size, *times))
        stamps += [hashlib.sha256(Path(path).read_bytes()).digest() for path in _sample(paths)]
    except OSError:  # a link to nowhere or no permission, which decoding will name
        pass
    return _digest(DECODING, side, stamps)


def _sample(paths: Sequence[str]) -> Sequence[str]:
    """About PROBES of the files, evenly spread."""
    return paths[:: max(1, len(paths) // PROBES)]
