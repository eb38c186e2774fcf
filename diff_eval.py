"""On which validation images do two checkpoints disagree? Copies them, and shows them.

    python diff_eval.py a.pth b.pth                      # classes 0 and 1, into diff/
    python diff_eval.py a.pth b.pth --classes all --output-dir diff_all
    python diff_eval.py --misclassified a.pth            # what one model gets wrong

Of every image it counts what the models say; of those that they disagree on it copies the file, and
writes diff/disagreements.csv and diff/contact_sheet.png.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont

import checkpoint as checkpoints
import image_checkpoint
import image_data
import image_model
import image_sources
import runtime
from files import whole_or_absent
from image_cache import BadImageError, open_image, refuse_bad_images
from image_data import ImageData, ImageLoader
from runtime import UserError, non_negative_int, positive_int

CSV, SHEET = "disagreements.csv", "contact_sheet.png"
# What an earlier run has written, and nothing else, may be replaced.
OWN = re.compile(rf"\d+_(a\d+_b\d+|([ab]_)?misclassified_to_\d+)_.+|{CSV}|{SHEET}")

SHEET_MOST, SHEET_COLUMNS, THUMBNAIL, LABEL = 200, 8, 120, 46  # images, images, pixels, pixels


class Verdict(NamedTuple):
    """What each model says of one image."""

    path: Path
    target: int
    predictions: list[int]
    probabilities: list[float]

    def copy_name(self, model: int | None) -> str:
        """`model` is None for a disagreement; for a mistake the model, or -1 when alone."""
        if model is None:
            a, b = self.predictions
            return f"{self.target}_a{a}_b{b}_{self.path.name}"
        which = "" if model < 0 else f"{'ab'[model]}_"
        return f"{self.target}_{which}misclassified_to_{self.predictions[model]}_{self.path.name}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runtime.ArgumentParser(description="Copy the images on which two models disagree")
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="a.pth and b.pth")
    add("--data", default=str(image_sources.TINY_IMAGENET), metavar="DIR",
        help="dataset, or `sample` (default: %(default)s)")
    add("--classes", nargs="+", default=["0", "1"], metavar="CLASS",
        help="numbers or names of classes, or all (default: 0 1)")
    add("--output-dir", default=Path("diff"), type=Path, metavar="DIR",
        help="replaced when it holds an earlier output (default: %(default)s)")
    add("--misclassified", action="store_true", help="copy the images that a model gets wrong")
    add("-a", "--arch", nargs="+", metavar="ARCH",
        help="architecture of a bare state dict, or of each checkpoint")
    add("--stem", nargs="+", choices=image_model.STEMS, help="likewise for a ResNet's stem")
    add("--image-size", type=positive_int, metavar="PX",
        help="for a checkpoint that does not say (default: 64)")
    add("-b", "--batch-size", default=256, type=positive_int, metavar="N")
    add("-j", "--workers", default=4, type=non_negative_int, metavar="N")
    # fmt: on
    args = parser.parse_args(argv)
    wanted = (1, 2) if args.misclassified else (2,)
    if len(args.checkpoints) not in wanted:
        parser.error(f"{' or '.join(map(str, wanted))} checkpoints wanted, before the flags")
    for flag in ("arch", "stem"):
        given = getattr(args, flag) or [None]
        if len(given) not in (1, len(args.checkpoints)):
            parser.error(f"--{flag}: one, or one for each checkpoint")
        setattr(args, flag, given * len(args.checkpoints) if len(given) == 1 else given)
    args.output_dir = args.output_dir.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    accelerator = runtime.build_accelerator()
    if accelerator.is_main_process:
        refuse_foreign(args.output_dir)
    contents = [checkpoints.load(path) for path in args.checkpoints]
    specs = []
    for content, path, arch, stem in zip(
        contents, args.checkpoints, args.arch, args.stem, strict=True
    ):
        spec = image_checkpoint.read_spec(content, path, arch, stem)
        if "image_size" not in content and args.image_size:
            spec = spec._replace(image_size=args.image_size)
        specs.append(spec)
    if specs[0].num_classes != specs[-1].num_classes:
        raise UserError(
            f"{args.checkpoints[0]} has {specs[0].num_classes} classes and {args.checkpoints[1]} "
            f"{specs[1].num_classes}: they cannot be compared"
        )
    if not Path(args.data).exists() and args.data != "sample":
        raise UserError(f"{args.data} is missing, and this script downloads nothing: name --data")
    with accelerator.local_main_process_first():
        datasets = [
            image_data.load(args.data, spec.image_size, 0, args.workers, download=False)
            for spec in specs
        ]
    classes = datasets[0].classes
    for content, path in zip(contents, args.checkpoints, strict=True):
        image_checkpoint.refuse_other_classes(content, classes, path)
    chosen = choose(args.classes, classes)
    rows = [i for i, target in enumerate(datasets[0].val.targets.tolist()) if target in chosen]
    if not rows:
        raise UserError(f"{args.data}: no validation images of {' '.join(args.classes)}")

    results = []
    for content, spec, data, path in zip(contents, specs, datasets, args.checkpoints, strict=True):
        model = image_model.build_model(spec)
        image_checkpoint.load_weights(model, content, path, spec.arch)
        model.to(memory_format=torch.channels_last)
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        try:
            results.append(predict(accelerator, prepared, data, rows, spec.image_size, args))
        except BadImageError as error:
            refuse_bad_images(data.root, data.val.paths, args.workers)
            raise UserError(
                "an image could not be read, but all can now: check the disk"
            ) from error
    verdicts = [
        Verdict(
            Path(datasets[0].val.paths[row]),
            int(datasets[0].val.targets[row]),
            [result[row][0] for result in results],
            [result[row][1] for result in results],
        )
        for row in rows
    ]
    if accelerator.is_main_process:
        report(verdicts, datasets[0], args)
    accelerator.end_training()


def refuse_foreign(folder: Path) -> None:
    """Raise `UserError` unless `folder` is missing, empty, or an earlier output of this script."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output-dir")
    foreign = [p.name for p in folder.glob("*") if not OWN.fullmatch(p.name)]
    if foreign:
        raise UserError(
            f"{folder} holds what this script did not write ({sorted(foreign)[0]}): "
            "choose another --output-dir"
        )
    runtime.check_writable(folder.absolute().parent, "--output-dir")


