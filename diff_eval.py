"""On which validation images do two checkpoints disagree? Copies them, and shows them.

    python diff_eval.py a.pth b.pth                      # classes 0 and 1, into diff/
    python diff_eval.py a.pth b.pth --classes all --output-dir diff_all
    python diff_eval.py --misclassified a.pth            # what one model gets wrong

Prints both accuracies, how often the models agree and whether one is better by more than chance,
copies the images on which they disagree, and writes diff/disagreements.csv, comparison.json and
contact_sheet.png. What `make demo` trains (a), and the same with seed 2 (b), with
`--data sample --classes all`:

     * a Acc@1 82.200 b Acc@1 82.800 disagree 73 of 500
    The difference, a - b = -0.6 points, is no more than chance (95 % interval -3.5 to 2.3, ...
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import argparse
import csv
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.cli import (
    ArgumentParser,
    UserError,
    non_negative_int,
    nonempty,
    pathname,
    positive_int,
    product,
)
from image_classification.settings import STEMS, TINY_IMAGENET


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="*", type=pathname, metavar="CHECKPOINT", help="a.pth and b.pth")
    add("--data", type=nonempty, default=str(TINY_IMAGENET), metavar="DIR",
        help="dataset, or `sample`")
    add("--classes", nargs="+", default=["0", "1"], metavar="CLASS",
        help="numbers or names of classes, =NAME for a name that is a number, or all; `--classes "
        "help` lists them")
    add("--output-dir", default=Path("diff"), type=pathname, metavar="DIR",
        help="replaced when it holds an earlier output")
    add("--misclassified", action="store_true", help="copy the images that a model gets wrong")
    add("-a", "--arch", nargs="+", metavar="ARCH",
        help="architecture of a bare state dict, or of each checkpoint")
    add("--stem", nargs="+", choices=STEMS, help="likewise for a ResNet's stem")
    add("--image-size", nargs="+", type=positive_int, metavar="PX",
        help="likewise for the images; else what is usual for such images")
    add("--decode-once", default=0, type=non_negative_int, metavar="PX",
        help="use or make what resnet_main.py decodes with this flag; 0: the images themselves")
    add("-b", "--batch-size", default=256, type=positive_int, metavar="N", help="images at a time")
    add("-j", "--workers", default=4, type=non_negative_int, metavar="N",
        help="worker processes that decode images")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser())


import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont

from engine.checkpoints import Checkpoint
from engine.files import check_writable, refuse_clashes, writing
from engine.intervals import mcnemar, paired_difference
from engine.launch import build_accelerator
from image_classification.cache import BadImageError, open_image, refuse_bad_images
from image_classification.checkpoint import count_classes, load, refuse_other_classes, restore_model
from image_classification.data import ImageData, ImageLoader, load_dataset
from image_classification.folders import find_images, readable_names
from image_classification.sources import resolve

CSV, SHEET, COMPARISON = "disagreements.csv", "contact_sheet.png", "comparison.json"
# All that a run writes: a folder that holds anything else is not replaced.
OWN = re.compile(
    rf"\d+_(a\d+_b\d+|([ab]_)?misclassified_to_\d+)_.+|{CSV}|{SHEET}|{COMPARISON}", re.DOTALL
)

SHEET_MOST, SHEET_COLUMNS = 200, 8  # images
HEAD, THUMBNAIL, LABEL = 42, 120, 46  # pixels


class Verdict(NamedTuple):
    """What each model says of one image."""

    path: Path
    target: int
    predictions: tuple[int, ...]
    probabilities: tuple[float, ...]  # of the predictions


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse(argv)
    wanted = (1, 2) if args.misclassified else (2,)
    if len(args.checkpoints) not in wanted and args.classes != ["help"]:
        parser.error(f"{' or '.join(map(str, wanted))} checkpoints wanted, before the flags")
    for flag in ("arch", "stem", "image_size"):
        given = getattr(args, flag) or [None]
        if len(given) == 1:
            given = given * len(args.checkpoints)
        if len(given) != len(args.checkpoints):
            parser.error(f"--{flag.replace('_', '-')}: one, or one for each checkpoint")
        setattr(args, flag, given)
    args.output_dir = args.output_dir.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.classes == ["help"]:
        with product():
            list_classes(resolve(args.data, download=False))
        return
    accelerator = build_accelerator()
    if accelerator.is_main_process:
        inputs = [("CHECKPOINT", path) for path in args.checkpoints]
        inputs += [("--data", Path(args.data, split)) for split in ("train", "val")]
        refuse_clashes(folders=[("--output-dir", args.output_dir)], inputs=inputs)
        refuse_foreign(args.output_dir)
    paths: list[Path] = args.checkpoints
    contents = [load(path) for path in paths]
    counts = [count_classes(content) for content in contents]
    if counts[0] != counts[-1]:
        raise UserError(
            f"{paths[0]} has {counts[0]} classes and {paths[1]} {counts[1]}: they cannot be "
            "compared"
        )
    sizes = [
        find_size(content, asked) for content, asked in zip(contents, args.image_size, strict=True)
    ]
    if not Path(args.data).exists() and args.data != "sample":
        raise UserError(f"{args.data} is missing, and this script downloads nothing: name --data")
    with accelerator.local_main_process_first():
        datasets = {
            size: load_dataset(
                args.data, size, args.workers, download=False, decode_once=args.decode_once
            )
            for size in set(sizes)
        }
    data = datasets[sizes[0]]
    for note in data.notes:
        accelerator.print(note)
    restored = []
    for content, arch, stem, size in zip(contents, args.arch, args.stem, sizes, strict=True):
        refuse_other_classes(content, data.classes)
        restored.append(restore_model(content, arch, stem, datasets[size].image_size))
    names = readable_names(data.root, data.classes)
    chosen = choose(args.classes, data.classes, names)
    rows = [i for i, target in enumerate(data.val.targets.tolist()) if target in chosen]
    if not rows:
        raise UserError(f"{args.data}: no validation images of {' '.join(args.classes)}")

    try:
        said = [
            predict(accelerator, model, datasets[size], rows, args)
            for (model, _), size in zip(restored, sizes, strict=True)
        ]
    except BadImageError as error:
        processes = accelerator.num_processes
        refuse_bad_images(error, data.root, data.val.paths, args.workers, processes)
    for content, answers in zip(contents, said, strict=True):
        if not all(math.isfinite(probability) for _, probability in answers):
            raise content.error(
                "its weights give no finite outputs: the training diverged; use an earlier "
                "checkpoint"
            )
    if accelerator.is_main_process:
        which = ", ".join(f"{i} {names[i]}" for i in sorted(chosen))
        print(f"=> all {len(chosen)} classes" if "all" in args.classes else f"=> classes {which}")
        if data.decode_once:
            print(f"=> evaluated on the images' copies of --decode-once {data.decode_once}")
        files = data.val.paths
        verdicts = [
            Verdict(Path(files[row]), int(data.val.targets[row]), *zip(*answers, strict=True))
            for row, *answers in zip(rows, *said, strict=True)
        ]
        report(verdicts, data, names, args)


def find_size(content: Checkpoint, asked: int | None) -> int | None:
    """The checkpoint's image size, else the one asked for; where neither says, the data decides."""
    own: int | None = content.value("image_size", int)
    if asked and own and asked != own:
        raise UserError(f"{content.path} has image size {own}, not {asked}: leave the flag out")
    return own or asked


