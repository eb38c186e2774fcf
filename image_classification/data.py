"""Image datasets in memory or in files, and batches of them on the training device.

Small images are decoded once (cache.py), then gathered and augmented a whole batch at a time.
Larger ones are decoded and cropped by worker processes in every epoch. Either way the sample
order follows from (seed, epoch) and a sample's augmentation from (seed, epoch, sample index), so
neither the number of processes nor a restart changes what a step trains on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from engine.cli import UserError
from engine.seeds import derive_seed, seed_generators
from engine.stop import has_temporary_folder, leave_signals_to_parent, start_workers
from image_classification.augment import (
    Crops,
    central_crops,
    crop_each,
    crop_image,
    draw_crops,
    fast_format,
    fit_crops,
    normalise,
    resize,
    resized_crop,
    resized_side,
    scale_crops,
)
from image_classification.cache import decode, decoded_images, deep_modes, open_image, small_side
from image_classification.folders import Split, find_images
from image_classification.settings import DEFAULT
from image_classification.sources import resolve

ORIGINAL_SIZE = 224  # pixels a side, at which the original and torchvision train


@dataclasses.dataclass
class DecodedImages:
    """Decoded images, in memory or memory-mapped.

    images: [n, 3, side, side], uint8. When there are fewer images than targets, they repeat:
        --dummy has 1.3 million samples in the memory of 512.
    targets: class indices, one a sample.
    paths: the images' files.
    sizes: [n, 2], heights and widths of larger images, of which `images` are scaled copies in
        channels-last order.
    """

    images: torch.Tensor
    targets: torch.Tensor
    paths: list[str]
    sizes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)


class ImageFiles(Dataset[Any]):
    """Image files of any size, which workers crop and resize to [size, size, 3] uint8.

    The channels come last, as decoders give them and convolutions like them (`fast_format`).
    With a sample's row of `draw_crops`, an image gets the original's RandomResizedCrop and
    RandomHorizontalFlip; without one, its Resize and CenterCrop with their ratio of 256 to 224.
    """

    def __init__(self, split: Split, size: int) -> None:
        # Bytes in one array. To read a string writes its reference count, so that each worker would
        # get a copy of all their memory.
        self._encoded = np.array([os.fsencode(path) for path in split.paths])
        self.targets = torch.tensor(split.targets)
        self.size = size

    @property
    def paths(self) -> list[str]:
        """The images' files; a new list each time."""
        return [os.fsdecode(path) for path in self._encoded]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: tuple[int, list[float] | None]) -> torch.Tensor:
        index, drawn = key
        path = os.fsdecode(self._encoded[index])
        if drawn is None:  # by PIL: its rounding is the original's
            image = TF.resize(open_image(path), [resized_side(self.size)])
            return torch.from_numpy(np.array(TF.center_crop(image, [self.size, self.size])))
        pixels = decode(path)
        crop = fit_crops(torch.tensor([drawn]), *pixels.shape[:2])
        box = [int(field) for field in crop[:4]]
        return crop_image(pixels, box, bool(crop.flip), self.size)


def _keys(drawn: torch.Tensor | None, rows: torch.Tensor) -> list[tuple[int, list[float] | None]]:
    """What `ImageFiles` takes, for each sample of a step."""
    crops = [None] * len(rows) if drawn is None else drawn[rows].tolist()
    return list(zip(rows.tolist(), crops, strict=True))


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


class ImageData(NamedTuple):
    root: Path
    classes: list[str]
    image_size: int  # side, in pixels, of the images that a model is to see
    train: DecodedImages | ImageFiles
    val: DecodedImages | ImageFiles
    notes: Sequence[str] = ()  # lines on what its owner may not expect
    decode_once: int = 0  # side of the copies that stand for larger images

    @property
    def whole_side(self) -> int | None:
        """Side of the images, where validation sees them whole; None for larger ones."""
        if isinstance(self.val, ImageFiles) or self.val.sizes is not None:
            return None
        return self.val.images.shape[-1]


