"""The layouts in which image datasets come: their files, and the class of each."""

from __future__ import annotations

import itertools
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.datasets.imagenet import load_meta_file

from engine.cli import UserError

# What neither a class nor an image begins with: .ipynb_checkpoints, macOS's ._*, Synology's @eaDir.
HIDDEN = (".", "@eaDir")

IMAGENET_VAL = "ILSVRC2012_val_"  # and a number of 8 digits, from 1: ImageNet's validation images
KAGGLE = Path("ILSVRC/Data/CLS-LOC")  # where Kaggle's archive of ImageNet has train/ and val/
VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"

# Where a label stands, the name of its image, and the class.
Labels = Iterator[tuple[str, str, str]]


class Split(NamedTuple):
    """The image files of a training or validation set; a sample's index is its position here."""

    paths: list[str]
    targets: list[int]  # positions in ImageFolders.classes


class ImageFolders(NamedTuple):
    root: Path
    classes: list[str]  # sorted, so Tiny-ImageNet's class 0 is n01443537
    train: Split
    val: Split
    notes: list[str]  # lines on what its owner may not expect


def find_images(root: Path) -> ImageFolders:
    """List the images of a dataset in one of four layouts.

    - ImageNet's own: train/<wnid>/*, val/ILSVRC2012_val_*, and the labels of `_imagenet_labels`
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
            more = f"; DIR is {root / KAGGLE} then" if (root / KAGGLE).is_dir() else ""
            raise UserError(f"dataset {root}: has no folder {part}/ (it holds {inside}){more}")
    classes = _folders(root / "train")
    if not classes:
        raise UserError(f"dataset {root}: train/ holds no class folders")
    positions = {name: i for i, name in enumerate(classes)}
    left_out: Counter[str] = Counter()
    train = _list_classes(root / "train", positions, left_out)

    val, images = root / "val", root / "val" / "images"
    sorted_into = {val: _folders(val)}
    there = {val: _shown(os.listdir(val))}  # noqa: PTH208
    if "images" not in classes and images.is_dir():
        sorted_into[val].remove("images")
        sorted_into[images] = _folders(images)
        there[images] = _shown(os.listdir(images))  # noqa: PTH208
    flat = {place: sorted(filter(is_image_file, names)) for place, names in there.items()}
    loose = flat.pop(val)
    if any(name.startswith(IMAGENET_VAL) for name in loose):
        flat[val] = loose
    # Scripts that sort the validation images often leave an empty val/images behind.
    found = [f"class folders in {place}" for place, names in sorted_into.items() if names]
    found += [f"images in {place}" for place, names in flat.items() if names]
    if len(found) != 1:
        nothing = "its images flat in val/, without classes" if loose else "no images in val/"
        raise UserError(
            f"dataset {root}: has {' and '.join(found) or nothing}; wanted are class folders in "
            "val/ or in val/images/, or images in val/images/ and val/val_annotations.txt"
        )
    if any(flat.values()):
        place, names = next(item for item in flat.items() if item[1])
        file, labels = _imagenet_labels(root, names) if place == val else _annotations(images)
        left_out.update(map(_ending, itertools.filterfalse(is_image_file, there[place])))
        split = _list_labelled(place, names, file, labels, positions)
    else:
        place, names = next(item for item in sorted_into.items() if item[1])
        if unknown := [name for name in names if name not in positions]:
            raise UserError(
                f"dataset {root}: {place.relative_to(root)}/ has {len(unknown)} class(es) that "
                f"train/ lacks: {', '.join(map(_visible, unknown[:5]))}"
            )
        split = _list_classes(place, {name: positions[name] for name in names}, left_out)
    return ImageFolders(root, classes, train, split, _notes(root, classes, left_out))


def _notes(root: Path, classes: list[str], left_out: Counter[str]) -> list[str]:
    notes = [f"=> {root}: {described(left_out)}"] if left_out else []
    prefix = classes[0].rstrip("0123456789")
    numbers = [name.removeprefix(prefix) for name in classes]
    if all(map(str.isdecimal, numbers)) and numbers != (ordered := sorted(numbers, key=int)):
        first = next(i for i, number in enumerate(numbers) if number != ordered[i])
        more = ", …" if len(classes) > 5 else ""
        notes.append(
            f"=> {root}: classes are sorted as text: {', '.join(classes[:5])}{more}: class {first} "
            f"is `{classes[first]}`"
        )
    return notes


def described(left_out: Counter[str]) -> str:
    """How many files are no images by their endings, and which endings these are."""
    most = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5))
    more = ", …" if len(left_out) > 5 else ""
    endings = ", ".join(IMG_EXTENSIONS)
    return f"{left_out.total()} file(s) left out: {most}{more} (images end in {endings})"


def _visible(name: str) -> str:
    """`name` such that two that only look alike differ, as in é and e with an accent."""
    return name if name.isascii() else f"{name} ({ascii(name)[1:-1]})"


def _shown(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(HIDDEN)]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"  # noqa: PTH122 (Path is slow)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:  # it knows files from folders without asking the disk
        found = sorted((e for e in entries if not e.name.startswith(HIDDEN)), key=lambda e: e.name)
    for entry in found:
        if entry.is_symlink():
            _refuse_broken_link(Path(entry))
    return [entry.name for entry in found if entry.is_dir()]


def _refuse_broken_link(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: a link to {path.readlink()}, which is missing")


def readable_names(root: Path, classes: list[str]) -> list[str]:
    """The first word that words.txt has for each class, else the class's own name."""
    words = root / "words.txt"
    known = {}
    if words.is_file():
        for line in words.read_text("utf-8-sig", "replace").splitlines():
            wnid, _, synonyms = line.partition("\t")
            known[wnid] = synonyms.split(",")[0].strip()
    return [known.get(name) or name for name in classes]


