"""Train and evaluate image classifiers on Tiny-ImageNet, on a CPU, a GPU or several.

    accelerate launch --config_file accelerate_configs/gpu4.yaml resnet_main.py
    python resnet_main.py sample --epochs 5 -b 64            # built-in data, no launcher
    python resnet_main.py -e --resume output/resnet/model_best.pth

pytorch/examples' imagenet/main.py with the process-group code left to Accelerate: the flags, the
printed lines and the defaults are the original's, and the batch size is that of all processes
together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torchvision.transforms import v2

import checkpoint as checkpoints
import image_checkpoint
import image_data
import image_model
import image_sources
import runtime
from image_cache import BadImageError, refuse_bad_images
from image_checkpoint import TrainingState
from image_data import ImageData, ImageLoader
from image_model import ARCHITECTURES, DEFAULT_ARCH, DEFAULT_SIZE, DEFAULT_STEM, ModelSpec
from metrics import Curves, Progress, RunningSums, Statistics, batch_sums, refuse_overflow
from runtime import (
    Preemption,
    UserError,
    derive_seed,
    non_negative_float,
    non_negative_int,
    positive_int,
)

# A validation batch is never larger, and never depends on the number of processes, so that
# neither do the bits of its result.
EVAL_BATCH_SIZE = 256


class _LeftToTheLauncher(argparse.Action):
    """The original's process-group flags."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(
            f"{self.option_strings[0]}: processes and devices are the launcher's business: "
            "accelerate launch --config_file accelerate_configs/gpu4.yaml resnet_main.py "
            "(or cpu.yaml, cpu4.yaml, gpu1.yaml, gpu4_nodes.yaml)"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runtime.ArgumentParser(description="Train image classifiers on Tiny-ImageNet")
    add = parser.add_argument
    # A table, one flag after another: the formatter would give every argument a line of its own.
    # fmt: off
    add("data", metavar="DIR", nargs="?", default=str(image_sources.TINY_IMAGENET),
        help="folder of the dataset, or `sample` for the built-in one (default: %(default)s)")
    add("-a", "--arch", metavar="ARCH",
        help=f"model architecture (default: {DEFAULT_ARCH}): {' | '.join(ARCHITECTURES)}")
    add("-j", "--workers", default=4, type=non_negative_int, metavar="N",
        help="worker processes that decode images (default: %(default)s)")
    add("--epochs", default=90, type=positive_int, metavar="N",
        help="total epochs to run (default: %(default)s)")
    add("--start-epoch", default=0, type=non_negative_int, metavar="N",
        help="epoch to start from; a checkpoint has its own")
    # Without a default here: those of image_checkpoint.SETTINGS come after a checkpoint's values.
    add("-b", "--batch-size", type=positive_int, metavar="N",
        help="images a step, over all processes together (default: 256)")
    add("--lr", "--learning-rate", dest="lr", type=non_negative_float, metavar="LR",
        help="initial learning rate (default: 0.1)")
    add("--momentum", type=non_negative_float, metavar="M", help="(default: 0.9)")
    add("--wd", "--weight-decay", dest="weight_decay", type=non_negative_float, metavar="W",
        help="weight decay (default: 1e-4)")
    add("-p", "--print-freq", default=10, type=positive_int, metavar="N",
        help="steps between two lines (default: %(default)s)")
    add("--resume", type=Path, metavar="PATH",
        help="checkpoint to continue or to evaluate, or `auto` for the newest whole one of "
        "--output-dir, if there is one")
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation set and exit")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    add("--seed", type=non_negative_int, help="makes a run repeatable (default: drawn, printed)")
    add("--dummy", action="store_true", help="fake data, to benchmark without a disk")
    # The original's end here; these are new.
    add("--image-size", type=positive_int, metavar="PX",
        help=f"side of the images that the model sees (default: {DEFAULT_SIZE})")
    add("--stem", choices=image_model.STEMS,
        help=f"first layers of a ResNet (default: {DEFAULT_STEM}): stock is torchvision's 7x7 of "
        "stride 2, stride1 the same at stride 1, cifar a 3x3 without pooling")
    add("--output-dir", default="output/resnet", type=Path, metavar="DIR",
        help="for checkpoint.pth and model_best.pth (default: %(default)s)")
    add("--log-dir", type=Path, metavar="DIR", help="for TensorBoard (default: OUTPUT_DIR/logs)")
    add("--download", action=argparse.BooleanOptionalAction, default=True,
        help="fetch Tiny-ImageNet when its default DIR is missing")
    add("--lr-schedule", choices=("step", "cosine"), default="step",
        help="step: a tenth every 30 epochs; cosine: to zero (default: %(default)s)")
    add("--warmup-epochs", default=0, type=non_negative_int, metavar="N",
        help="epochs of linearly rising learning rate before it")
    add("--label-smoothing", default=0.0, type=non_negative_float, metavar="E")
    add("--cutmix", default=0.0, type=non_negative_float, metavar="ALPHA")
    add("--mixup", default=0.0, type=non_negative_float, metavar="ALPHA",
        help="with --cutmix as well, each batch gets one of the two")
    add("--sync-bn", action="store_true", help="batch statistics over all GPUs")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpoint-every", default=0, type=non_negative_int, metavar="STEPS",
        help="also checkpoint within an epoch (default: at its end only)")
    for flag in ("--world-size", "--rank", "--dist-url", "--dist-backend", "--gpu"):
        add(flag, action=_LeftToTheLauncher, help=argparse.SUPPRESS)
    for flag in ("--multiprocessing-distributed", "--no-accel"):
        add(flag, nargs=0, action=_LeftToTheLauncher, help=argparse.SUPPRESS)
    # fmt: on
    args = parser.parse_args(argv)

    if args.arch is not None:
        image_model.check_architecture(args.arch)
    if args.label_smoothing >= 1:
        parser.error(f"--label-smoothing must be below 1, not {args.label_smoothing}")
    args.log_dir = args.log_dir or args.output_dir / "logs"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    accelerator = runtime.build_accelerator(deterministic=args.seed is not None)
    runtime.keep_freed_memory(2**25)  # a faster loader, for more memory: README, Speed
    preemption = Preemption(accelerator)
    accelerator.print(runtime.describe_run(accelerator))
    if args.sync_bn and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise UserError("--sync-bn works on GPUs only (torch has no SyncBatchNorm for the CPU)")
    if args.compile:
        runtime.check_compiler()
    if not args.evaluate and accelerator.is_main_process:
        runtime.check_writable(args.output_dir, "--output-dir")
        runtime.check_writable(args.log_dir, "--log-dir")

    latest = args.output_dir / "checkpoint.pth"
    args.resume = checkpoints.find(args.resume, latest, accelerator, needed=args.evaluate)
    checkpoint = checkpoints.load(args.resume) if args.resume else {}
    image_checkpoint.settle(args, checkpoint, accelerator)
    if not args.evaluate and args.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} is for all processes together and cannot be divided "
            f"by {accelerator.num_processes}: use a multiple"
        )
    runtime.use_deterministic_kernels(args.seed is not None)
    if checkpoint and args.seed is None:
        args.seed = checkpoints.value(checkpoint, "seed", int, args.resume)
    args.seed = runtime.agree_on_seed(accelerator, args.seed)

    if args.dummy:
        data = image_data.dummy(args.image_size)
        accelerator.print("=> Dummy data is used!")
    else:
        with accelerator.local_main_process_first():  # a node's first process downloads, decodes
            data = image_data.load(
                args.data, args.image_size, args.seed, args.workers, args.download
            )
        accelerator.print(
            f"=> {data.root}: {len(data.train)} training and {len(data.val)} "
            f"validation images of {len(data.classes)} classes"
        )
    spec = image_model.ModelSpec(args.arch, args.stem, len(data.classes), args.image_size)
    torch.manual_seed(args.seed)
    pretrained = args.pretrained and not checkpoint
    with accelerator.local_main_process_first():  # and pretrained weights
        model = image_model.build_model(spec, pretrained)
    accelerator.print(
        f"=> {'using pre-trained' if pretrained else 'creating'} model "
        f"'{spec.arch}', {len(data.classes)} classes, {args.image_size} px"
        + (f", stem {spec.stem}" if spec.stem else "")
    )
    if checkpoint:
        image_checkpoint.refuse_other_classes(checkpoint, data.classes, args.resume)
        image_checkpoint.load_weights(model, checkpoint, args.resume, spec.arch)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    try:
        if args.evaluate:
            model = accelerator.prepare_model(model, evaluation_mode=True)
            val_loader = evaluation_loader(accelerator, data, args)
            val = evaluate(accelerator, model, val_loader, preemption.check, args)
            accelerator.print(summary(val))
        else:
            fit(accelerator, preemption, model, spec, data, checkpoint, args)
    except BadImageError:
        refuse_bad_images(data.root, data.train.paths + data.val.paths, args.workers)
    accelerator.end_training()