def load_dataset(
    name: str, image_size: int | None, workers: int, download: bool, decode_once: int = 0
) -> ImageData:
    """Find or make the dataset that the argument DIR names; small images are decoded once.

    Args:
        image_size: None for weights that do not say what they were trained at: the original's
            size, unless the images are small.
        workers: processes that decode in here, at most one a CPU.
        decode_once: pixels a side, to which images that are no small squares are decoded, once.

    Raises:
        UserError: see `resolve`, `find_images` and `decoded_images`.
    """
    if workers and not has_temporary_folder():
        raise UserError(
            "worker processes need a temporary folder: TMPDIR=/a/folder names one, -j 0 has none"
        )
    root, classes, train, val, notes = find_images(resolve(name, download))
    if deep := deep_modes(train.paths + val.paths):
        notes.append(f"=> {root}: pixels of more than 8 bits ({', '.join(deep)}) are scaled to 8")
    # One cache holds both splits, so they need the same side.
    sides = {small_side(train.paths), small_side(val.paths)}
    side = sides.pop() if len(sides) == 1 else None
    if image_size is None:
        image_size = ORIGINAL_SIZE if side is None else DEFAULT.image_size
    if side is None and not decode_once:
        train_files, val_files = ImageFiles(train, image_size), ImageFiles(val, image_size)
        return ImageData(root, classes, image_size, train_files, val_files, notes)
    paths, processes = train.paths + val.paths, min(workers, os.cpu_count() or 1)
    images, sizes = decoded_images(root, paths, side or decode_once, processes, side is None)
    parts = [len(train.paths), len(val.paths)]
    train_images, val_images = (
        DecodedImages(pixels, torch.tensor(targets), files, own if side is None else None)
        for pixels, own, (files, targets) in zip(
            images.split(parts), sizes.split(parts), (train, val), strict=True
        )
    )
    decode_once = decode_once if side is None else 0
    return ImageData(root, classes, image_size, train_images, val_images, notes, decode_once)


def find_data(accelerator: Accelerator, args: argparse.Namespace) -> ImageData:
    """The dataset of a command's flags, found, made or decoded by each node's first process.

    Settles `args.image_size` where the weights do not say it, and `args.decode_once` where the
    images have no need of it.
    """
    if args.dummy:
        accelerator.print("=> Dummy data is used!")
        args.image_size, args.decode_once = args.image_size or ORIGINAL_SIZE, 0
        return dummy_dataset(args.image_size)
    with accelerator.local_main_process_first():
        data = load_dataset(
            args.data, args.image_size, args.workers, args.download, args.decode_once
        )
    if args.image_size is None:
        args.image_size = data.image_size
        accelerator.print(
            f"=> the weights do not say for which size of images they are: {data.image_size} px, "
            "as is usual for images like these; --image-size chooses another"
        )
    how = "decoded by workers" if isinstance(data.train, ImageFiles) else "decoded in memory"
    if data.decode_once:
        how += f" as {args.decode_once} x {args.decode_once}"
    elif args.decode_once:
        accelerator.print("=> small squares are always decoded once: --decode-once has no effect")
    if 0 < data.decode_once < data.image_size:
        accelerator.print(
            f"=> --decode-once {args.decode_once} is less than --image-size {data.image_size}: "
            "even whole images are enlarged"
        )
    args.decode_once = data.decode_once
    accelerator.print(
        f"=> {data.root}: {len(data.train)} training and {len(data.val)} "
        f"validation images of {len(data.classes)} classes, {how}",
        *data.notes,
        sep="\n",
    )
    return data


def move_to_gpu(accelerator: Accelerator, *loaders: ImageLoader) -> None:
    """Put decoded images on the GPU, where half of the memory that is left there is enough.

    To be called after an epoch: what its steps and its validation need is not left any more.
    """
    device, splits = accelerator.device, [loader.images for loader in loaders]
    decoded = [images for images in splits if isinstance(images, DecodedImages)]
    if device.type != "cuda" or len(decoded) < len(splits):
        return
    size = sum(images.images.nbytes for images in decoded)
    # A CUDA graph that was dropped for a shorter batch takes its memory again.
    again = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    left = torch.cuda.mem_get_info(device)[0] - again
    moved = []
    with contextlib.suppress(torch.OutOfMemoryError):  # another program was faster
        if 2 * size <= left:
            moved = [images.images.to(device) for images in decoded]
    if not moved:
        accelerator.print(
            f"=> the images stay in main memory: they take {size / 2**20:.0f} MiB, and the GPU has "
            f"{left / 2**20:.0f} MiB left"
        )
        return
    for loader, images, tensor in zip(loaders, decoded, moved, strict=True):
        loader.images = dataclasses.replace(images, images=tensor)
    accelerator.print(f"=> the images lie on the GPU: {size / 2**20:.0f} MiB")


