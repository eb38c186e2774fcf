"""Train and evaluate image classifiers on Tiny-ImageNet, on a CPU, a GPU or several.

    accelerate launch --config_file accelerate_configs/gpu4.yaml resnet_main.py
    python resnet_main.py sample --output-dir output/sample  # built-in data, no launcher
    python resnet_main.py -e --resume output/resnet18-gpu4/model_best.pth

pytorch/examples' imagenet/main.py with the process-group code left to Accelerate: the flags, the
printed lines and the default hyperparameters are the original's, and the batch size is that of
all processes together.

On the first 20 classes of Tiny-ImageNet at 32 px, ResNet-18, 30 epochs in float32, mean of three
seeds: Acc@1 51.1, Acc@5 82.7 (docs/images.md, "Results", has the flags).
"""

from __future__ import annotations

# First, before slow imports: see engine/stop.py.
from engine.stop import check_flags, handlers_put_back, run_script

# isort: split

import argparse
import contextlib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine import cli
from image_classification.settings import DEFAULT, SETTINGS, STEMS, TINY_IMAGENET, ModelSpec


def launchers_business(_: str) -> NoReturn:
    """The type of the original's process-group flags."""
    raise argparse.ArgumentTypeError(
        "processes and devices are the launcher's business: accelerate launch --config_file "
        "accelerate_configs/gpu4.yaml resnet_main.py (or cpu.yaml, cpu4.yaml, gpu1.yaml, "
        "gpu4_nodes.yaml)"
    )


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__, SETTINGS, cli.LAUNCHING)
    # A table, one flag after another: the formatter would give every argument a line of its own.
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("data", type=cli.nonempty, metavar="DIR", nargs="?", default=str(TINY_IMAGENET),
        help="folder of the dataset, or `sample` for the built-in one")
    add("--image-size", type=cli.positive_int, default=DEFAULT.image_size, metavar="PX",
        help="side of the images that the model sees, in pixels; with weights of other programs "
        "224, unless the images are small")
    add("-j", "--workers", type=cli.non_negative_int, default=4, metavar="N",
        help="worker processes of a node that decode large images")
    add("--decode-once", type=cli.non_negative_int, default=0, metavar="PX",
        help="decode large images once, to PX x PX, into a file: faster from the second epoch on; "
        "0: anew in every epoch")
    add("--download", action=argparse.BooleanOptionalAction, default=True,
        help="fetch Tiny-ImageNet (248 MB) when its default DIR is missing (default: yes)")
    add("--dummy", action="store_true", help="fake data, to benchmark without a disk")
    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", metavar="ARCH", default=DEFAULT.arch,
        help="one of torchvision's architectures; `-a help` lists them")
    add("--stem", choices=STEMS, default=DEFAULT.stem,
        help="first layers of a ResNet: stock is torchvision's 7x7 of stride 2, stride1 the same "
        "at stride 1, cifar a 3x3 without pooling")
    add("--pretrained", action="store_true",
        help="start from torchvision's ImageNet weights; with its stem unless --stem is given")
    add("--weights", type=cli.pathname, metavar="PATH",
        help="start a new run from this checkpoint's weights, with a new last layer if its "
        "classes differ")
    add("--sync-bn", action=argparse.BooleanOptionalAction, default=False,
        help="batch statistics over all GPUs (default: no)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the model, on one GPU with CUDA graphs unless in fp16 (default: no)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.positive_int, default=90, metavar="N", help="total epochs to run")
    add("--start-epoch", type=cli.non_negative_int, default=0, metavar="N",
        help="epoch to start from; a checkpoint has its own")
    add("-b", "--batch-size", type=cli.positive_int, default=256, metavar="N",
        help="images a step, over all processes together")
    add("--gradient-accumulation-steps", type=cli.positive_int, default=1, metavar="N",
        help="parts of each process's share of a batch that are computed one after the other: one "
        "process with 4 trains what four do, in less memory")
    add("--lr", "--learning-rate", dest="lr", type=cli.non_negative_float, default=0.1,
        metavar="LR", help="initial learning rate, for the global batch")
    add("--momentum", type=cli.non_negative_float, default=0.9, metavar="M",
        help="momentum of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", type=cli.non_negative_float, default=1e-4,
        metavar="W", help="weight decay, of all parameters")
    add("--lr-schedule", choices=("step", "cosine"), default="step",
        help="step: a tenth every 30 epochs; cosine: to zero")
    add("--warmup-epochs", type=cli.non_negative_int, default=0, metavar="N",
        help="epochs in which the learning rate rises linearly, before the schedule")
    add("--label-smoothing", type=cli.fraction, default=0.0, metavar="E",
        help="share of a target that is spread over all classes")
    add("--cutmix", type=cli.non_negative_float, default=0.0, metavar="ALPHA",
        help="parameter of CutMix's Beta distribution; 0: none")
    add("--mixup", type=cli.non_negative_float, default=0.0, metavar="ALPHA",
        help="the same of MixUp; with both, each batch gets one of the two")
    add("--seed", type=cli.non_negative_int, metavar="N",
        help="makes a run repeatable; drawn and printed if not given")
    add = parser.add_argument_group("run").add_argument
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation set and exit")
    add("--resume", type=cli.pathname, metavar="PATH",
        help="checkpoint to continue or to evaluate, or `auto` for the newest whole one of "
        "--output-dir, if there is one")
    add("--overwrite", action="store_true", help="begin anew where a run is")
    add("--checkpoint-every", type=cli.non_negative_int, default=0, metavar="STEPS",
        help="also checkpoint within an epoch; 0: at its end only")
    add = parser.add_argument_group("output").add_argument
    add("-p", "--print-freq", type=cli.positive_int, default=10, metavar="N",
        help="steps between two lines")
    add("--output-dir", type=cli.pathname, metavar="DIR",
        help="for checkpoint.pth and model_best.pth, else output/ARCH-(cpu|cpu4|gpu1|gpu4)")
    add("--log-dir", type=cli.pathname, metavar="DIR", help="for TensorBoard, else OUTPUT_DIR/logs")
    for flag in ("--world-size", "--rank", "--dist-url", "--dist-backend", "--gpu",
                 "--multiprocessing-distributed", "--no-accel"):
        parser.add_argument(flag, nargs="?", const="", type=launchers_business,
                            help=argparse.SUPPRESS)
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser())


