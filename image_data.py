"""Image datasets: finding their files, and batches of them on the training device.

A dataset of small images is decoded once (image_cache.py) and its batches are gathered by index
and augmented on the device; larger images go through worker processes. Either way the order of
an epoch follows from (seed, epoch) and a sample's augmentation from (seed, epoch, sample index),
so neither the number of processes nor a restart changes what a step trains on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF

import image_augment
import image_cache
import image_sources
from image_augment import Crops
from image_cache import open_image
from runtime import UserError, derive_seed, leave_signals_to_parent


class Split(NamedTuple):
    """Image files of a training or validation set, in the order of their indices."""

    paths: list[str]
    targets: list[int]  # positions in ImageFolders.classes
    stamps: list[tuple[int, int]]  # size in bytes and modification time in ns


class ImageFolders(NamedTuple):
    root: Path
    classes: list[str]  # sorted, so Tiny-ImageNet's class 0 is n01443537
    train: Split
    val: Split


def find_images(root: Path) -> ImageFolders:
    """List the images of a dataset in one of three layouts.

    - Tiny-ImageNet's own: train/<wnid>/images/*, val/images/* and val/val_annotations.txt
    - the same with the validation images sorted: val/<wnid>/images/*
    - plain folders, as the original's: train/<class>/*, val/<class>/*

    Raises:
        UserError: a missing folder or file, a class without images, a validation class or an
            annotation that training knows nothing of.
    """
    try:
        return _find_images(root)
    except OSError as error:
        raise UserError(f"dataset {root}: {error.filename}: {error.strerror}") from error


def _find_images(root: Path) -> ImageFolders:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"dataset {root}: {what}")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            inside = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
            raise UserError(f"dataset {root}: has no folder {part}/ (it holds {inside})")
    classes = sorted(_folders(root / "train"))
    if not classes:
        raise UserError(f"dataset {root}: train/ holds no class folders")
    train = _list_classes(root / "train", classes, classes)

    annotations, flat = root / "val" / "val_annotations.txt", root / "val" / "images"
    # Scripts that sort the validation images often leave an empty val/images behind.
    if "images" not in classes and flat.is_dir() and _list_files(flat):
        if not annotations.is_file():
            raise UserError(f"{annotations}: missing, and with it the classes of {flat}")
        return ImageFolders(root, classes, train, _list_annotated(annotations, classes))
    val_classes = sorted(set(_folders(root / "val")) - ({"images"} - set(classes)))
    if not val_classes:
        raise UserError(
            f"dataset {root}: val/ holds neither class folders nor images/ with val_annotations.txt"
        )
    if unknown := sorted(set(val_classes) - set(classes)):
        raise UserError(
            f"dataset {root}: val/ has {len(unknown)} class(es) that train/ lacks: "
            f"{', '.join(unknown[:5])}"
        )
    return ImageFolders(root, classes, train, _list_classes(root / "val", val_classes, classes))


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of each image file of `folder`, by name, sorted."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith("."):
                try:
                    stat = entry.stat()
                    found[entry.name] = (stat.st_size, stat.st_mtime_ns)
                except OSError:  # a link to nowhere; decoding will name it
                    found[entry.name] = (0, 0)
    return dict(sorted(found.items()))


def _list_classes(folder: Path, names: list[str], classes: list[str]) -> Split:
    split = Split([], [], [])
    position = {name: i for i, name in enumerate(classes)}
    for name in names:
        images = folder / name / "images"
        images = images if images.is_dir() else folder / name
        files = _list_files(images)
        if not files:
            raise UserError(f"{images}: holds no images ({', '.join(IMG_EXTENSIONS)})")
        split.paths.extend(f"{images}/{file}" for file in files)
        split.targets.extend([position[name]] * len(files))
        split.stamps.extend(files.values())
    return split


def _list_annotated(annotations: Path, classes: list[str]) -> Split:
    """Tiny-ImageNet's validation images: a line has name, wnid and a box, split by tabs."""
    images = annotations.parent / "images"
    files = _list_files(images)
    position = {wnid: i for i, wnid in enumerate(classes)}
    targets: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        name, wnid, *_ = [*line.split("\t"), ""]
        where = f"{annotations} line {number}"
        if name not in files:
            raise UserError(f"{where}: {images / name} does not exist")
        if wnid not in position:
            raise UserError(f"{where}: class {wnid or '(none)'} is not in train/")
        if name in targets:
            raise UserError(f"{where}: {name} is annotated twice")
        targets[name] = position[wnid]
    if not targets:
        raise UserError(f"{annotations}: annotates no image")
    if unlabelled := sorted(set(files) - set(targets)):
        raise UserError(
            f"{annotations}: {len(unlabelled)} image(s) of {images} have no line: "
            f"{', '.join(unlabelled[:5])}"
        )
    # Tiny-ImageNet numbers its files without leading zeros: sort by name as everywhere.
    names = sorted(targets)
    return Split(
        [f"{images}/{name}" for name in names],
        [targets[name] for name in names],
        [files[name] for name in names],
    )


class DecodedImages(Dataset[Any]):
    """Small images in memory or memory-mapped; batches are gathered whole.

    Args:
        images: [n, 3, side, side], uint8. Fewer images than targets are repeated, which is how
            --dummy has 1.3 million of them without the memory.
        targets: the class index of each.
        paths: their files.
    """

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, paths: list[str]) -> None:
        self.images, self.targets, self.paths = images, targets, paths

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor:
        rows = torch.tensor([index for _, index in keys]) % len(self.images)
        return self.images[rows]


class ImageFiles(Dataset[Any]):
    """Image files of any size, cropped and resized to uint8 [3, size, size] in workers.

    Training crops as the original's RandomResizedCrop, evaluation as its Resize and CenterCrop
    with their ratio of 256 to 224.
    """

    def __init__(self, split: Split, size: int, seed: int, train: bool) -> None:
        self.paths, self.targets = split.paths, torch.tensor(split.targets)
        self.size, self.seed, self.train = size, seed, train

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        image = open_image(self.paths[index])
        if self.train:
            seed = derive_seed("augmentation", self.seed, epoch, index)
            generator = torch.Generator().manual_seed(seed)
            crop = image_augment.draw_crops(1, image.height, image.width, generator)
            box = [int(field[0]) for field in crop[:4]]
            image = TF.resized_crop(image, *box, [self.size, self.size], antialias=True)
            if crop.flip[0]:
                image = TF.horizontal_flip(image)
        else:
            image = TF.resize(image, [round(self.size * 256 / 224)], antialias=True)
            image = TF.center_crop(image, [self.size, self.size])
        pixels: torch.Tensor = TF.pil_to_tensor(image)
        return pixels


class ImageData(NamedTuple):
    root: Path
    classes: list[str]
    train: DecodedImages | ImageFiles
    val: DecodedImages | ImageFiles


def load(name: str, image_size: int, seed: int, workers: int, download: bool) -> ImageData:
    """Find or make the dataset that the argument DIR names; small images are decoded once.

    Raises:
        UserError: see `image_sources.resolve`, `find_images` and `decoded_images`.
    """
    folders = find_images(image_sources.resolve(name, download))
    root, classes, train, val = folders
    workers = min(workers, os.cpu_count() or 1)
    # Of both, as both go into one cache or none.
    sides = {image_cache.small_side(split.paths) for split in (train, val)}
    side = sides.pop() if len(sides) == 1 else None
    if side is None:
        return ImageData(
            root,
            classes,
            ImageFiles(train, image_size, seed, train=True),
            ImageFiles(val, image_size, seed, train=False),
        )
    stamps = train.stamps + val.stamps
    images = image_cache.decoded_images(root, train.paths + val.paths, stamps, side, workers)
    first, rest = images.split([len(train.paths), len(val.paths)])
    return ImageData(
        root,
        classes,
        DecodedImages(first, torch.tensor(train.targets), train.paths),
        DecodedImages(rest, torch.tensor(val.targets), val.paths),
    )


def dummy(image_size: int) -> ImageData:
    """The original's --dummy, ImageNet's counts of noise: no disk, and nothing to learn."""
    generator = torch.Generator().manual_seed(0)
    shape = (512, 3, image_size, image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    train, val = (
        DecodedImages(pixels, torch.randint(1000, (count,), generator=generator), [])
        for count in (1_281_167, 50_000)
    )
    return ImageData(Path("dummy"), [f"class{i}" for i in range(1000)], train, val)


class Batch(NamedTuple):
    """This process's slice of a global batch, on the training device.

    images: [b, 3, size, size], normalised, channels_last.
    targets: [b], class indices.
    soft_targets: [b, classes] when images were mixed, else None.
    weights: [b], 1 for a sample and 0 for padding, which is there so that every process has an
        equal slice when the last global batch of an epoch cannot be divided.
    indices: [b], on the CPU, of the samples in their split.
    size: samples in the global batch.
    """

    images: torch.Tensor
    targets: torch.Tensor
    soft_targets: torch.Tensor | None
    weights: torch.Tensor
    indices: torch.Tensor
    size: int


class _EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batch sampler of a DataLoader that lives for the whole run."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ImageLoader:
    """Batches of one split for one process.

    Args:
        images: the samples of the split.
        batch_size: of the global batch, over all processes.
        image_size: side of the images delivered.
        seed: of sample order and augmentation.
        train: shuffle, augment, and slice every global batch over the processes; otherwise
            whole batches in file order go to the processes in turn, so that a batch, and with
            it every bit of its result, is the same on any number of processes.
        workers: processes of this node that decode, for ImageFiles.
        rows: the samples to deliver when not training, in their order; all by default.
        mix: maps images and targets to mixed images and soft targets (CutMix, MixUp).
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
    ) -> None:
        self.images, self.targets = images, images.targets
        self.batch_size, self.image_size = batch_size, image_size
        self.seed, self.train, self.mix = seed, train, mix
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.sampler = _EpochBatches()
        decoded = isinstance(images, DecodedImages)
        # The original's -j is for all processes of a node, too.
        workers = -(-workers // get_int_from_env(["LOCAL_WORLD_SIZE"], 1))
        self.loader = DataLoader(
            images,
            batch_sampler=self.sampler,
            collate_fn=_identity if decoded else torch.stack,  # type: ignore[arg-type]
            num_workers=0 if decoded else min(workers, os.cpu_count() or 1),
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=not decoded and workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def __len__(self) -> int:
        """Global batches an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> torch.Tensor:
        """Sample indices in the order of `epoch`."""
        if not self.train:
            return self.rows
        seed = derive_seed("order", self.seed, epoch)
        return torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of the epoch's global batches from number `start` on.

        In training a slice of each; in evaluation every `world_size`-th batch, whole.
        """
        batches = list(self.order(epoch).split(self.batch_size))[start:]
        if self.train:
            slices = [(*self._slice(batch), len(batch)) for batch in batches]
        else:
            own = batches[self.rank :: self.world_size]
            slices = [(batch, len(batch), len(batch)) for batch in own]
        self.sampler.batches = [[(epoch, i) for i in rows.tolist()] for rows, _, _ in slices]
        crops = self._crops(epoch)
        for step, (pixels, (rows, real, size)) in enumerate(
            zip(self.loader, slices, strict=True), start
        ):
            images = self._finish(pixels.to(self.device, non_blocking=True), crops, rows)
            targets = self.targets[rows].to(self.device, non_blocking=True)
            soft_targets = None
            if self.mix is not None:
                # The same on every process: partners and mixing ratio belong to the global batch.
                torch.manual_seed(derive_seed("mix", self.seed, epoch, step))
                images, soft_targets = self.mix(images, targets)
                images = images[1:].contiguous(memory_format=torch.channels_last)
                targets, soft_targets, rows = targets[1:], soft_targets[1:], rows[1:]
            weights = (torch.arange(len(rows), device=self.device) < real).float()
            yield Batch(images, targets, soft_targets, weights, rows, size)

    def _slice(self, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This process's samples of a global batch, padded to the length of everybody's slice.

        Returns the rows and how many of them are real. A slice has two samples at least where
        others have: batch normalisation cannot train on one. Mixing blends each sample with the
        one before it in the global batch, so with it that one comes first, to be dropped later.
        """
        share = -(-len(batch) // self.world_size)
        first = self.rank * share
        real = max(0, min(share, len(batch) - first))
        length = max(share, min(2, self.batch_size // self.world_size))
        positions = torch.arange(first - (self.mix is not None), first + length)
        return batch[positions % len(batch)], real

    def _crops(self, epoch: int) -> Crops | None:
        """The crops of all samples of an epoch, drawn at once: no generator a sample."""
        if not (self.train and isinstance(self.images, DecodedImages)):
            return None
        seed = derive_seed("augmentation", self.seed, epoch)
        side = self.images.images.shape[-1]
        generator = torch.Generator().manual_seed(seed)
        return image_augment.draw_crops(len(self.images), side, side, generator)

    def _finish(
        self, pixels: torch.Tensor, crops: Crops | None, rows: torch.Tensor
    ) -> torch.Tensor:
        if crops is not None:
            mine = Crops(*(f[rows].to(self.device, non_blocking=True) for f in crops))
            return image_augment.normalise(
                image_augment.resized_crop(pixels, mine, self.image_size)
            )
        return image_augment.normalise(image_augment.resize(pixels, self.image_size))


def _identity(batch: torch.Tensor) -> torch.Tensor:
    return batch
