"""Train and evaluate image classifiers on Tiny-ImageNet, on a CPU, a GPU or several.

    accelerate launch --config_file accelerate_configs/gpu4.yaml resnet_main.py
    python resnet_main.py sample --output-dir output/sample  # built-in data, no launcher
    python resnet_main.py -e --resume output/resnet18-gpu4/model_best.pth

pytorch/examples' imagenet/main.py with the process-group code left to Accelerate: the flags, the
printed lines and the default hyperparameters are the original's, and the batch size is that of
all processes together.

On the first 20 classes of Tiny-ImageNet, ResNet-18, two CPU cores, bf16, 8 epochs at about 90
images/s: Acc@1 44.4, Acc@5 79.0 (README.md, "Results", has the command).
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before what is slow: see there

# isort: split

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine import cli
from image_classification.settings import DEFAULT, SETTINGS, STEMS, TINY_IMAGENET


def launchers_business(_: str) -> NoReturn:
    """The type of the original's process-group flags."""
    raise argparse.ArgumentTypeError(
        "processes and devices are the launcher's business: accelerate launch --config_file "
        "accelerate_configs/gpu4.yaml resnet_main.py (or cpu.yaml, cpu4.yaml, gpu1.yaml, "
        "gpu4_nodes.yaml)"
    )


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__, SETTINGS)
    # A table, one flag after another: the formatter would give every argument a line of its own.
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("data", type=cli.nonempty, metavar="DIR", nargs="?", default=str(TINY_IMAGENET),
        help="folder of the dataset, or `sample` for the built-in one")
    add("--image-size", type=cli.positive_int, default=DEFAULT.image_size, metavar="PX",
        help="side of the images that the model sees, in pixels; of weights of other programs "
        "224 px, unless the images are small")
    add("-j", "--workers", type=cli.non_negative_int, default=4, metavar="N",
        help="worker processes of a node that decode large images")
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
    add("--sync-bn", action=argparse.BooleanOptionalAction, default=False,
        help="batch statistics over all GPUs (default: no)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the model, on one GPU with CUDA graphs (default: no)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.positive_int, default=90, metavar="N", help="total epochs to run")
    add("--start-epoch", type=cli.non_negative_int, default=0, metavar="N",
        help="epoch to start from; a checkpoint has its own")
    add("-b", "--batch-size", type=cli.positive_int, default=256, metavar="N",
        help="images a step, over all processes together")
    add("--lr", "--learning-rate", dest="lr", type=cli.non_negative_float, default=0.1,
        metavar="LR", help="initial learning rate, of the whole batch")
    add("--momentum", type=cli.non_negative_float, default=0.9, metavar="M",
        help="momentum of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", type=cli.non_negative_float, default=1e-4,
        metavar="W", help="weight decay, of all parameters")
    add("--lr-schedule", choices=("step", "cosine"), default="step",
        help="step: a tenth every 30 epochs; cosine: to zero")
    add("--warmup-epochs", type=cli.non_negative_int, default=0, metavar="N",
        help="epochs of linearly rising learning rate before it")
    add("--label-smoothing", type=cli.fraction, default=0.0, metavar="E",
        help="share of a target that all classes get")
    add("--cutmix", type=cli.non_negative_float, default=0.0, metavar="ALPHA",
        help="parameter of its Beta distribution; 0: none")
    add("--mixup", type=cli.non_negative_float, default=0.0, metavar="ALPHA",
        help="0: none; with --cutmix as well, each batch gets one of the two")
    add("--seed", type=cli.non_negative_int, metavar="N",
        help="makes a run repeatable; else drawn and printed")
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

from engine.checkpoints import Checkpoint, load
from engine.graphs import GraphedStep, Step
from engine.launch import build_accelerator, describe_run, keep_freed_memory
from engine.metrics import Sums
from engine.run import Run
from engine.seeds import seed_generators, use_deterministic_kernels
from image_classification.cache import BadImageError, refuse_bad_images
from image_classification.data import ImageData, ImageLoader
from image_classification.metrics import Progress, Statistics, batch_sums
from image_classification.model import check_architecture
from image_classification.training import find_data, make_run, set_up, settle


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse(argv)
    if args.arch is not None:
        check_architecture(args.arch)
    seeded = args.seed is not None
    accelerator = build_accelerator(deterministic=seeded)
    use_deterministic_kernels(seeded)
    keep_freed_memory(2**25)  # a faster loader, for more memory: README, Speed
    run = make_run(accelerator, args)
    accelerator.print(describe_run(accelerator))
    splits = [("DIR", Path(args.data, split)) for split in ("train", "val")]
    args.resume = run.find(args.resume, args.evaluate, args.overwrite, inputs=splits)
    checkpoint = load(args.resume) if args.resume else Checkpoint()
    settle(parser, args, checkpoint, accelerator)
    data = find_data(accelerator, args)
    model, optimizer, train_loader, val_loader = set_up(run, data, args, checkpoint)
    checkpoint.clear()  # model and optimizer have what they need of it
    if args.evaluate and not (args.resume or args.pretrained):
        accelerator.print("=> neither --resume nor --pretrained: the figures of random weights")
    try:
        if args.evaluate:
            accelerator.print(evaluate(run, model, val_loader, args))
        else:
            fit(run, model, optimizer, train_loader, val_loader, data, args)
    except BadImageError as error:
        paths = data.train.paths + data.val.paths
        refuse_bad_images(error, data.root, paths, args.workers, accelerator.num_processes)


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

    def contents() -> dict[str, Any]:
        return {
            **{name: getattr(args, name) for name in SETTINGS},
            "classes": data.classes,
            "num_classes": len(data.classes),
            "samples": len(data.train),
            # The original's StepLR resumes from this.
            "scheduler": {"last_epoch": run.epoch, "base_lrs": [args.lr]},
        }

    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr  # of the original's scheduler
    train_step = training_step(run, model, optimizer, args)
    with run.training(contents):
        for epoch in run.epochs(args.epochs):
            lr = learning_rate(epoch, args)
            run.set_learning_rate(lr)
            train, rate = train_epoch(run, model, train_step, train_loader, args)
            val = evaluate(run, model, val_loader, args)
            accelerator.print(val)
            is_best = val.acc1 > run.values["best_acc1"]
            run.values["best_acc1"] = max(val.acc1, run.values["best_acc1"])
            run.end_of_epoch(
                {
                    "Loss/train": train.loss,
                    "Acc@1/train": train.acc1,
                    "Acc@5/train": train.acc5,
                    "Loss/val": val.loss,
                    "Acc@1/val": val.acc1,
                    "Acc@5/val": val.acc5,
                    "LR": lr,
                    "Throughput/train": rate,
                },
                is_best,
            )
    accelerator.print(
        f"=> best Acc@1 {run.values['best_acc1']:.3f}: {run.best}\n"
        f"=> curves: tensorboard --logdir {shlex.quote(str(run.log_dir))}"
    )


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
    accelerator = run.accelerator

    def step(
        images: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        *soft_targets: torch.Tensor,
        size: int,
    ) -> tuple[torch.Tensor, ...]:
        logits = model(images)
        losses = F.cross_entropy(
            logits,
            soft_targets[0] if soft_targets else targets,
            reduction="none",
            label_smoothing=args.label_smoothing,
        )
        # DistributedDataParallel averages over processes: this makes it the mean over the global
        # batch, also where padding makes the slices unequal.
        share = accelerator.num_processes / size
        accelerator.backward(torch.where(weights > 0, losses, 0).sum() * share)
        optimizer.step()
        optimizer.zero_grad()
        return (batch_sums(logits, targets, losses, weights),)

    return GraphedStep(step) if run.graphed else step


def train_epoch(
    run: Run, model: nn.Module, train_step: Step, loader: ImageLoader, args: argparse.Namespace
) -> tuple[Statistics, float]:
    """Train the rest of `run.epoch`; returns its statistics and images per second."""
    accelerator = run.accelerator
    model.train()
    sums = run.begin_epoch(len(loader))
    progress = Progress(
        accelerator,
        f"Epoch: [{run.epoch}]",
        len(loader),
        args.print_freq,
        batch_size=args.batch_size,
        start=run.step,
    )
    try:
        for step, batch in progress.steps(loader.epoch(run.epoch, run.step)):
            # Dropout and stochastic depth of a step follow from what it is, not from the past.
            rank = accelerator.process_index
            seed_generators(accelerator.device, "dropout", args.seed, run.epoch, step, rank)
            soft_targets = () if batch.soft_targets is None else (batch.soft_targets,)
            inputs = (batch.images, batch.targets, batch.weights, *soft_targets)
            (values,) = train_step(*inputs, size=batch.size)
            sums.update(values, step)
            if progress.tick(step):
                progress.display(step, *map(Statistics.from_sums, sums.read()))
            run.end_of_step(step)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise cli.UserError(
            f"batch normalisation cannot train on one image of this size a process: use a "
            f"--batch-size of at least {2 * accelerator.num_processes}"
        ) from error
    return Statistics.from_sums(run.end_of_training_steps()), progress.rate()


@torch.inference_mode()
def evaluate(
    run: Run, model: nn.Module, loader: ImageLoader, args: argparse.Namespace
) -> Statistics:
    """Statistics over the validation set, the same bits on any number of processes.

    Batches go whole to the processes in turn, and their sums are added in the order of the
    batches.
    """
    accelerator = run.accelerator
    # The bare module: one process may have a batch more than another.
    model = accelerator.unwrap_model(model)
    model.eval()
    rounds = -(-len(loader) // accelerator.num_processes)
    sums = Sums(accelerator, run.width)
    rows = []
    progress = Progress(
        accelerator,
        "Test: ",
        rounds,
        args.print_freq,
        show_data=False,
        batch_size=loader.batch_size * accelerator.num_processes,
    )
    for step, batch in progress.steps(loader.epoch(0)):
        logits = model(batch.images)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        rows.append(batch_sums(logits, batch.targets, losses, batch.weights))
        sums.update(rows[-1], step)
        if progress.tick(step) and step < len(loader) // accelerator.num_processes:
            progress.display(step, *map(Statistics.from_sums, sums.read(refuse_nan=False)))
        run.check()
    while len(rows) < rounds:  # a process without a batch in the last round
        rows.append(torch.zeros_like(sums.total))
        run.check()
    # [processes, rounds, 5] to the order of the batches.
    gathered = accelerator.gather(torch.stack(rows)[None]).cpu()
    return Statistics.from_sums(gathered.transpose(0, 1).flatten(0, 1).sum(0).tolist())


if __name__ == "__main__":
    run_script(main)