def choose(names: list[str], classes: list[str]) -> set[int]:
    """Positions of the classes named by number, by name, or by `all`."""
    chosen: set[int] = set()
    for name in names:
        if name == "all":
            chosen.update(range(len(classes)))
        elif name in classes:
            chosen.add(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            chosen.add(int(name))
        else:
            raise UserError(
                f"no class {name}: the dataset has 0 to {len(classes) - 1}, "
                f"named {classes[0]} to {classes[-1]}"
            )
    return chosen


@torch.inference_mode()
def predict(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: ImageData,
    rows: list[int],
    image_size: int,
    args: argparse.Namespace,
) -> dict[int, tuple[int, float]]:
    """Predicted class and its probability of each validation image in `rows`, on every process.

    Batches go whole to the processes in turn, so the result does not depend on their number.
    """
    loader = ImageLoader(
        accelerator,
        data.val,
        batch_size=args.batch_size,
        image_size=image_size,
        seed=0,
        train=False,
        workers=args.workers,
        rows=torch.tensor(rows),
    )
    model.eval()
    own: list[tuple[int, tuple[int, float]]] = []
    for batch in loader.epoch(0):
        probabilities, predictions = model(batch.images).softmax(dim=1).max(dim=1)
        said = zip(predictions.tolist(), probabilities.tolist(), strict=True)
        own.extend(zip(batch.indices.tolist(), said, strict=True))
    return dict(gather_object(own))


def report(verdicts: list[Verdict], data: ImageData, args: argparse.Namespace) -> None:
    """Write the output folder and print the figures."""
    models = "ab"[: len(args.checkpoints)]
    right = [[v.predictions[m] == v.target for v in verdicts] for m in range(len(models))]
    names = readable_names(data)
    if args.misclassified:
        sure = [
            (v.probabilities[m], v.copy_name(m if len(models) > 1 else -1), v)
            for m in range(len(models))
            for v, correct in zip(verdicts, right[m], strict=True)
            if not correct
        ]
    else:
        differ = [v for v in verdicts if len(set(v.predictions)) > 1]
        sure = [(sum(v.probabilities), v.copy_name(None), v) for v in differ]
    chosen = [(v, name) for _, name, v in sorted(sure, key=lambda s: (-s[0], s[1]))]
    write(chosen, data, names, args)

    n = len(verdicts)
    acc1 = [100 * sum(hits) / n for hits in right]
    for model, path, value in zip(models, args.checkpoints, acc1, strict=True):
        print(f"{model} = {path}: Acc@1 {value:.3f} on {n} images")
    if len(models) == 2:
        agree = sum(len(set(v.predictions)) == 1 for v in verdicts)
        table = [[sum((x, y) == (p, q) for x, y in zip(*right, strict=True))
                  for q in (True, False)] for p in (True, False)]  # fmt: skip
        print(f"agreement {100 * agree / n:.3f}")
        print(f"{'':10}{'b right':>10}{'b wrong':>10}")
        for label, cells in zip(("a right", "a wrong"), table, strict=True):
            print(f"{label:10}{cells[0]:>10}{cells[1]:>10}")
        print(f" * a Acc@1 {acc1[0]:.3f} b Acc@1 {acc1[1]:.3f} disagree {n - agree} of {n}")
    else:
        print(f" * a Acc@1 {acc1[0]:.3f} misclassified {len(chosen)} of {n}")
    print(f"=> {args.output_dir}/: {len(chosen)} images, {CSV}, {SHEET}")


def readable_names(data: ImageData) -> list[str]:
    """The first word that words.txt has for each class, else the class's own name."""
    words = data.root / "words.txt"
    known = {}
    if words.is_file():
        for line in words.read_text("utf-8", "replace").splitlines():
            wnid, _, synonyms = line.partition("\t")
            known[wnid] = synonyms.split(",")[0].strip()
    return [known.get(name) or name for name in data.classes]


def write(
    chosen: list[tuple[Verdict, str]], data: ImageData, names: list[str], args: argparse.Namespace
) -> None:
    """Replace the output folder as a whole by the copies, the table and the sheet."""
    folder: Path = args.output_dir
    previous = folder.with_name(f".{folder.name}.previous")
    said = [f"{m}_{c}" for m in "ab" for c in ("prediction", "name", "probability")]
    try:
        with whole_or_absent(folder) as temporary:
            temporary.mkdir(parents=True)
            for verdict, name in chosen:
                shutil.copyfile(verdict.path, temporary / name)
            with (temporary / CSV).open("w", newline="") as file:
                table = csv.writer(file)
                columns = said[: 3 * len(args.checkpoints)]
                table.writerow(["file", "true_class", "wnid", "name", *columns])
                for verdict, name in chosen:
                    t = verdict.target
                    row: list[object] = [name, t, data.classes[t], names[t]]
                    for p, sure in zip(verdict.predictions, verdict.probabilities, strict=True):
                        row += [p, names[p], f"{sure:.6f}"]
                    table.writerow(row)
            contact_sheet(chosen, names).save(temporary / SHEET)
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    except BadImageError as error:
        raise UserError(f"cannot read {error}: restore it") from error


def contact_sheet(chosen: list[tuple[Verdict, str]], names: list[str]) -> Image.Image:
    """The images with what is true and what was said, the surest models first."""
    shown = chosen[:SHEET_MOST]
    columns = max(3, min(SHEET_COLUMNS, len(shown)))
    lines = -(-len(shown) // columns)
    cell = THUMBNAIL + 8
    sheet = Image.new("RGB", (columns * cell, 24 + lines * (cell + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(14), ImageFont.load_default(11)
    more = f", the {SHEET_MOST} surest shown" if len(chosen) > SHEET_MOST else ""
    draw.text((6, 4), f"{len(chosen)} images{more}", "black", title)
    for i, (verdict, _) in enumerate(shown):
        x, y = i % columns * cell + 4, 24 + i // columns * (cell + LABEL)
        picture = open_image(str(verdict.path)).resize((THUMBNAIL, THUMBNAIL))
        sheet.paste(picture, (x, y))
        labels = [(f"is {names[verdict.target]}", "black")]
        for model, p, probability in zip(
            "ab", verdict.predictions, verdict.probabilities, strict=False
        ):
            colour = "darkgreen" if p == verdict.target else "firebrick"
            labels.append((f"{model} {100 * probability:.0f}% {names[p]}", colour))
        for line, (text, colour) in enumerate(labels):
            while draw.textlength(text, small) > THUMBNAIL + 4:
                text = text.rstrip("…")[:-1] + "…"
            draw.text((x, y + THUMBNAIL + 2 + 14 * line), text, colour, small)
    return sheet


if __name__ == "__main__":
    runtime.run_script(main)
