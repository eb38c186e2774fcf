"""The layouts in which image datasets come: their files, and the class of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from engine.cli import UserError


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
    - the same with the validation images sorted: val/<wnid>/images/*
    - plain folders, as the original's: train/<class>/*, val/<class>/*

    Raises:
        UserError: a missing folder or file, a class without images, or a validation image whose
            class is not in train/.
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
    classes = _folders(root / "train")
    if not classes:
        raise UserError(f"dataset {root}: train/ holds no class folders")
    positions = {name: i for i, name in enumerate(classes)}
    train = _list_classes(root / "train", positions)

    annotations, flat = root / "val" / "val_annotations.txt", root / "val" / "images"
    # Scripts that sort the validation images often leave an empty val/images behind.
    if "images" not in classes and flat.is_dir() and any(map(_is_image, flat.iterdir())):
        if not annotations.is_file():
            raise UserError(f"{annotations}: missing, and with it the classes of {flat}")
        return ImageFolders(root, classes, train, _list_annotated(annotations, positions))
    val_classes = [name for name in _folders(root / "val") if name in positions or name != "images"]
    if not val_classes:
        raise UserError(
            f"dataset {root}: val/ holds neither class folders nor images/ with val_annotations.txt"
        )
    if unknown := [name for name in val_classes if name not in positions]:
        raise UserError(
            f"dataset {root}: val/ has {len(unknown)} class(es) that train/ lacks: "
            f"{', '.join(unknown[:5])}"
        )
    val = _list_classes(root / "val", {name: positions[name] for name in val_classes})
    return ImageFolders(root, classes, train, val)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _is_image(path: str | Path) -> bool:
    name = Path(path).name
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _list_classes(folder: Path, positions: dict[str, int]) -> Split:
    samples = make_dataset(folder, positions, is_valid_file=_is_image, allow_empty=True)
    split = Split([path for path, _ in samples], [target for _, target in samples])
    found = set(split.targets)
    for name, position in positions.items():
        if position not in found:
            raise UserError(f"{folder / name}: holds no images ({', '.join(IMG_EXTENSIONS)})")
    return split


def _list_annotated(annotations: Path, positions: dict[str, int]) -> Split:
    """Tiny-ImageNet's validation images: a line has file name, wnid and box, separated by tabs."""
    images = annotations.parent / "images"
    names = sorted(path.name for path in filter(_is_image, images.iterdir()))
    unlabelled = dict.fromkeys(names)
    targets: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text("utf-8", "replace").splitlines(), 1):
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