def fit(
    accelerator: Accelerator,
    preemption: Preemption,
    model: nn.Module,
    spec: ModelSpec,
    data: ImageData,
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Train from `checkpoint`, or from the start when it is empty, to the last epoch.

    Raises:
        Stopped: by a signal, once a checkpoint is on the disk.
    """
    latest, best = args.output_dir / "checkpoint.pth", args.output_dir / "model_best.pth"
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    train_loader = ImageLoader(
        accelerator,
        data.train,
        batch_size=args.batch_size,
        seed=args.seed,
        image_size=args.image_size,
        train=True,
        workers=args.workers,
        mix=mixing(args, len(data.classes)),
    )
    val_loader = evaluation_loader(accelerator, data, args)
    run = TrainingState(args.start_epoch)
    accelerator.print(
        f"=> {args.batch_size} images a step, {args.batch_size // accelerator.num_processes} a "
        f"process; checkpoints in {args.output_dir}, curves in {args.log_dir}"
    )
    if checkpoint:
        run = image_checkpoint.restore(
            checkpoint, optimizer, len(data.train), len(train_loader), args
        )
        accelerator.print(
            f"=> loaded checkpoint '{args.resume}' (epoch {run.epoch}, step {run.step})"
        )
    elif latest.exists():
        accelerator.print(
            f"=> {latest} and {best} of an earlier run will be replaced at the first epoch's end; "
            "--resume would continue it"
        )
    if run.epoch >= args.epochs:
        accelerator.print(f"=> {run.epoch} epochs are done: raise --epochs to go on")
        return
    for group in optimizer.param_groups:
        # The arguments of this run, not of the one resumed, and never silently.
        now = {"initial_lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay}
        before = {name: group.get(name, value) for name, value in now.items()}
        if before != now:
            accelerator.print(f"=> {args.resume} was trained with {before}, this run has {now}")
        group.update(
            lr=args.lr, initial_lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
    model, optimizer = accelerator.prepare(model, optimizer)

    def save(*copies: Path) -> None:
        """Every process calls this; the main one writes."""
        refuse_overflow(model, run.sums, run.step)
        sums = run.sums.carry() if run.sums is not None else None
        if accelerator.is_main_process:
            writer.save(
                {
                    **spec._asdict(),
                    "classes": data.classes,
                    "seed": args.seed,
                    "batch_size": args.batch_size,
                    "samples": len(data.train),
                    "epoch": run.epoch,
                    "step": run.step,
                    "sums": sums,
                    "best_acc1": run.best_acc1,
                    "state_dict": accelerator.unwrap_model(model).state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": {"last_epoch": run.epoch, "base_lrs": [args.lr]},
                },
                *copies,
            )

    def end_of_step() -> None:
        """Every process calls this, in training and validation."""
        writer.stop_if_asked(accelerator, preemption, save)

    curves = Curves(accelerator, args.log_dir, first_epoch=run.epoch)
    has_best = best.exists()
    with checkpoints.Writer(latest, args.resume) as writer, preemption.deferred():
        while run.epoch < args.epochs:
            lr = learning_rate(run.epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train, rate = train_epoch(
                accelerator, model, optimizer, train_loader, run, save, end_of_step, args
            )
            share_buffers(accelerator, model)
            bare = accelerator.unwrap_model(model)
            val = evaluate(accelerator, bare, val_loader, end_of_step, args)
            accelerator.print(summary(val))
            if not math.isfinite(val.loss):
                raise UserError(
                    f"the validation loss is not finite after epoch {run.epoch} (step "
                    f"{len(train_loader)}): lower --lr ({args.lr}); {latest} is from before"
                )
            # The point before the checkpoint: killed in between, the run draws it once more, and
            # the later one replaces it.
            curves.add(
                run.epoch,
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
            )
            # Resumed into another folder, the run has a best figure but not its file.
            is_best = val.acc1 > run.best_acc1 or not has_best
            run.best_acc1, has_best = max(val.acc1, run.best_acc1), True
            run.epoch, run.step, run.sums = run.epoch + 1, 0, None
            save(*([best] if is_best else []))
    curves.close()
    accelerator.print(
        f"=> best Acc@1 {run.best_acc1:.3f}: {best}\n=> curves: tensorboard --logdir {args.log_dir}"
    )


def evaluation_loader(
    accelerator: Accelerator, data: ImageData, args: argparse.Namespace
) -> ImageLoader:
    return ImageLoader(
        accelerator,
        data.val,
        batch_size=min(args.batch_size, EVAL_BATCH_SIZE),
        seed=args.seed,
        image_size=args.image_size,
        train=False,
        workers=args.workers,
    )


def mixing(args: argparse.Namespace, num_classes: int) -> Callable[..., Any] | None:
    choices = [
        transform(alpha=alpha, num_classes=num_classes)
        for transform, alpha in ((v2.CutMix, args.cutmix), (v2.MixUp, args.mixup))
        if alpha > 0
    ]
    return v2.RandomChoice(choices) if choices else None


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """A pure function of the epoch, so that resuming needs no scheduler's state."""
    if epoch < args.warmup_epochs:
        return float(args.lr * (epoch + 1) / (args.warmup_epochs + 1))
    if args.lr_schedule == "step":
        return float(args.lr * 0.1 ** (epoch // 30))
    length = max(args.epochs - args.warmup_epochs, 1)
    progress = min((epoch - args.warmup_epochs) / length, 1)
    return float(args.lr * (0.5 + 0.5 * math.cos(math.pi * progress)))


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: ImageLoader,
    run: TrainingState,
    save: Callable[[], None],
    end_of_step: Callable[[], None],
    args: argparse.Namespace,
) -> tuple[Statistics, float]:
    """Train the rest of `run.epoch`; returns its statistics and images per second."""
    model.train()
    run.sums, run.carried = RunningSums(accelerator, run.carried), None
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
            torch.manual_seed(
                derive_seed("dropout", args.seed, run.epoch, step, accelerator.process_index)
            )
            logits = model(batch.images)
            losses = F.cross_entropy(
                logits,
                batch.targets if batch.soft_targets is None else batch.soft_targets,
                reduction="none",
                label_smoothing=args.label_smoothing,
            )
            # DistributedDataParallel averages over processes: this makes it the mean over the
            # global batch, also where padding makes the slices unequal.
            share = accelerator.num_processes / batch.size
            accelerator.backward(torch.where(batch.weights > 0, losses, 0).sum() * share)
            optimizer.step()
            optimizer.zero_grad()

            run.sums.update(batch_sums(logits, batch.targets, losses, batch.weights), step)
            run.step = step + 1
            if progress.tick(step):
                progress.display(step, *run.sums.read())
            due = args.checkpoint_every and run.step % args.checkpoint_every == 0
            if due and run.step < len(loader):  # the epoch's end has a checkpoint of its own
                save()
            end_of_step()
        refuse_overflow(model, run.sums, run.step)
        total = run.sums.read()[1]
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch normalisation cannot train on one image of this size a process: use a "
            f"--batch-size of at least {2 * accelerator.num_processes}"
        ) from error
    except FloatingPointError as error:
        raise UserError(
            f"the loss is not finite in epoch {run.epoch} at step {error}: lower --lr "
            f"({args.lr}); checkpoints in {args.output_dir} are from before"
        ) from error
    return total, progress.rate()


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the main one's running statistics, which the checkpoint holds.

    DistributedDataParallel does so before a training step, not after the last one.
    """
    if accelerator.num_processes > 1:
        for buffer in accelerator.unwrap_model(model).buffers():
            buffer.copy_(broadcast(buffer))


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: ImageLoader,
    end_of_step: Callable[[], None],
    args: argparse.Namespace,
) -> Statistics:
    """Statistics over the validation set, the same bits on any number of processes.

    Batches go whole to the processes in turn, and their sums are added in the order of the
    batches. `model` is the bare module: processes may have one batch more or less than others.
    """
    model.eval()
    rounds = -(-len(loader) // accelerator.num_processes)
    sums = RunningSums(accelerator)
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
            progress.display(step, *sums.read(refuse_nan=False))
        end_of_step()
    while len(rows) < rounds:  # a process without a batch in the last round
        rows.append(torch.zeros_like(sums.total))
        end_of_step()
    # [processes, rounds, 4] to the order of the batches.
    gathered = accelerator.gather(torch.stack(rows)[None]).cpu()
    return Statistics.from_sums(gathered.transpose(0, 1).reshape(-1, 4).sum(0).tolist())


def summary(statistics: Statistics) -> str:
    return f" * Acc@1 {statistics.acc1:.3f} Acc@5 {statistics.acc5:.3f} Loss {statistics.loss:.3f}"


if __name__ == "__main__":
    runtime.run_script(main)
