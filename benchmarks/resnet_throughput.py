"""Images a second of resnet_main.py beside a plain reference.

    python benchmarks/resnet_throughput.py
    python benchmarks/resnet_throughput.py --data path/to/tiny-imagenet-200 --json resnet.json
    python benchmarks/resnet_throughput.py --data photographs --image-size 224 --stem stock -b 64
    python benchmarks/resnet_throughput.py -b 512 --compile --only training loading    # on a GPU

The kit's side is the real loop, resnet_main.train_epoch and resnet_main.evaluate with the real
loader; the other is that of benchmarks/reference_image.py. Both have the same images, size, stem
and batch. On a machine without a GPU, or with ACCELERATE_USE_CPU=true, the CPU is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import floors
import photographs
import rounds
import tables
import torch
from rounds import Contestant, Round, Row

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

import resnet_main
from engine.cli import ArgumentParser, positive_int
from engine.launch import emulates_bf16
from engine.stop import run_script
from image_classification.cache import decoded_images, small_side
from image_classification.data import DecodedImages, ImageFiles, find_data, move_to_gpu
from image_classification.folders import Split, find_images
from image_classification.model import build_model
from image_classification.settings import DEFAULT, STEMS, ModelSpec, has_stem
from image_classification.sources import resolve

WORK = ("training", "validation", "loading", "start")
LOADING_STEPS = 40  # at least, of a round: loading alone is quick
SMALLEST = "squeezenet1_1"  # the model of the loading row, which measures the loader alone


def kit(work: str, flags: list[str], rows: list[int], compiled: bool = False) -> Round:
    """Images a second over the images `rows`, set up as resnet_main.main does."""
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved there
        flags = [*flags, "--output-dir", folder, *["--compile"] * compiled]
        run, args, checkpoint = resnet_main.begin(flags)
    data = find_data(run.accelerator, args)
    if work == "validation":
        data = data._replace(val=subset(data.val, rows, args))
    else:
        data = data._replace(train=subset(data.train, rows, args))
    model, optimizer, train_loader, val_loader = resnet_main.build(run, data, args, checkpoint)
    move_to_gpu(run.accelerator, train_loader, val_loader)  # as from the second epoch on
    step = resnet_main.training_step(run, model, optimizer, args)

    def epoch() -> object:
        if work == "validation":
            return resnet_main.evaluate(run, model, val_loader, args)
        run.step = 0  # every round is the first epoch
        return resnet_main.train_epoch(run, model, step, train_loader, args)

    if work == "loading":
        return lambda: [
            rounds.rate_after_first(len(batch.targets) for batch in train_loader.epoch(0))
        ]
    return lambda: [len(rows) / rounds.seconds(epoch)]


def subset(
    images: DecodedImages | ImageFiles, rows: list[int], args: argparse.Namespace
) -> DecodedImages | ImageFiles:
    whole = images.paths
    paths, targets = [whole[row] for row in rows], images.targets[rows]
    if isinstance(images, DecodedImages):
        return DecodedImages(
            images.images[rows],
            targets,
            paths,
            images.sizes if images.sizes is None else images.sizes[rows],
        )
    return ImageFiles(Split(paths, targets.tolist()), args.image_size)


def caching(paths: list[str], side: int, workers: int, scaled: bool) -> Round:
    """Images a second of decoding `paths` into a new cache."""

    def build() -> None:
        with tempfile.TemporaryDirectory() as folder:
            decoded_images(Path(folder), paths, side, workers, scaled)

    return lambda: [len(paths) / rounds.seconds(build)]


def start(flags: list[str]) -> Round:
    """Seconds until resnet_main.py prints the line of its first step."""

    def until_first_step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(KIT / "resnet_main.py"), *flags, "--output-dir", folder]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                found = any(line.startswith("Epoch: [0]") for line in process.stdout)
                process.kill()
            if not found:
                raise RuntimeError(f"{command} ended before its first step")

    return lambda: [rounds.seconds(until_first_step)]


def pick(count: int, total: int) -> list[int]:
    """`count` of `total` images, each about equally often."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order.repeat(-(-count // total))[:count].tolist()


