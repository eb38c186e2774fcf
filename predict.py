"""Which classes does a trained classifier see in images? Prints the likeliest, with likelihoods.

    python predict.py output/resnet18-cpu/model_best.pth photo.jpg
    python predict.py model_best.pth photos/ more/*.png --top 3 --csv predictions.csv

A folder stands for the images in it, at any depth. Images are cropped and resized as resnet_main.py
does it to validate, so an image of the validation set gets the answer that validation counted.
Computes in float32, on the first GPU or else the CPU.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.cli import ArgumentParser, UserError, pathname, positive_int, product
from image_classification.settings import STEMS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoint", type=pathname, metavar="CHECKPOINT", help="model_best.pth of a training")
    add("images", nargs="+", type=pathname, metavar="IMAGE",
        help="image files, and folders of images")
    add("--top", default=5, type=positive_int, metavar="N", help="classes of each image")
    add("--csv", type=pathname, metavar="PATH", help="also write a table: a line for each class")
    add("-a", "--arch", metavar="ARCH", help="architecture of a bare state dict")
    add("--stem", choices=STEMS, help="likewise a ResNet's stem")
    add("--image-size", type=positive_int, metavar="PX",
        help="for a checkpoint that does not say; else what is usual for such images")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser(), alone=True)


import torch

from engine.checkpoints import Checkpoint
from engine.files import check_outputs, writing
from image_classification.augment import normalise, resize
from image_classification.cache import BadImageError, describe, small_side, whole_image
from image_classification.checkpoint import count_classes, load, restore_model
from image_classification.data import ORIGINAL_SIZE, ImageFiles
from image_classification.folders import Split, described, walk_images
from image_classification.settings import DEFAULT

BATCH = 64  # images at a time


class Prediction(NamedTuple):
    path: str
    classes: list[int]  # the likeliest first
    likelihoods: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    paths = find_paths(args.images)
    if args.csv:
        inputs = [("CHECKPOINT", args.checkpoint), *(("IMAGE", Path(path)) for path in paths)]
        check_outputs([("--csv", args.csv)], inputs=inputs)
    checkpoint = load(args.checkpoint)
    model, preprocessing = restore(checkpoint, paths, args)
    classes, names = class_names(checkpoint)
    bad: list[str] = []
    predictions = []
    with product():
        for prediction in predict(checkpoint, model, preprocessing, args.top, bad):
            predictions.append(prediction)
            said = zip(prediction.classes, prediction.likelihoods, strict=True)
            shown = ", ".join(f"{names[i]} {100 * likelihood:.1f} %" for i, likelihood in said)
            print(f"{prediction.path}: {shown}")
    if args.csv:
        write_csv(args.csv, predictions, classes, names)
        print(f"=> {args.csv}")
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} images cannot be read: {', '.join(bad)}")


def find_paths(asked: Sequence[Path]) -> list[str]:
    """The files that are named, and the images of the folders that are."""
    found = []
    for path in asked:
        if path.is_dir():
            left_out: Counter[str] = Counter()
            inside = walk_images(path, left_out)
            others = described(left_out) if left_out else ""
            if not inside:
                raise UserError(f"{path}: holds no images{'; ' if others else ''}{others}")
            if others:
                print(f"=> {path}: {others}", file=sys.stderr)
            found += inside
        elif path.exists():
            found.append(str(path))
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


class Preprocessing:
    """Images as validation gives them to a model.

    Args:
        side: of the small images that the model was validated on, which it saw whole; None for a
            model that was validated on a square from the middle of larger ones.
        size: pixels a side that the model sees.
    """

    def __init__(self, paths: list[str], side: int | None, size: int) -> None:
        self.paths, self.side, self.size = paths, side, size
        self.files = ImageFiles(Split(paths, [0] * len(paths)), size)

    def __getitem__(self, index: int) -> torch.Tensor:
        """[3, size, size], float32 from 0 to 255.

        Raises:
            BadImageError: the file cannot be decoded.
        """
        if self.side is None:
            return self.files[index, None].permute(2, 0, 1).float()
        return resize(whole_image(self.paths[index], self.side)[None], self.size)[0]


def restore(
    checkpoint: Checkpoint, paths: list[str], args: argparse.Namespace
) -> tuple[torch.nn.Module, Preprocessing]:
    """The model, ready to predict, and how its images are made.

    Of a checkpoint that does not say which images it was validated on, these images decide, as
    those of a dataset would.
    """
    is_known = "whole_side" in checkpoint
    side = checkpoint.value("whole_side", int) if is_known else small_side(paths)
    size = checkpoint.value("image_size", int) or args.image_size
    if size is None:
        size = ORIGINAL_SIZE if side is None else DEFAULT.image_size
        print(
            f"=> the weights do not say for which size of images they are: {size} px; --image-size "
            "chooses another",
            file=sys.stderr,
        )
    model, _ = restore_model(checkpoint, args.arch, args.stem, size)
    model.eval().to(memory_format=torch.channels_last)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, Preprocessing(paths, side, size)


def class_names(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The classes' own names and the readable ones; numbers, if the checkpoint has no names."""
    count = count_classes(checkpoint)
    classes = checkpoint.value("classes", list) or [*map(str, range(count))]
    names = checkpoint.value("names", list) or classes
    for kind, found in (("classes", classes), ("names", names)):
        if len(found) != count or not all(isinstance(name, str) for name in found):
            raise checkpoint.error(f"{kind} are not the names of {count} classes: damaged")
    return classes, names


@torch.inference_mode()
def predict(
    checkpoint: Checkpoint, model: torch.nn.Module, images: Preprocessing, top: int, bad: list[str]
) -> Iterator[Prediction]:
    """Yield a prediction for each image; one that cannot be read is named in `bad` instead."""
    device = next(model.parameters()).device
    for first in range(0, len(images.paths), BATCH):
        paths, pixels = [], []
        for index in range(first, min(first + BATCH, len(images.paths))):
            try:
                pixels.append(images[index])
                paths.append(images.paths[index])
            except BadImageError as error:
                bad.append(f"{images.paths[index]} ({describe(error)})")
        if not pixels:
            continue
        likelihoods = model(normalise(torch.stack(pixels).to(device))).softmax(dim=1)
        if not likelihoods.isfinite().all():
            raise checkpoint.error(
                "its weights give no finite likelihoods: the training diverged; use an earlier one"
            )
        best = likelihoods.topk(min(top, likelihoods.shape[1]))
        yield from map(Prediction, paths, best.indices.tolist(), best.values.tolist())


def write_csv(
    path: Path, predictions: list[Prediction], classes: list[str], names: list[str]
) -> None:
    with (
        writing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(["file", "rank", "class", "name", "likelihood"])
        for prediction in predictions:
            said = zip(prediction.classes, prediction.likelihoods, strict=True)
            for rank, (i, likelihood) in enumerate(said, 1):
                table.writerow([prediction.path, rank, classes[i], names[i], f"{likelihood:.6f}"])


if __name__ == "__main__":
    run_script(main)