def walk_images(folder: Path, left_out: Counter[str]) -> list[str]:
    """The images of a folder and of those within it, in a fixed order, without hidden ones.

    Counts the endings of all other files in `left_out`.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = sorted(_shown(folders))
        shown = sorted(_shown(files))
        found += [f"{place}{os.sep}{file}" for file in shown if is_image_file(file)]
        left_out.update(map(_ending, itertools.filterfalse(is_image_file, shown)))
    return found


def _list_classes(folder: Path, positions: dict[str, int], left_out: Counter[str]) -> Split:
    """The images of classes, in ImageFolder's order; counts the endings of all other files."""
    split = Split([], [])
    for name, position in positions.items():
        found: list[tuple[str, str]] = []
        for place, folders, files in os.walk(folder / name, onerror=_raise, followlinks=True):
            folders[:] = _shown(folders)
            for file in _shown(files):
                if is_image_file(file):
                    found.append((place, file))
                elif file != f"{name}_boxes.txt":  # Tiny-ImageNet's own
                    _refuse_broken_link(Path(place, file))  # to a folder, which may hold images
                    left_out[_ending(file)] += 1
        if not found:
            raise UserError(f"{folder / name}: holds no images ({', '.join(IMG_EXTENSIONS)})")
        split.paths.extend(f"{place}{os.sep}{file}" for place, file in sorted(found))
        split.targets.extend([position] * len(found))
    loose = filter(is_image_file, _shown(os.listdir(folder)))  # noqa: PTH208
    left_out.update(f"{_ending(name)} beside the class folders" for name in loose)
    return split


def _raise(error: OSError) -> NoReturn:
    raise error