def main() -> None:
    cpu = rounds.on_cpu()
    parser = ArgumentParser("Images a second of resnet_main.py")
    add = parser.add_argument
    # fmt: off
    add("--data", default="sample", metavar="DIR",
        help="dataset, `sample` for the built-in one, or `photographs` for noise of 500 x 375 px")
    add("--decode-once", type=positive_int, default=256, metavar="PX",
        help="side of larger images' copies in the loading row")
    add("-a", "--arch", default=DEFAULT.arch, help="model architecture")
    add("--stem", choices=STEMS, default=DEFAULT.stem, help="first layers of a ResNet")
    add("--image-size", type=positive_int, default=64, metavar="PX", help="side of the images")
    add("-b", "--batch-size", type=positive_int, default=128, metavar="N",
        help="images a step")
    add("-j", "--workers", type=positive_int, default=2 if cpu else 4, metavar="N",
        help="processes that decode images")
    add("--steps", type=positive_int, default=6 if cpu else 100, metavar="N",
        help="of a round")
    add("--compile", action="store_true", help="measure the kit with --compile as well")
    add("--only", nargs="+", choices=WORK, default=WORK, metavar="ROW", help=" ".join(WORK))
    # fmt: on
    rounds.add_arguments(parser, positive_int)
    rounds.add_precision(parser, bf16=not emulates_bf16(rounds.device()))
    args = parser.parse_args()

    if (dataset := args.data) == "photographs":
        made = tempfile.TemporaryDirectory()
        args.data = str(photographs.make(Path(made.name)))
    folders = find_images(resolve(args.data, download=False))
    small = small_side(folders.train.paths)
    stem = args.stem if has_stem(args.arch) else None
    spec = ModelSpec(args.arch, stem, len(folders.classes), args.image_size)
    build_model(spec)  # raises for what is wrong with it
    network = {"arch": spec.arch, "stem": spec.stem, "classes": spec.num_classes}
    sizes = [*("-b", args.batch_size), *("--image-size", args.image_size), *("-j", args.workers)]
    flags = [args.data, "-a", args.arch, *map(str, sizes)]
    flags += ["--stem", stem] if stem else []
    steps = {"training": args.steps, "validation": args.steps}
    steps["loading"] = max(args.steps, LOADING_STEPS)

    def images(work: str) -> tuple[list[int], dict[str, Any]]:
        """Which images a round has: for the kit, and for the reference's loader."""
        train = work != "validation"
        split = folders.train if train else folders.val
        rows = pick(steps[work] * args.batch_size, len(split.paths))
        loader = {
            "folder": str(folders.root / "train"),
            "samples": [(split.paths[row], split.targets[row]) for row in rows],
            "batch_size": args.batch_size
            if train
            else min(args.batch_size, resnet_main.EVAL_BATCH_SIZE),
            "image_size": args.image_size,
            # The kit validates small images whole.
            "side": args.image_size if small else round(args.image_size * 256 / 224),
            "workers": args.workers,
            "train": train,
        }
        return rows, loader

    results: list[Row] = []
    notes = [
        f"{args.arch}, stem {stem}, {args.image_size} px, batch {args.batch_size}, {args.steps} "
        f"steps a round, {args.workers} workers; dataset {dataset}.",
        "MB: peak memory above the imported libraries, without that of worker processes.",
    ]
    for work in [work for work in ("training", "validation") if work in args.only]:
        rows, loader = images(work)
        flops = floors.flops_per_image(work, network, args.image_size)
        bound = {"work": work, "network": network, "flops": flops}
        bound |= {"batch": loader["batch_size"], "image_size": args.image_size}
        contestants = rounds.line_up(
            args.precision,
            (f"reference_image:{work}", {"loader": loader, "network": network}),
            ("resnet_throughput:kit", {"work": work, "flags": flags, "rows": rows}),
            ("floors:convolutions", bound),
            args.compile,
        )
        results += rounds.measure([work], "images/s", contestants, args.rounds, flops)
    if {"training", "validation"} & set(args.only):
        notes.append("floor: the step's FLOPs at the rate of the network's convolutions alone.")
    own, theirs = rounds.kit_environment("no"), rounds.reference_environment()
    if "loading" in args.only:
        rows, loader = images("loading")
        small_model = [*flags, "-a", SMALLEST]
        options: dict[str, Any] = {"work": "loading", "flags": small_model, "rows": rows}
        contestants = [
            Contestant("PIL workers", "reference_image:loading", {"loader": loader}, theirs),
            Contestant("kit", "resnet_throughput:kit", options, own),
        ]
        if not small:
            once = {**options, "flags": [*small_model, "--decode-once", str(args.decode_once)]}
            contestants.append(Contestant("kit, --decode-once", "resnet_throughput:kit", once, own))
        options = {
            "paths": list(dict.fromkeys(path for path, _ in loader["samples"])),
            "side": small or args.decode_once,
            "workers": args.workers,
            "scaled": not small,
        }
        contestants.append(
            Contestant("kit, building its cache", "resnet_throughput:caching", options, own)
        )
        results += rounds.measure(["loading"], "images/s", contestants, args.rounds)
        notes.append("loading: augmented batches, and no training; the cache is built once.")
    if "start" in args.only:
        # Eight images and no compiler, so that the step itself takes next to nothing.
        first = [*flags, "-b", "8", "-p", "1", "--seed", "0"]
        contestants = [
            Contestant("import torch", "reference_image:import_torch", {}, theirs),
            Contestant("kit's first step", "resnet_throughput:start", {"flags": first}, own),
        ]
        torch_alone, kit_start = rounds.measure(["start"], "s", contestants, args.rounds)
        pairs = zip(kit_start.rounds, torch_alone.rounds, strict=True)
        results += [torch_alone._replace(peak_bytes=0), kit_start._replace(peak_bytes=0)]
        results.append(Row("start", "beyond importing torch", "s", [a - b for a, b in pairs], []))
        notes.append("start: python resnet_main.py -b 8 with a cached dataset, to its first line.")
    tables.report(results, notes, args)


if __name__ == "__main__":
    run_script(main)