import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from engine.checkpoints import Checkpoint
from engine.graphs import GraphedStep, Step, can_use_graphs, make_capturable
from engine.launch import build_accelerator, check_compiler, describe_run, keep_freed_memory
from engine.metrics import Means, Sums, sum_of_parts
from engine.run import Run
from engine.seeds import agree_on_seed, use_deterministic_kernels
from image_classification.augment import fast_format
from image_classification.cache import BadImageError, refuse_bad_images
from image_classification.checkpoint import (
    default_folder,
    load,
    load_weights,
    refuse_other_classes,
    settle,
)
from image_classification.data import ImageData, ImageLoader, find_data, identity, move_to_gpu
from image_classification.folders import readable_names
from image_classification.metrics import METRICS, Progress, batch_sums, summary
from image_classification.model import build_model, check_architecture

# At most, for validation. It does not depend on the number of processes, and so the bits of the
# result do not.
EVAL_BATCH_SIZE = 256


@handlers_put_back()
def main(argv: Sequence[str] | None = None) -> None:
    run, args, checkpoint = begin(argv)
    data = find_data(run.accelerator, args)
    model, optimizer, train_loader, val_loader = build(run, data, args, checkpoint)
    for source in (checkpoint, args.origin):
        source.clear()  # model and optimizer have what they need of it
    try:
        if args.evaluate:
            if not (args.resume or args.pretrained):
                run.accelerator.print(
                    "=> neither --resume nor --pretrained: the figures of random weights"
                )
            run.accelerator.print(summary(evaluate(run, model, val_loader, args)))
        else:
            fit(run, model, optimizer, train_loader, val_loader, data, args)
    except BadImageError as error:
        paths = data.train.paths + data.val.paths
        refuse_bad_images(error, data.root, paths, args.workers, run.accelerator.num_processes)