def identity(
    images: DecodedImages | ImageFiles, data: ImageData, seen_at: int | None = None
) -> str:
    """Tells the images of a split from others, by their names and classes.

    Args:
        seen_at: side in pixels, for figures that are measured on them. Then the files' sizes count
            as well.
    """
    root = str(data.root)
    names: list[object] = [path.removeprefix(root) for path in images.paths]
    if seen_at is not None:
        names += [os.path.getsize(path) for path in images.paths]  # noqa: PTH202
    parts = [names, images.targets.tolist(), data.classes, seen_at]
    parts += [data.decode_once] * (data.decode_once > 0)
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:24]


def dummy_dataset(image_size: int) -> ImageData:
    """The original's --dummy: noise in ImageNet's numbers of images and classes, no disk."""
    generator = torch.Generator().manual_seed(0)
    shape = (512, 3, image_size, image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    train, val = (
        DecodedImages(pixels, torch.randint(1000, (count,), generator=generator), [])
        for count in (1_281_167, 50_000)
    )
    classes = [f"class{i}" for i in range(1000)]
    return ImageData(Path("dummy"), classes, image_size, train, val)


class Batch(NamedTuple):
    """This process's share of a global batch, on the training device.

    In training it consists of equal parts, one after the other, which are computed one by one.

    images: [b, 3, size, size], normalised, in `fast_format`.
    targets: [b], class indices.
    soft_targets: [b, classes] when images were mixed, else None.
    weights: [b], 1 for a sample and 0 for padding. The last global batch of an epoch is padded
        where it cannot be divided, so that all parts are equal.
    indices: [b], on the CPU, of the samples in their split.
    size: samples in the global batch.
    """

    images: torch.Tensor
    targets: torch.Tensor
    soft_targets: torch.Tensor | None
    weights: torch.Tensor
    indices: torch.Tensor
    size: int


class ImageLoader:
    """Batches of one split for one process.

    Args:
        images: the samples of the split.
        batch_size: of the global batch, over all processes.
        image_size: side, in pixels, of the images delivered.
        seed: of sample order and augmentation.
        train: shuffle, augment, and give every process a slice of each global batch. Otherwise
            batches in file order go whole to the processes in turn, so that every bit of a
            batch's result is the same on any number of processes.
        workers: processes of this node that decode, for ImageFiles.
        rows: the samples to deliver when not training, in their order; all by default.
        mix: maps images and targets to mixed images and soft targets (CutMix, MixUp).
        parts: into which each process cuts its share of a global batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: DecodedImages | ImageFiles,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        train: bool,
        workers: int,
        mix: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
        rows: torch.Tensor | None = None,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.images, self.targets = images, images.targets
        self.batch_size, self.image_size = batch_size, image_size
        self.seed, self.train, self.mix = seed, train, mix
        self.rows = torch.arange(len(self.targets)) if rows is None else rows
        self.device = accelerator.device
        # Only memory that is pinned may be copied from while the next batch is being made.
        self.pins = self.device.type == "cuda"
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        # As in the original, -j counts the workers of all of a node's processes.
        share = -(-workers // get_int_from_env(["LOCAL_WORLD_SIZE"], 1))
        self.workers = min(share, os.cpu_count() or 1)

    def __len__(self) -> int:
        """Global batches an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the epoch's global batches from number `start` on.

        In training a slice of each; in evaluation every `world_size`-th batch, whole.
        """
        if self.train:
            generator = _generator("order", self.seed, epoch)
            order = torch.randperm(len(self.targets), generator=generator)
            batches = order.split(self.batch_size)[start:]
            slices = [self._slice(batch) for batch in batches]
        else:
            batches = self.rows.split(self.batch_size)[start:][self.rank :: self.world_size]
            slices = [(batch, torch.ones(len(batch))) for batch in batches]
        if not slices:
            return
        rows = [own for own, _ in slices]
        columns = (
            self._pixels(epoch, rows),
            self._spread(self.targets, rows),
            self._split(torch.cat([is_real for _, is_real in slices]), rows),
            rows,
            map(len, batches),
        )
        for step, (images, targets, weights, own, size) in enumerate(
            zip(*columns, strict=True), start
        ):
            batch = Batch(normalise(images), targets, None, weights, own, size)
            yield batch if self.mix is None else self._mixed(batch, epoch, step)

    def _mixed(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Mix each part, and drop the sample that was put in front of it."""
        mixed = []
        tensors = (batch.images, batch.targets, batch.weights, batch.indices)
        for images, targets, *others in zip(*(t.chunk(self.parts) for t in tensors), strict=True):
            # All parts draw the same partners and the same mixing ratio.
            seed_generators(self.device, "mix", self.seed, epoch, step)
            assert self.mix is not None
            pixels, soft_targets = self.mix(images, targets)
            mixed.append([t[1:] for t in (pixels, targets, soft_targets, *others)])
        images, targets, soft_targets, weights, indices = map(torch.cat, zip(*mixed, strict=True))
        images = images.contiguous(memory_format=fast_format(self.device))
        return Batch(images, targets, soft_targets, weights, indices, batch.size)

    def _spread(self, values: torch.Tensor, steps: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`values` [n] of the samples of each step, on the device: one copy for all steps."""
        return self._split(values[torch.cat(steps)], steps)

    def _split(self, values: torch.Tensor, steps: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        parts: Sequence[torch.Tensor] = values.to(self.device).split([len(rows) for rows in steps])
        return parts

    def _pixels(self, epoch: int, steps: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """[b, 3, size, size], float32 from 0 to 255, of the samples of each step."""
        drawn = None
        if self.train:
            # The whole epoch's crops in one draw: a generator for each sample is slow.
            generator = _generator("augmentation", self.seed, epoch)
            drawn = draw_crops(len(self.targets), generator)
        if isinstance(self.images, ImageFiles):
            # Workers live for an epoch: training's are gone when validation starts its own.
            loader = DataLoader(
                self.images,
                batch_sampler=map(functools.partial(_keys, drawn), steps),
                num_workers=self.workers,
                worker_init_fn=leave_signals_to_parent,
                pin_memory=self.pins,
            )
            for pixels in start_workers(loader):
                here = pixels.to(self.device, non_blocking=self.pins)
                yield here.permute(0, 3, 1, 2).float()
            return
        images = self.images.images
        is_here = images.device.type == self.device.type
        places = torch.arange(len(self.targets)) % len(images)
        own_places = self._spread(places, steps) if is_here else [places[rows] for rows in steps]
        own_crops: Iterable[Crops | None] = [None] * len(steps)
        crops = self._crops(self.images, drawn, torch.cat(steps))
        del drawn  # 118 MB for ImageNet
        if crops is not None:
            own_crops = map(Crops, *(self._split(field, steps) for field in crops))
        for rows, crop in zip(own_places, own_crops, strict=True):
            if crop is not None and self.images.sizes is not None and self.device.type == "cpu":
                yield crop_each(images, rows, crop, self.image_size)
                continue
            pixels = images[rows]
            if not is_here:
                pixels = pixels.pin_memory() if self.pins else pixels
                pixels = pixels.to(self.device, non_blocking=self.pins)
            yield (
                resize(pixels, self.image_size)
                if crop is None
                else resized_crop(pixels, crop, self.image_size)
            )

    def _crops(
        self, decoded: DecodedImages, drawn: torch.Tensor | None, rows: torch.Tensor
    ) -> Crops | None:
        """The regions of `rows` that are to be seen, in pixels of `decoded.images`; None for all.

        Args:
            drawn: see `draw_crops`; None for validation.
        """
        side = decoded.images.shape[-1]
        if decoded.sizes is None:
            return None if drawn is None else fit_crops(drawn[rows], side, side)
        height, width = decoded.sizes[rows].T
        if drawn is None:
            crops = central_crops(height, width, self.image_size)
        else:
            crops = fit_crops(drawn[rows], height, width)
        return scale_crops(crops, height, width, side)

    def _slice(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's samples of a global batch, padded so that all parts are equally long.

        Batch normalisation cannot train on one sample, so a part has at least two unless the
        batch size allows only one. Mixing blends each sample with the one before it in the global
        batch: with `mix`, that sample is put in front of a part, and dropped after mixing.

        Returns:
            The samples' indices, and 1 where they are no padding, else 0.
        """
        count = self.world_size * self.parts
        share = -(-len(batch) // count)
        length = max(share, min(2, self.batch_size // count))
        own = torch.arange(self.parts) + self.rank * self.parts
        places = torch.arange(-(self.mix is not None), length)
        positions = own[:, None] * share + places
        is_real = (places < share) & (positions < len(batch))
        return batch[positions.flatten() % len(batch)], is_real.flatten().float()
