"""A training of an image classifier, set up: its settings, model, optimizer and loaders."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.transforms import v2

from engine.checkpoints import Checkpoint, load
from engine.cli import ArgumentParser, UserError
from engine.graphs import can_use_graphs, make_capturable
from engine.launch import check_compiler
from engine.run import Run
from engine.seeds import agree_on_seed
from image_classification.checkpoint import (
    load_weights,
    read_settings,
    read_spec,
    refuse_other_classes,
)
from image_classification.data import (
    ORIGINAL_SIZE,
    ImageData,
    ImageLoader,
    dummy_dataset,
    load_dataset,
    move_to_gpu,
)
from image_classification.model import ARCHITECTURES, build_model
from image_classification.settings import DEFAULT, MODEL_SETTINGS, SETTINGS, ModelSpec, has_stem

# A validation batch is never larger, and never depends on the number of processes, so that
# neither do the bits of its result.
EVAL_BATCH_SIZE = 256


def make_run(accelerator: Accelerator, args: argparse.Namespace) -> Run:
    folder: Path = args.output_dir or default_folder(accelerator, args)
    run = Run(
        accelerator,
        latest=folder / "checkpoint.pth",
        best=folder / "model_best.pth",
        log_dir=args.log_dir or folder / "logs",
        flag="--output-dir",
        values={"best_acc1": -1.0},  # in percent; below 0 before the first epoch's end
        figure="best_acc1",
        best_of=lambda latest: latest.with_name("model_best.pth"),
        width=4,  # what `batch_sums` sums
        checkpoint_every=args.checkpoint_every,
    )
    run.epoch = args.start_epoch
    return run


def default_folder(accelerator: Accelerator, args: argparse.Namespace) -> Path:
    """`output/<arch>-<cpu|cpu4|gpu1|gpu4>`: runs side by side under one `tensorboard --logdir`."""
    arch = args.arch
    if arch is None and args.resume and str(args.resume) != "auto" and not args.evaluate:
        arch = load(args.resume).value("arch", str)
    kind, count = accelerator.device.type.replace("cuda", "gpu"), accelerator.num_processes
    place = kind if (kind, count) == ("cpu", 1) else f"{kind}{count}"
    return Path("output", f"{arch if arch in ARCHITECTURES else DEFAULT.arch}-{place}")


def settle(
    parser: ArgumentParser,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
) -> None:
    """Give every setting its value, and refuse those that do not go together."""
    found: dict[str, Any] = {}
    if checkpoint:
        spec = read_spec(checkpoint, args.arch, args.stem)
        found = read_settings(checkpoint, SETTINGS)
        found |= {"arch": spec.arch, "stem": spec.stem}
    asked_stem, asked_size = args.stem, args.image_size
    parser.settle(args, found, args.resume, accelerator.print, fixed=MODEL_SETTINGS)
    if not has_stem(args.arch):
        if asked_stem is not None:
            accelerator.print(f"=> {args.arch} is no ResNet: --stem {asked_stem} is ignored")
        args.stem = None
    is_foreign = bool(checkpoint) and found.get("image_size") is None
    if args.pretrained and not checkpoint:
        is_foreign = True
        if asked_stem is None and args.stem:
            args.stem = "stock"
    if is_foreign and asked_size is None:
        args.image_size = None  # the data decides
    if args.evaluate:
        return
    if args.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} is for all processes together and cannot be divided "
            f"by {accelerator.num_processes}: use a multiple"
        )
    if args.sync_bn and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise UserError(
            "--sync-bn works on GPUs only (torch has no SyncBatchNorm for the CPU); --no-sync-bn "
            "overrides a checkpoint's"
        )


def find_data(accelerator: Accelerator, args: argparse.Namespace) -> ImageData:
    args.seed = agree_on_seed(accelerator, args.seed)
    if args.dummy:
        accelerator.print("=> Dummy data is used!")
        args.image_size = args.image_size or ORIGINAL_SIZE
        return dummy_dataset(args.image_size)
    with accelerator.local_main_process_first():  # a node's first process downloads and decodes
        data = load_dataset(args.data, args.image_size, args.seed, args.workers, args.download)
    if args.image_size is None:
        args.image_size = data.image_size
        accelerator.print(
            f"=> the weights do not say for which size of images they are: {data.image_size} px, "
            "as is usual for images like these; --image-size chooses another"
        )
    # An evaluation reads every image once.
    device = torch.device("cpu") if args.evaluate else accelerator.device
    data, where = move_to_gpu(data, device)
    accelerator.print(
        f"=> {data.root}: {len(data.train)} training and {len(data.val)} "
        f"validation images of {len(data.classes)} classes, {where}"
    )
    return data


def set_up(
    run: Run, data: ImageData, args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[nn.Module, torch.optim.Optimizer, ImageLoader, ImageLoader]:
    """Model, optimizer, training and validation loader, as new or as `checkpoint` has them."""
    accelerator = run.accelerator
    torch.manual_seed(args.seed)
    spec = ModelSpec(args.arch, args.stem, len(data.classes), args.image_size)
    pretrained = args.pretrained and not checkpoint
    with accelerator.local_main_process_first():  # a node's first process downloads weights
        model = build_model(spec, pretrained)
    accelerator.print(
        f"=> {'using pre-trained' if pretrained else 'creating'} model "
        f"'{spec.arch}', {spec.num_classes} classes, {spec.image_size} px"
        + (f", stem {spec.stem}" if spec.stem else "")
    )
    if checkpoint:
        refuse_other_classes(checkpoint, data.classes)
        load_weights(model, checkpoint, spec.arch)
    if args.sync_bn and not args.evaluate:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(memory_format=torch.channels_last)
    if args.compile:
        check_compiler()
        # For each shape once, the last, smaller batches too: all of it in the first epoch.
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    loading = {"image_size": args.image_size, "seed": args.seed, "workers": args.workers}
    train_loader = ImageLoader(
        accelerator,
        data.train,
        train=True,
        batch_size=args.batch_size,
        mix=mixing(args, spec.num_classes),
        **loading,
    )
    size = min(args.batch_size, EVAL_BATCH_SIZE)
    val_loader = ImageLoader(accelerator, data.val, train=False, batch_size=size, **loading)
    if checkpoint and not args.evaluate:
        batches = {"batch_size": args.batch_size, "seed": args.seed, "samples": len(data.train)}
        run.resume(checkpoint, optimizer, len(train_loader), batches)
        best = checkpoint.value("best_acc1", (int, float))
        run.values["best_acc1"] = -1.0 if best is None else best
        for group in optimizer.param_groups:
            group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    run.graphed = args.compile and can_use_graphs(accelerator)
    if run.graphed:
        make_capturable(optimizer, accelerator.device)
    return *run.prepare(model, optimizer), train_loader, val_loader


def mixing(args: argparse.Namespace, num_classes: int) -> Callable[..., Any] | None:
    choices = [
        transform(alpha=alpha, num_classes=num_classes)
        for transform, alpha in ((v2.CutMix, args.cutmix), (v2.MixUp, args.mixup))
        if alpha > 0
    ]
    return v2.RandomChoice(choices) if choices else None