def list_classes(root: Path) -> None:
    """Print what --classes takes: each class's number, name and readable name."""
    classes = find_images(root).classes
    for i, names in enumerate(zip(classes, readable_names(root, classes), strict=True)):
        print(i, *names, sep="\t")


def refuse_foreign(folder: Path) -> None:
    """Raise `UserError` unless `folder` is missing, empty, or an earlier output of this script."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output-dir")
    foreign = sorted(p.name for p in folder.glob("*") if not OWN.fullmatch(p.name))
    if foreign:
        raise UserError(
            f"{folder} holds what this script did not write ({foreign[0]}): "
            "choose another --output-dir"
        )
    check_writable(folder.parent, "--output-dir", folder.name)


def choose(asked: list[str], classes: list[str], readable: list[str]) -> set[int]:
    """Indices of the classes that are asked for.

    Args:
        asked: a number is a position, whatever the classes are called; `=NAME` is always a name.
        classes: their names, which are their folders'.
        readable: what they are called in words.txt.

    Raises:
        UserError: no such class.
    """
    chosen: set[int] = set()
    for name in asked:
        if name == "all":
            found = [*range(len(classes))]
        elif name.isdecimal():
            found = [int(name)] if int(name) < len(classes) else []
        else:
            wanted = name.removeprefix("=")
            pairs = enumerate(zip(classes, readable, strict=True))
            found = [i for i, pair in pairs if wanted in pair]
        if not found:
            first, last = (f"{classes[i]} ({readable[i]})" for i in (0, -1))
            raise UserError(
                f"no class {name}: the dataset has 0 to {len(classes) - 1}, named {first} to {last}"
                + (" (=NAME for a name that is a number)" if name.isdecimal() else "")
            )
        chosen.update(found)
    return chosen


@torch.inference_mode()
def predict(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: ImageData,
    rows: list[int],
    args: argparse.Namespace,
) -> list[tuple[int, float]]:
    """Predicted class and its probability of each validation image in `rows`, on every process.

    Batches go whole to the processes in turn, so the result does not depend on their number.

    Raises:
        BadImageError: an image that cannot be decoded.
    """
    model.eval().to(memory_format=torch.channels_last)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    loader = ImageLoader(
        accelerator,
        data.val,
        batch_size=args.batch_size,
        image_size=data.image_size,
        seed=0,
        train=False,
        workers=args.workers,
        rows=torch.tensor(rows),
    )
    own: dict[int, tuple[int, float]] = {}
    for batch in loader.epoch(0):
        probabilities, predictions = model(batch.images).softmax(dim=1).max(dim=1)
        said = zip(predictions.tolist(), probabilities.tolist(), strict=True)
        own.update(zip(batch.indices.tolist(), said, strict=True))
    everyone = dict(gather_object(list(own.items())))
    return [everyone[row] for row in rows]


def report(
    verdicts: list[Verdict], data: ImageData, names: list[str], args: argparse.Namespace
) -> None:
    """Write the output folder and print the figures."""
    models = "ab"[: len(args.checkpoints)]
    right = [[v.predictions[m] == v.target for v in verdicts] for m in range(len(models))]
    found: list[tuple[float, str, Verdict]] = []  # how sure the models are, name of the copy
    taken: set[str] = set()
    # Windows lacks pathconf.
    most = os.pathconf(args.output_dir.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if args.misclassified:
        for m, model in enumerate(models):
            which = f"{model}_" if len(models) > 1 else ""
            for v, correct in zip(verdicts, right[m], strict=True):
                if not correct:
                    story = f"{v.target}_{which}misclassified_to_{v.predictions[m]}"
                    name = copy_name(story, v.path, taken, most)
                    found.append((v.probabilities[m], name, v))
    else:
        for v in verdicts:
            a, b = v.predictions
            if a != b:
                name = copy_name(f"{v.target}_a{a}_b{b}", v.path, taken, most)
                found.append((sum(v.probabilities), name, v))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    n = len(verdicts)
    agree = sum(len(set(v.predictions)) == 1 for v in verdicts)
    comparison = None
    if len(models) == 2:
        comparison = compare(args.checkpoints, right, n - agree)
        comparison["decode_once"] = data.decode_once  # 0: measured on the images themselves
    write([(v, name) for _, name, v in found], comparison, data, names, args)

    acc1 = [100 * sum(hits) / n for hits in right]
    for model, path, value in zip(models, args.checkpoints, acc1, strict=True):
        print(f"{model} = {path}: Acc@1 {value:.3f} on {n} images")
    if comparison:
        print(f"agreement {100 * agree / n:.3f}")
        print(f"{'':10}{'b right':>10}{'b wrong':>10}")
        print(f"{'a right':10}{comparison['both']:>10}{comparison['only_a']:>10}")
        print(f"{'a wrong':10}{comparison['only_b']:>10}{comparison['neither']:>10}")
        print(f" * a Acc@1 {acc1[0]:.3f} b Acc@1 {acc1[1]:.3f} disagree {n - agree} of {n}")
        print(comparison["sentence"])
    else:
        print(f" * a Acc@1 {acc1[0]:.3f} misclassified {len(found)} of {n}")
    wrong = [n - sum(hits) for hits in right]
    both = args.misclassified and len(models) == 2
    share = f" ({wrong[0]} that a gets wrong, {wrong[1]} that b does)" if both else ""
    files = [CSV, SHEET, *[COMPARISON] * bool(comparison)]
    print(f"=> {args.output_dir}/: {len(found)} images{share}, {', '.join(files)}")


def compare(paths: list[Path], right: list[list[bool]], disagree: int) -> dict[str, Any]:
    """What comparison.json holds: the accuracies of a and b, and whether they truly differ.

    Args:
        right: of each model, whether it is right, image by image.
        disagree: images of which the models say different classes.
    """
    n = len(right[0])
    count = Counter(zip(*right, strict=True))
    only_a, only_b = count[True, False], count[False, True]
    difference = 100 * (only_a - only_b) / n
    low, high = (100 * end for end in paired_difference(only_a, only_b, n))
    p = mcnemar(only_a, only_b)
    if p < 0.05 and only_a > only_b:
        said, ends = f"a is better by {difference:.1f} points", f"{low:.1f} to {high:.1f}"
    elif p < 0.05:
        said, ends = f"b is better by {-difference:.1f} points", f"{-high:.1f} to {-low:.1f}"
    else:
        said = f"The difference, a - b = {difference:+.1f} points, is no more than chance"
        ends = f"{low:.1f} to {high:.1f}"
    chance = f"p = {p:.3g}" if p >= 1e-4 else "p < 0.0001"
    return {
        **dict(zip("ab", map(str, paths), strict=True)),
        "count": n,
        "acc1": {model: 100 * sum(hits) / n for model, hits in zip("ab", right, strict=True)},
        "only_a": only_a,
        "only_b": only_b,
        "both": count[True, True],
        "neither": count[False, False],
        "disagree": disagree,
        "difference": difference,
        "interval": [low, high],
        "mcnemar_p": p,
        "sentence": f"{said} (95 % interval {ends}, McNemar {chance})",
    }


def copy_name(story: str, path: Path, taken: set[str], most: int) -> str:
    """`story`_NAME for a copy of the image at `path`; a number tells those of one name apart.

    Args:
        taken: names given so far, in small letters, which are all that some file systems tell.
        most: bytes that the file system takes; a longer name is cut.
    """
    number, end = 1, path.suffix
    while True:
        stem = f"{story}_{path.stem}"
        while stem and len(os.fsencode(stem + end)) > most:
            stem = stem[:-1]
        name = f"{stem}{end}"
        if name.casefold() not in taken:
            taken.add(name.casefold())
            return name
        number += 1
        end = f"_{number}{path.suffix}"


def write(
    chosen: list[tuple[Verdict, str]],
    comparison: dict[str, Any] | None,
    data: ImageData,
    names: list[str],
    args: argparse.Namespace,
) -> None:
    """Replace the output folder as a whole by the copies, the tables and the sheet.

    Args:
        chosen: the images and the names of their copies, the surest models first.
        comparison: of two models.
        names: of the classes, readable.
    """
    folder: Path = args.output_dir
    previous = folder.with_name(f".{folder.name}.previous")
    columns = ["file", "source", "true_class", "wnid", "name"]
    for model in "ab"[: len(args.checkpoints)]:
        columns += [f"{model}_prediction", f"{model}_name", f"{model}_probability"]
    try:
        with writing(folder) as temporary:
            temporary.mkdir(parents=True)
            for verdict, name in chosen:
                shutil.copyfile(verdict.path, temporary / name)
            with (temporary / CSV).open(
                "w", encoding="utf-8", errors="backslashreplace", newline=""
            ) as file:
                table = csv.writer(file)
                table.writerow(columns)
                for verdict, name in chosen:
                    t = verdict.target
                    source = verdict.path.relative_to(data.root)
                    row: list[object] = [name, source, t, data.classes[t], names[t]]
                    for p, sure in zip(verdict.predictions, verdict.probabilities, strict=True):
                        row += [p, names[p], f"{sure:.6f}"]
                    table.writerow(row)
            sheet = contact_sheet(chosen, drawable_names(data, names), args.checkpoints)
            sheet.save(temporary / SHEET)
            if comparison:
                (temporary / COMPARISON).write_text(json.dumps(comparison, indent=2) + "\n")
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
        shutil.rmtree(previous, ignore_errors=True)
    except BadImageError as error:
        raise UserError(f"cannot read {error}: restore it") from error


def drawable_names(data: ImageData, names: list[str]) -> list[str]:
    """`names`, or what the sheet's font has letters for: the class's own name, or its number."""
    font = ImageFont.load_default(11)
    box = bytes(font.getmask("\uffff"))  # what is drawn for a letter that the font lacks

    def can_draw(name: str) -> bool:
        return all(bytes(font.getmask(letter)) != box for letter in name)

    return [
        next(filter(can_draw, pair), f"class {i}")
        for i, pair in enumerate(zip(names, data.classes, strict=True))
    ]


def contact_sheet(
    chosen: list[tuple[Verdict, str]], names: list[str], checkpoints: list[Path]
) -> Image.Image:
    """Thumbnails, each above its true class and the models' predictions."""
    shown = chosen[:SHEET_MOST]
    columns = max(3, min(SHEET_COLUMNS, len(shown)))
    lines = -(-len(shown) // columns)
    cell = THUMBNAIL + 8
    sheet = Image.new("RGB", (columns * cell, HEAD + lines * (cell + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(14), ImageFont.load_default(11)
    more = f", the {SHEET_MOST} surest shown" if len(chosen) > SHEET_MOST else ""
    draw.text((6, 4), f"{len(chosen)} images{more}", "black", title)
    models = (f"{model} = {path}" for model, path in zip("ab", checkpoints, strict=False))
    draw.text((6, 23), ", ".join(models), "black", small)
    for i, (verdict, _) in enumerate(shown):
        x, y = i % columns * cell + 4, HEAD + i // columns * (cell + LABEL)
        picture = open_image(str(verdict.path)).resize((THUMBNAIL, THUMBNAIL))
        sheet.paste(picture, (x, y))
        labels = [(f"is {names[verdict.target]}", "black")]
        said = zip("ab", verdict.predictions, verdict.probabilities, strict=False)
        for model, p, probability in said:
            colour = "darkgreen" if p == verdict.target else "firebrick"
            labels.append((f"{model} {100 * probability:.0f}% {names[p]}", colour))
        for line, (text, colour) in enumerate(labels):
            while draw.textlength(text, small) > THUMBNAIL + 4:
                text = text.rstrip("…")[:-1] + "…"
            draw.text((x, y + THUMBNAIL + 2 + 14 * line), text, colour, small)
    return sheet


if __name__ == "__main__":
    run_script(main)