def begin(argv: Sequence[str] | None) -> tuple[Run, argparse.Namespace, Checkpoint]:
    """Flags, accelerator, the run's place, and the checkpoint that it goes on from, if any."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.arch is not None:
        check_architecture(args.arch)
    if args.weights and (args.pretrained or args.evaluate):
        parser.error("--weights begins a training: without --pretrained; -e evaluates --resume")
    args.seeded = args.seed is not None
    accelerator = build_accelerator()
    keep_freed_memory(2**25)  # a faster loader, for more memory: docs/speed.md
    folder: Path = args.output_dir or default_folder(accelerator, args)
    run = Run(
        accelerator,
        latest=folder / "checkpoint.pth",
        best=folder / "model_best.pth",
        log_dir=args.log_dir or folder / "logs",
        flag="--output-dir",
        metrics=[*METRICS],
        figure="best_acc1",
        best_figure=-1.0,
        checkpoint_every=args.checkpoint_every,
        epoch=args.start_epoch,
    )
    accelerator.print(describe_run(accelerator))
    splits = [("DIR", Path(args.data, split)) for split in ("train", "val")]
    args.resume = run.find(args.resume, args.evaluate, args.overwrite, inputs=splits)
    checkpoint = load(args.resume) if args.resume else Checkpoint()
    args.origin = load(args.weights) if args.weights and not checkpoint else Checkpoint()
    run.changed = settle(parser, args, checkpoint, accelerator)
    args.seed = agree_on_seed(accelerator, args.seed)
    use_deterministic_kernels(accelerator, args.seeded)
    return run, args, checkpoint


def build(
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
    elif args.origin:
        is_other = args.origin.get("classes") != data.classes
        new = load_weights(model, args.origin, spec.arch, new_head=is_other)
        accelerator.print(f"=> weights of {args.weights}; new: {', '.join(new) or 'nothing'}")
    if args.sync_bn and not args.evaluate:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(memory_format=fast_format(accelerator.device))
    if args.compile:
        check_compiler()
        # Once for each shape, that of the smaller last batch too: all in the first epoch.
        model.compile(dynamic=False)

    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    run.graphed = args.compile and can_use_graphs(accelerator)
    if run.graphed:
        make_capturable(optimizer, accelerator.device)
    model, optimizer = run.prepare(model, optimizer)

    choices = [
        transform(alpha=alpha, num_classes=spec.num_classes)
        for transform, alpha in ((v2.CutMix, args.cutmix), (v2.MixUp, args.mixup))
        if alpha > 0
    ]
    loading = {"image_size": args.image_size, "seed": args.seed, "workers": args.workers}
    train_loader = ImageLoader(
        accelerator,
        data.train,
        train=True,
        batch_size=args.batch_size,
        mix=v2.RandomChoice(choices) if choices else None,
        parts=args.gradient_accumulation_steps,
        **loading,
    )
    size = min(args.batch_size, EVAL_BATCH_SIZE)
    val_loader = ImageLoader(accelerator, data.val, train=False, batch_size=size, **loading)

    if not args.evaluate:
        run.measured_on = identity(data.val, data, args.image_size)
        trained_on = identity(data.train, data)
        batches = {"batch_size": args.batch_size, "seed": args.seed, "trained_on": trained_on}
        run.resume(checkpoint, optimizer, len(train_loader), batches, args.epochs)
        for group in optimizer.param_groups:
            group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    return model, optimizer, train_loader, val_loader


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_loader: ImageLoader,
    val_loader: ImageLoader,
    data: ImageData,
    args: argparse.Namespace,
) -> None:
    """Train to the last epoch.

    Raises:
        Stopped: by a signal, once a checkpoint is on the disk.
    """
    accelerator = run.accelerator
    accelerator.print(
        f"=> {args.batch_size} images a step, {args.batch_size // accelerator.num_processes} a "
        f"process; checkpoints in {run.latest.parent}, curves in {run.log_dir}"
    )

    names = readable_names(data.root, data.classes)  # once, and not from a folder that has gone

    def contents() -> dict[str, Any]:
        """What a checkpoint holds beside what the run itself adds (`Run.save`)."""
        # The original goes on with the rate in the file: that of the epoch under way.
        run.set_learning_rate(learning_rate(run.epoch, args))
        return {
            **{name: getattr(args, name) for name in SETTINGS},
            "seeded": args.seeded,
            "classes": data.classes,
            "names": names,
            "whole_side": data.whole_side,
            "num_classes": len(data.classes),
            "scheduler": {"last_epoch": run.epoch, "base_lrs": [args.lr]},  # of the original
        }

    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr  # of the original's scheduler
    train_step = training_step(run, model, optimizer, args)
    first = run.epoch
    with run.training(contents):
        for epoch in run.epochs(args.epochs):
            if epoch == first + 1:  # what an epoch needs of the GPU's memory is known by now
                move_to_gpu(accelerator, train_loader, val_loader)
            lr = learning_rate(epoch, args)
            run.set_learning_rate(lr)
            train, rate = train_epoch(run, model, train_step, train_loader, args)
            val = evaluate(run, model, val_loader, args)
            accelerator.print(summary(val))
            scalars = {f"{name}/train": value for name, value in train.items()}
            scalars |= {f"{name}/val": value for name, value in val.items()}
            scalars["LR"] = lr
            if rate is not None:  # it is None for an epoch resumed after its last step
                scalars["Throughput/train"] = rate
            run.end_of_epoch(scalars, val["Acc@1"])
    if run.has_best and accelerator.is_main_process:
        kept = run.best if run.holds_best(run.best) else "of an epoch that is not kept here"
        print(f"=> best Acc@1 {run.best_figure:.3f}: {kept}")
    accelerator.print(f"=> curves: tensorboard --logdir {shlex.quote(str(run.log_dir))}")


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """A pure function of the epoch, so that resuming needs no scheduler's state."""
    if epoch < args.warmup_epochs:
        return float(args.lr * (epoch + 1) / (args.warmup_epochs + 1))
    if args.lr_schedule == "step":
        return float(args.lr * 0.1 ** (epoch // 30))
    length = max(args.epochs - args.warmup_epochs, 1)
    progress = min((epoch - args.warmup_epochs) / length, 1)
    return float(args.lr * (0.5 + 0.5 * math.cos(math.pi * progress)))


def training_step(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> Step:
    """A step as a function of its batch; with --compile a GPU replays it as a CUDA graph."""
    accelerator, parts = run.accelerator, args.gradient_accumulation_steps
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def step(*batch: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        sums = []
        chunks = zip(*(tensor.chunk(parts) for tensor in batch), strict=True)
        for part, (images, targets, weights, *soft_targets) in enumerate(chunks):
            # A part is what a process of its own would be. As DistributedDataParallel has it, the
            # main process's first one alone moves the running statistics.
            run.seed_dropout(args.seed, part, parts)
            for norm in norms:
                norm.track_running_stats = part == 0
            is_last = part == parts - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                logits = model(images)
                losses = F.cross_entropy(
                    logits,
                    soft_targets[0] if soft_targets else targets,
                    reduction="none",
                    label_smoothing=args.label_smoothing,
                )
                # DistributedDataParallel averages over processes: this makes it the mean over the
                # global batch, also where padding makes the parts unequal.
                share = accelerator.num_processes / size
                accelerator.backward(torch.where(weights > 0, losses, 0).sum() * share)
            sums.append(batch_sums(logits, targets, losses, weights))
        optimizer.step()
        optimizer.zero_grad()
        return (sum_of_parts(sums),)

    return GraphedStep(step, optimizer.zero_grad) if run.graphed else step


def train_epoch(
    run: Run, model: nn.Module, train_step: Step, loader: ImageLoader, args: argparse.Namespace
) -> tuple[Means, float | None]:
    """Train the rest of `run.epoch`; returns the epoch's means and images per second."""
    accelerator = run.accelerator
    model.train()
    sums = run.begin_epoch(len(loader))
    progress = Progress(
        accelerator, f"Epoch: [{run.epoch}]", len(loader), args.print_freq, start=run.step
    )
    try:
        for step, batch in progress.steps(loader.epoch(run.epoch, run.step)):
            run.seed_dropout(args.seed, 0, args.gradient_accumulation_steps)
            soft_targets = () if batch.soft_targets is None else (batch.soft_targets,)
            inputs = (batch.images, batch.targets, batch.weights, *soft_targets)
            (values,) = train_step(*inputs, size=batch.size)
            sums.mark()
            sums.update(values, step)
            if progress.tick(step, batch.size):
                progress.display(step, *sums.read())
            run.end_of_step(step)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        least = 2 * accelerator.num_processes * args.gradient_accumulation_steps
        raise cli.UserError(
            f"batch normalisation cannot train on one image of this size a process or part: use a "
            f"--batch-size of at least {least}"
        ) from error
    return run.end_of_training_steps(), progress.rate()


@torch.inference_mode()
def evaluate(run: Run, model: nn.Module, loader: ImageLoader, args: argparse.Namespace) -> Means:
    """Means over the validation set, the same bits on any number of processes.

    The processes take whole batches in turn. Their sums are added in the order of the batches.
    """
    accelerator = run.accelerator
    # The bare module: one process may have a batch more than another.
    model = accelerator.unwrap_model(model)
    model.eval()
    rounds = -(-len(loader) // accelerator.num_processes)
    sums = Sums(accelerator, run.metrics)
    rows = []
    progress = Progress(accelerator, "Test: ", rounds, args.print_freq, show_data=False)
    for step, batch in progress.steps(loader.epoch(0)):
        logits = model(batch.images)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        rows.append(batch_sums(logits, batch.targets, losses, batch.weights))
        sums.mark()
        sums.update(rows[-1], step)
        is_due = progress.tick(step, batch.size * accelerator.num_processes)
        if is_due and step < len(loader) // accelerator.num_processes:
            progress.display(step, *sums.read(refuse_nan=False))
        run.check()
    while len(rows) < rounds:  # a process without a batch in the last round
        rows.append(torch.zeros_like(sums.total))
        run.check()
    # [processes, rounds, sums] to the order of the batches.
    gathered = accelerator.gather(torch.stack(rows)[None]).cpu()
    return sums.means(gathered.transpose(0, 1).flatten(0, 1).sum(0))


if __name__ == "__main__":
    run_script(main)
