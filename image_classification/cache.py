"""Images, decoded once into a memory-mapped file that all processes of a node share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from engine.cli import UserError
from engine.files import lock
from engine.stop import leave_signals_to_parent, start_workers
from image_classification.augment import crop_image

SMALL = 128  # pixels a side; larger images are decoded by worker processes in every epoch
PROBES = 64  # files whose headers tell whether a dataset's images are small
# Images at once; all workers' batches fit the 64 MB of shared memory that containers have.
BATCH, BATCH_BYTES = 64, 64 * 3 * SMALL**2
SIZES = np.dtype((np.int32, 2))  # an image's height and width
FLUSH_EVERY = 10  # seconds of decoding that an interruption can cost
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
    """`open_image` as pixels, [height, width, 3] uint8.

    JPEGs by torchvision: the same pixels as PIL's, sooner. It leaves EXIF's rotation alone as well.
    """
    try:
        # Deprecated since torchvision 0.29: from the version without it on, PIL decodes all.
        from torchvision.io import decode_jpeg

        content = np.fromfile(path, np.uint8)
        if content[: len(JPEG)].tobytes() == JPEG:
            pixels: torch.Tensor = decode_jpeg(torch.from_numpy(content))
            if len(pixels) in (1, 3):  # no CMYK
                return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    except (ImportError, OSError, RuntimeError):
        pass  # PIL says what is wrong with it
    return torch.from_numpy(np.array(open_image(path)))


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


def _scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """An image of any size, [h, w, 3], as [side, side, 3], both of its sides scaled."""
    height, width, _ = pixels.shape
    if height == width == side:
        return pixels
    return crop_image(pixels, (0, 0, height, width), flip=False, size=side).contiguous()


class _Decoded(Dataset[tuple[torch.Tensor, torch.Tensor, str]]):
    """Pixels, the image's own height and width, and what is wrong with the file, or "".

    Args:
        side: of the pixels; 0 only finds problems.
        scaled: images of any size, as [side, side, 3] uint8, else squares, as [3, side, side].
    """

    def __init__(self, paths: Sequence[str], side: int, scaled: bool) -> None:
        self.paths, self.side, self.scaled = paths, side, scaled

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        path, side = self.paths[index], self.side
        try:
            if self.scaled:
                whole = decode(path)
                return _scaled(whole, side), torch.tensor(whole.shape[:2], dtype=torch.int32), ""
            image = open_image(path)
            size = torch.tensor([image.height, image.width], dtype=torch.int32)
            return _squared(image, side) if side else size, size, ""
        except BadImageError as error:
            shape = (side, side, 3) if self.scaled else (3, side, side) if side else (2,)
            nothing = torch.zeros(shape, dtype=torch.uint8 if side else torch.int32)
            return nothing, torch.zeros(2, dtype=torch.int32), describe(error)
        except OSError as error:  # `NOT_THE_FILES`, and not the disk with the decoded file either
            raise RuntimeError(f"{path}: {error}") from error


def _decode(
    decoded: _Decoded, workers: int, description: str, bad: list[str], done: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of pixels and sizes in the order of the files; shows a bar.

    Args:
        bad: is given what cannot be decoded, each with the reason. Its pixels and size are zeros.
        done: images of an earlier call, for the bar.
    """
    total, row = len(decoded), 3 * decoded.side**2
    loader = DataLoader(
        decoded,
        batch_size=BATCH if row * BATCH <= BATCH_BYTES else max(1, BATCH_BYTES // row),
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )
    seen = 0
    bar = tqdm(total=done + total, initial=done, unit="images", desc=description, disable=None)
    with bar:
        for pixels, sizes, reasons in start_workers(loader):
            yield pixels, sizes
            paths = decoded.paths[seen : seen + len(reasons)]
            bad += [f"{path} ({why})" for path, why in zip(paths, reasons, strict=True) if why]
            seen += len(reasons)
            bar.update(len(reasons))


def _bad_files(bad: Sequence[str], total: int) -> UserError:
    more = f", and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return UserError(
        f"{len(bad)} of {total} image files cannot be read; restore or delete: "
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
    bad: list[str] = []
    for _ in _decode(_Decoded(paths, 0, scaled=False), workers, "looking for bad images", bad):
        pass
    if bad:
        raise _bad_files(bad, len(paths))
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


def decoded_images(
    root: Path, paths: Sequence[str], side: int, workers: int, scaled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """All images as one memory-mapped uint8 tensor [n, 3, side, side], and their own sizes.

    The first call decodes them into a file in `root`, or in the system's temporary folder when
    `root` is read-only; later calls only map it. The file's name has a fingerprint of the dataset
    (see `_fingerprint`), so that a change of any image makes a new file.

    Args:
        scaled: images of any size, both sides scaled; in channels-last order. Else small squares.

    Returns:
        The images, and [n, 2] int32, the heights and widths that they had.

    Raises:
        UserError: image files that cannot be decoded, all in one message, or a full disk.
    """
    kind = f"{side}px-" if scaled else ""
    dataset = _fingerprint(root, paths, side)
    cache = root / f".decoded-{kind}{dataset}.uint8"
    pixels = len(paths) * 3 * side**2
    size = pixels + len(paths) * SIZES.itemsize

    def is_whole() -> bool:
        return cache.is_file() and cache.stat().st_size == size

    if not (is_whole() or os.access(root, os.W_OK)):
        # All datasets share that folder, so the place counts as well.
        where = root.stat()
        place = _digest(str(root.resolve()), where.st_dev, where.st_ino)
        cache = Path(tempfile.gettempdir(), f".decoded-{place}-{kind}{dataset}.uint8")
    unfinished = cache.with_suffix(".unfinished")
    others = cache.name.replace(dataset, "?" * len(dataset))
    if not is_whole():
        try:
            with _alone(cache.with_suffix(".lock")):
                if not is_whole():
                    _remove_others(unfinished, others)
                    _write(unfinished, _Decoded(paths, side, scaled), workers)
                if is_whole():  # a process whose lock is not seen here was faster
                    unfinished.unlink(missing_ok=True)
                else:
                    unfinished.replace(cache)
                    _remove_others(cache, others)
        except OSError as error:
            raise UserError(
                f"cannot write {cache}: {error.strerror or error}; make room, and decoding goes on "
                f"where it was, or delete {unfinished}"
            ) from error
    # Not torch.from_file, which takes no name that is not UTF-8. Read-only: Linux refuses a
    # writable map that is larger than the memory of the machine.
    with cache.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    with warnings.catch_warnings(action="ignore"):  # torch knows no read-only tensors
        images = torch.frombuffer(mapped, dtype=torch.uint8, count=pixels)
    shape = (len(paths), side, side, 3) if scaled else (len(paths), 3, side, side)
    images = images.view(shape).permute(0, 3, 1, 2) if scaled else images.view(shape)
    sizes = np.frombuffer(bytearray(mapped[pixels:]), np.int32).reshape(-1, 2)
    return images, torch.from_numpy(sizes)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process, of this node or another, is within it with this `path`."""
    try:
        held = lock(path, "", patience=0)
    except UserError:
        print("=> another process decodes the images: waiting for it", flush=True)
        held = lock(path, "", patience=math.inf)
        path.touch()  # a change of the folder: NFS then looks anew whether the file is there
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        if held is not None:
            held.close()


def _remove_others(path: Path, names: str) -> None:
    """Remove what was decoded of images that have changed since: `names` with `path`'s ending."""
    for other in path.parent.glob(Path(names).with_suffix(path.suffix).name):
        if other != path:
            other.unlink(missing_ok=True)


def _write(path: Path, decoded: _Decoded, workers: int) -> None:
    """Decode into the file at `path`, or go on with what an interrupted call has left there.

    All images' pixels lie there in a row, and then all sizes (`SIZES`). An image's size is written
    when its pixels are on the disk, so it tells which images need no more decoding. Two processes
    that do not see each other's lock write the same.

    Raises:
        UserError: files that cannot be decoded, or a disk with too little room.
        OSError: of writing.
    """
    paths, row = decoded.paths, 3 * decoded.side**2
    pixels_end = len(paths) * row
    sizes = np.zeros((len(paths), 2), np.int32)
    if path.exists() and path.stat().st_size == pixels_end + sizes.nbytes:
        sizes = np.fromfile(path, np.int32, offset=pixels_end).reshape(-1, 2)
    missing = np.flatnonzero(sizes[:, 0] == 0).tolist()
    needed, free = len(missing) * row, shutil.disk_usage(path.parent).free
    done = len(paths) - len(missing)
    there = f"; {done} are there" if done else ""
    print(
        f"=> decoding {len(paths)} images into {path.with_suffix('.uint8')}, once "
        f"({_amount(needed)} of {_amount(free)} that are free{there})",
        flush=True,
    )
    if needed > free:
        raise UserError(f"{path.parent} has no room for {_amount(needed)} of decoded images")
    bad: list[str] = []
    rest = _Decoded([paths[i] for i in missing], decoded.side, decoded.scaled)
    path.touch()
    with path.open("r+b") as file:
        file.truncate(pixels_end + sizes.nbytes)
        first = next_row = 0  # positions in `missing`: those between are written, but not flushed

        def flush() -> None:
            nonlocal first
            if first < next_row:
                start, end = missing[first], missing[next_row - 1] + 1
                # A disk reports a failure once: after one, the next `fsync` succeeds, and must not
                # vouch for these images.
                first = next_row
                _to_disk(file)
                file.seek(pixels_end + start * SIZES.itemsize)
                file.write(sizes[start:end].tobytes())

        flushed = time.monotonic()
        try:
            for pixels, own in _decode(rest, workers, "decoding", bad, done):
                for image, size in zip(pixels.numpy(), own.numpy(), strict=True):
                    index = missing[next_row]
                    file.seek(index * row)
                    file.write(image.tobytes())
                    sizes[index] = size
                    next_row += 1
                if time.monotonic() - flushed > FLUSH_EVERY:
                    flush()
                    flushed = time.monotonic()
        finally:
            flush()
        _to_disk(file)  # the last sizes: its name will say that the file is whole
    if bad:
        path.unlink(missing_ok=True)
        raise _bad_files(bad, len(paths))


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _digest(*identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:24]


def _fingerprint(root: Path, paths: Sequence[str], side: int) -> str:
    """Of the images' names, sizes and times, and of the content of a sample of them.

    Copies and reproducible archives may set modification times, but nobody can set the time of a
    file's last change. A read-only image of a file system may have neither: hence the sample.
    """
    known = hashlib.sha256(repr((DECODING, side)).encode())
    try:
        for path in paths:
            stat = os.stat(path)  # noqa: PTH116
            name = path.removeprefix(str(root))
            known.update(repr((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
        for path in _sample(paths):
            known.update(hashlib.sha256(Path(path).read_bytes()).digest())
    except OSError:  # a link to nowhere or no permission, which decoding will name
        pass
    return known.hexdigest()[:24]


def _sample(paths: Sequence[str]) -> Sequence[str]:
    """About PROBES of the files, evenly spread."""
    return paths[:: max(1, len(paths) // PROBES)]
