"""The layouts in which image datasets come: their files, and the class of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file, make_dataset

from engine.cli import UserError

# What neither a class nor an image begins with: .ipynb_checkpoints, macOS's ._*, Synology's @eaDir.
HIDDEN = (".", "@eaDir")


class Split(NamedTuple):
    """The image files of a training or validation set; a sample's index is its position here."""

    paths: list[str]
    targets: list[int]  # positions in ImageFolders.classes


class ImageFolders(NamedTuple):
    root: Path
    classes: list[str]  # sorted, so Tiny-ImageNet's class 0 is n01443537
    train: Split
    val: Split


def find_images(root: Path) -> ImageFolders:
    """List the images of a dataset in one of three layouts.

    - Tiny-ImageNet's own: train/<wnid>/images/*, val/images/* and val/val_annotations.txt
    - the same with the validation images sorted: val/<wnid>/*, or val/images/<wnid>/*
    - plain folders, as the original's: train/<class>/*, val/<class>/*

    A class's images may lie in subfolders, as for torchvision's ImageFolder, whose order this is.
    Hidden files and folders do not count.

    Raises:
        UserError: a missing folder or file, a class without images, a validation image whose
            class is not in train/, or images in several of the places above, of which all but
            one would be left out.
    """
    try:
        return _find_images(root)
    except OSError as error:
        raise UserError(f"dataset {root}: {error.filename}: {error.strerror}") from error


def _find_images(root: Path) -> ImageFolders:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"dataset {root}: {what} (`sample` is the built-in one)")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            inside = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
            raise UserError(f"dataset {root}: has no folder {part}/ (it holds {inside})")
    classes = _folders(root / "train")
    if not classes:
        raise UserError(f"dataset {root}: train/ holds no class folders")
    positions = {name: i for i, name in enumerate(classes)}
    train = _list_classes(root / "train", positions)

    val, images = root / "val", root / "val" / "images"
    sorted_into = {val: _folders(val)}
    flat: list[str] = []
    if "images" not in classes and images.is_dir():
        sorted_into[val].remove("images")
        sorted_into[images] = _folders(images)
        there = (path.name for path in images.iterdir() if not path.name.startswith(HIDDEN))
        flat = sorted(filter(is_image_file, there))
    # Scripts that sort the validation images often leave an empty val/images behind.
    found = [f"class folders in {place}" for place, names in sorted_into.items() if names]
    found += [f"images in {images}"] if flat else []
    if len(found) != 1:
        is_flat = any(is_image_file(path.name) for path in val.iterdir())
        nothing = "its images flat in val/, without classes" if is_flat else "no images in val/"
        raise UserError(
            f"dataset {root}: has {' and '.join(found) or nothing}; wanted are class folders in "
            "val/ or in val/images/, or images in val/images/ and val/val_annotations.txt"
        )
    if flat:
        return ImageFolders(root, classes, train, _list_annotated(images, flat, positions))
    place, names = next(item for item in sorted_into.items() if item[1])
    if unknown := [name for name in names if name not in positions]:
        raise UserError(
            f"dataset {root}: {place.relative_to(root)}/ has {len(unknown)} class(es) that train/ "
            f"lacks: {', '.join(map(_visible, unknown[:5]))}"
        )
    return ImageFolders(
        root, classes, train, _list_classes(place, {name: positions[name] for name in names})
    )


def _visible(name: str) -> str:
    """`name` such that two that only look alike differ, as in é and e with an accent."""
    return name if name.isascii() else f"{name} ({ascii(name)[1:-1]})"


def _folders(folder: Path) -> list[str]:
    found = sorted(name for name in os.listdir(folder) if not name.startswith(HIDDEN))  # noqa: PTH208
    for name in found:
        _refuse_broken_link(folder / name)
    return [name for name in found if (folder / name).is_dir()]


def _refuse_broken_link(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: a link to {path.readlink()}, which is missing")


def _list_classes(folder: Path, positions: dict[str, int]) -> Split:
    def is_valid(path: str) -> bool:
        parts = path[len(str(folder)) + 1 :].split(os.sep)  # noqa: PTH206 (Path is slow)
        if any(part.startswith(HIDDEN) for part in parts):
            return False
        if not is_image_file(path):
            _refuse_broken_link(Path(path))  # to a folder, which may hold images
        return bool(is_image_file(path))

    for name in positions:
        for _ in os.walk(folder / name, onerror=_raise, followlinks=True):
            pass  # make_dataset leaves out what it cannot read
    samples = make_dataset(folder, positions, is_valid_file=is_valid, allow_empty=True)
    split = Split([path for path, _ in samples], [target for _, target in samples])
    found = {*split.targets}
    if empty := [name for name, position in positions.items() if position not in found]:
        raise UserError(f"{folder / empty[0]}: holds no images ({', '.join(IMG_EXTENSIONS)})")
    return split


def _raise(error: OSError) -> NoReturn:
    raise error


def _list_annotated(images: Path, names: list[str], positions: dict[str, int]) -> Split:
    """Tiny-ImageNet's validation images: a line has file name, wnid and box, separated by tabs."""
    annotations = images.parent / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations}: missing, and with it the classes of {images}")
    unlabelled = dict.fromkeys(names)
    targets: dict[str, int] = {}
    for number, line in enumerate(
        annotations.read_text("utf-8-sig", "surrogateescape").splitlines(), 1
    ):
        if not line.strip():
            continue
        name, wnid, *_ = [*line.split("\t"), ""]
        where = f"{annotations} line {number}"
        if name in targets:
            raise UserError(f"{where}: {name} is annotated twice")
        if name not in unlabelled:
            raise UserError(f"{where}: {images / name} does not exist")
        if wnid not in positions:
            raise UserError(f"{where}: class {wnid or '(none)'} is not in train/")
        targets[name] = positions[wnid]
        del unlabelled[name]
    if not targets:
        raise UserError(f"{annotations}: annotates no image")
    if unlabelled:
        raise UserError(
            f"{annotations}: {len(unlabelled)} image(s) of {images} have no line: "
            f"{', '.join(list(unlabelled)[:5])}"
        )
    return Split([f"{images}/{name}" for name in names], [targets[name] for name in names])