def _list_labelled(
    images: Path, names: list[str], file: Path, labels: Labels, positions: dict[str, int]
) -> Split:
    """Images that lie in one folder, with one label each from `file`."""
    unlabelled = dict.fromkeys(names)
    targets: dict[str, int] = {}
    for where, name, wnid in labels:
        if name in targets:
            raise UserError(f"{where}: {name} is annotated twice")
        if name not in unlabelled:
            raise UserError(f"{where}: {images / name} does not exist")
        if wnid not in positions:
            raise UserError(f"{where}: class {wnid or '(none)'} is not in train/")
        targets[name] = positions[wnid]
        del unlabelled[name]
    if not targets:
        raise UserError(f"{file}: annotates no image")
    if unlabelled:
        raise UserError(
            f"{file}: {len(unlabelled)} image(s) of {images} have no line: "
            f"{', '.join(list(unlabelled)[:5])}"
        )
    return Split([f"{images}/{name}" for name in names], [targets[name] for name in names])


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where a line stands, and the line, of those that are not empty."""
    for number, line in enumerate(file.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        if line.strip():
            yield f"{file} line {number}", line


def _annotations(images: Path) -> tuple[Path, Labels]:
    """Tiny-ImageNet's: a line has file name, wnid and box, separated by tabs."""
    file = images.parent / "val_annotations.txt"
    if not file.is_file():
        raise UserError(f"{file}: missing, and with it the classes of {images}")
    fields = ((where, *line.split("\t"), "") for where, line in _lines(file))
    return file, ((where, name, wnid) for where, name, wnid, *_ in fields)


def _imagenet_labels(root: Path, names: list[str]) -> tuple[Path, Labels]:
    """The labels of ImageNet's validation images, from whichever of two files is there.

    - LOC_val_solution.csv, Kaggle's: a line has an image's name without its ending, a comma, and
      its boxes: a wnid and four numbers each
    - meta.bin, which torchvision.datasets.ImageNet makes of the devkit: the images' wnids, in the
      order of the images' numbers

    The devkit's ground truth alone is not enough. Its numbers are no positions among the sorted
    wnids: only meta.mat has their wnids, and to read it takes MATLAB or scipy.

    Raises:
        UserError: neither is there, or meta.bin is damaged.
    """
    files = {os.path.splitext(name)[0]: name for name in names}  # noqa: PTH122 (Path is slow)

    def file_of(image: str) -> str:
        return files.get(image, f"{image}.JPEG")

    places = [root]
    if (resolved := root.resolve()).match(str(KAGGLE)):
        places.append(resolved.parents[len(KAGGLE.parts) - 1])
    for file in (place / "LOC_val_solution.csv" for place in places):
        if file.is_file():
            return file, (
                (where, file_of(image), " ".join(dict.fromkeys(boxes.split()[::5])))
                for where, line in _lines(file)
                for image, _, boxes in [line.partition(",")]
                if image != "ImageId"
            )
    file = root / "meta.bin"
    if not file.is_file():
        make = 'from torchvision.datasets.imagenet import parse_devkit_archive as make; make(".")'
        raise UserError(
            f"dataset {root}: its validation images lie flat in val/, and nothing that the kit "
            "can read tells their classes (the devkit's ground truth needs its meta.mat, which is "
            f"MATLAB's). `cd {shlex.quote(str(root / 'val'))} && wget -qO- {VALPREP} | bash` sorts "
            f"them into val/<wnid>/; or put Kaggle's LOC_val_solution.csv into {root}; or "
            f"`cd {shlex.quote(str(root))} && pip install scipy && python -c '{make}'` makes "
            "torchvision's meta.bin of ILSVRC2012_devkit_t12.tar.gz there"
        )
    try:
        _, wnids = load_meta_file(root)
        wnids = [str(wnid) for wnid in wnids]
    except OSError:
        raise
    except Exception as error:  # a damaged file raises what its reader happens to meet
        raise UserError(f"{file}: not torchvision's, or damaged: delete it") from error
    return file, (
        (f"{file} label {number}", file_of(f"{IMAGENET_VAL}{number:08d}"), wnid)
        for number, wnid in enumerate(wnids, 1)
    )
