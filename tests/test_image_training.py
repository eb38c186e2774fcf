"""The training of image classifiers, which a plain loop of torch's own parts follows step by step.

The loop takes the kit's batches as they are before CutMix and MixUp. That the crops in them change
from sample to sample and from epoch to epoch is a test of its own.
"""

import itertools
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kit import PROBE, Launched, image, make_dataset, read, run, scalars
from process_probe import small_model
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from engine.cli import UserError
from engine.launch import build_accelerator
from engine.metrics import Sums, step_sums, sum_of_parts
from engine.seeds import derive_seed
from image_classification import metrics
from image_classification.data import (
    DecodedImages,
    ImageData,
    ImageFiles,
    ImageLoader,
    load_dataset,
)
from image_classification.folders import Split

SIDE, BATCH, SEED, CLASSES = 32, 10, 3, 3
COMMON = ("set", "--image-size", SIDE, "-b", BATCH, "-j", 0, "--seed", SEED, "-p", 1)
# What the original does without a flag, and what a flag of its own takes away.
ORIGINAL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "lr_schedule": "step"}
NONE = {
    **{"momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0},
    **{"label_smoothing": 0.0, "cutmix": 0.0, "mixup": 0.0},
}
STEP = re.compile(r"^Epoch: .*\tLoss (\S+) ", re.MULTILINE)
# Of the way that the weights have gone since the start: rounding makes less than 1e-6 of it here,
# and the least of the options, a weight decay of 1e-4, makes 1e-3.
SAME, OTHER = 2e-5, 5e-4


def batches(images: DecodedImages | ImageFiles, train: bool = True) -> ImageLoader:
    alone: Any = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    options: dict[str, Any] = {"batch_size": BATCH, "image_size": SIDE, "seed": SEED, "workers": 0}
    return ImageLoader(alone, images, train=train, **options)


class Figures(NamedTuple):
    """Learning rate, loss and parameters after every step; validation loss of every epoch."""

    rates: list[float]
    losses: list[float]
    weights: list[torch.Tensor]
    val_losses: list[float]


def new_model() -> nn.Module:
    torch.manual_seed(SEED)
    return small_model(CLASSES)


def flatten(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def schedule(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> lr_scheduler.LRScheduler:
    """A tenth every 30 epochs, or half a cosine to zero; before it a linear rise."""
    warmup = options["warmup_epochs"]
    rates: Any = lr_scheduler.StepLR(optimizer, 30)
    if options["lr_schedule"] == "cosine":
        rates = lr_scheduler.CosineAnnealingLR(optimizer, options["epochs"] - warmup)
    if warmup:
        rise = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        rates = lr_scheduler.SequentialLR(optimizer, [rise, rates], [warmup])
    return rates  # type: ignore[no-any-return]


def train_plainly(data: ImageData, flags: dict[str, Any]) -> Figures:
    options = {**NONE, "start_epoch": 0, **ORIGINAL, **flags}
    model = new_model()
    optimizer = torch.optim.SGD(
        model.parameters(),
        options["lr"],
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
    )
    rates = schedule(optimizer, options)
    kinds = {"cutmix": v2.CutMix, "mixup": v2.MixUp}
    mixes = [
        kind(alpha=options[name], num_classes=CLASSES)
        for name, kind in kinds.items()
        if options[name]
    ]
    found = Figures([], [], [], [])
    for _ in range(options["start_epoch"]):
        optimizer.step()  # without gradients: only the rate moves
        rates.step()
    for epoch in range(options["start_epoch"], options["epochs"]):
        model.train()
        for step, batch in enumerate(batches(data.train).epoch(epoch)):
            images, targets = batch.images, batch.targets
            if mixes:
                torch.manual_seed(derive_seed("mix", SEED, epoch, step))
                images, targets = v2.RandomChoice(mixes)(images, targets)
            torch.manual_seed(derive_seed("dropout", SEED, epoch, step, 0))
            smoothing = options["label_smoothing"]
            loss = F.cross_entropy(model(images), targets, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.rates.append(float(rates.get_last_lr()[0]))
            found.losses.append(loss.item())
            found.weights.append(flatten(model))
        found.val_losses.append(validate(model, data))
        rates.step()
    return found


@torch.no_grad()
def validate(model: nn.Module, data: ImageData) -> float:
    model.eval()
    parts = [
        F.cross_entropy(model(batch.images), batch.targets, reduction="sum").item()
        for batch in batches(data.val, train=False).epoch(0)
    ]
    return sum(parts) / len(data.val)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance between two states of the weights, of what `other` has gone from the start."""
    return float((one - other).norm() / (other - flatten(new_model())).norm())


@pytest.mark.parametrize(
    "flags",
    [
        {"start_epoch": 29, "epochs": 31},
        {"label_smoothing": 0.1, "lr_schedule": "cosine", "warmup_epochs": 1, "epochs": 3},
        {"cutmix": 1.0, "label_smoothing": 0.2, "warmup_epochs": 2, "lr": 0.2, "epochs": 3},
        {"mixup": 0.4, "weight_decay": 0.01, "momentum": 0.5, "sync_bn": True, "epochs": 1},
        {"cutmix": 0.5, "mixup": 1.0, "epochs": 2},
    ],
    ids=lambda flags: "+".join(flags),
)
def test_a_run_follows_a_plain_loop(flags: dict[str, Any], tmp_path: Path) -> None:
    data = load_dataset(str(make_dataset(tmp_path / "set", train=9)), SIDE, 0, False)
    plain = train_plainly(data, flags)
    given: list[object] = []
    for name, value in flags.items():
        given += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    probe = ("follow", *COMMON, *given)
    result = run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE)
    assert result.code == 0, result

    steps = torch.load(tmp_path / "steps.pt")
    assert [step["lr"] for step in steps] == pytest.approx(plain.rates)
    assert [float(loss) for loss in STEP.findall(result.out)] == pytest.approx(plain.losses, 2e-4)
    for step, weights in zip(steps, plain.weights, strict=True):
        assert apart(step["weights"], weights) < SAME
    curves = scalars(tmp_path / "output" / "resnet18-cpu" / "logs")
    assert [value for _, value in curves["Loss/val"]] == pytest.approx(plain.val_losses, 1e-4)
    norms = {"SyncBatchNorm"} if "sync_bn" in flags else {"BatchNorm2d"}
    assert all(step["norms"] == norms for step in steps)

    # And each option has a part in this: without it, the loop ends elsewhere.
    used = {name: none for name, none in NONE.items() if {**ORIGINAL, **flags}.get(name)}
    for name, none in used.items():
        without = train_plainly(data, {**flags, name: none})
        assert apart(without.weights[-1], plain.weights[-1]) > OTHER, name


@pytest.mark.parametrize("side", [64, 160])
def test_every_sample_has_another_crop_in_every_epoch(side: int, tmp_path: Path) -> None:
    """Of one picture, decoded in memory or by workers: equal images can only be equal crops."""
    path, count, epochs = str(tmp_path / "one.png"), 24, 3
    image("one", side).save(path)
    samples: DecodedImages | ImageFiles
    if side == 64:
        pixels = TF.pil_to_tensor(image("one", side))[None]
        samples = DecodedImages(pixels, torch.zeros(count, dtype=torch.int64), [])
    else:
        samples = ImageFiles(Split([path] * count, [0] * count), SIDE)
    loader = batches(samples)
    crops = [crop for e in range(epochs) for batch in loader.epoch(e) for crop in batch.images]
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops) == epochs * count


def test_model_best_is_the_first_epoch_of_the_best_accuracy(tmp_path: Path) -> None:
    """Also after a resume. The accuracies are given, the rest is a run's own."""
    make_dataset(tmp_path / "set")
    output = tmp_path / "output" / "resnet18-cpu"
    for accuracies, more in (("40,60,60,50", ()), ("60,55", ("--resume", "auto"))):
        flags = (*COMMON, "--epochs", 4 + len(more), *more)
        result = run("tests/process_probe.py", "best", accuracies, *flags, cwd=tmp_path, env=PROBE)
        assert result.code == 0, result
        best, latest = (read(output / name) for name in ("model_best.pth", "checkpoint.pth"))
        assert (latest["epoch"], latest["best_acc1"]) == (4 + len(more), 60.0)
        assert (best["epoch"], best["best_acc1"]) == (2, 60.0)


def test_sums_go_on_from_a_checkpoint_and_name_the_step_of_a_loss_that_is_not_finite() -> None:
    whole, first = (Sums(build_accelerator(), ["Loss"]) for _ in range(2))
    steps = [step_sums(torch.tensor(0.2 * n), torch.tensor(n)) for n in range(1, 7)]
    for step, values in enumerate(steps):
        if step == 5:
            whole.mark()
        whole.update(values, step)
        if step < 4:
            first.update(values, step)
    second = Sums(build_accelerator(), ["Loss"], epoch=3, carried=first.carry())
    for step, values in enumerate(steps[4:], 4):
        second.update(values, step)
    assert second.read()[1] == whole.read()[1] == {"Loss": pytest.approx(0.2)}
    assert whole.read()[0] == {"Loss": pytest.approx(0.2)}
    assert second.carry() == [[pytest.approx(4.2), 21]]
    for step in (6, 7):
        second.update(step_sums(torch.tensor(math.nan), torch.tensor(1)), step)
    with pytest.raises(UserError, match="not finite in epoch 3 at step 6:"):
        second.read()
    assert math.isnan(second.read(refuse_nan=False)[1]["Loss"])
    assert second.carry()[0][1] == 23


def test_throughput_counts_images_and_is_nothing_without_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count()  # each look at the clock is one later
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    progress = metrics.Progress(build_accelerator(), "", 2, 10)
    assert progress.rate() is None
    for step, images in progress.steps([8, 2]):
        progress.tick(step, images)
    # One second at the start, two for each batch, one after the last.
    assert progress.rate() == pytest.approx(10 / 5)


def test_the_original_goes_on_at_the_rate_of_its_schedule(tmp_path: Path) -> None:
    """Its StepLR divides only at multiples of 30, and otherwise keeps what it finds."""
    make_dataset(tmp_path / "set")
    flags = (*COMMON, "--lr", 0.5, "--start-epoch", 28, "--epochs")
    for epochs, rates in ((29, [0.5, 0.05]), (30, [0.05, 0.05])):
        more = ("--overwrite",) if epochs == 30 else ()
        assert run("resnet_main.py", *flags, epochs, *more, cwd=tmp_path).code == 0
        content = read(tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth")
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in content["optimizer"]["state"]]
        theirs = torch.optim.SGD(parameters, 0.5, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(theirs, step_size=30, gamma=0.1)
        theirs.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
        found = [theirs.param_groups[0]["lr"]]
        theirs.step()
        scheduler.step()
        found.append(theirs.param_groups[0]["lr"])
        assert content["epoch"] == epochs
        assert found == pytest.approx(rates)


def test_workers_may_be_spawned(tmp_path: Path) -> None:
    """As on macOS and Windows: a worker is a new Python that imports the command."""
    make_dataset(tmp_path / "set", train=4, val=3, side=160)
    site = tmp_path / "site" / "sitecustomize.py"
    site.parent.mkdir()
    site.write_text(
        "import contextlib, multiprocessing\n"
        "with contextlib.suppress(RuntimeError):\n"  # a worker has its method already
        "    multiprocessing.set_start_method('spawn')\n"
    )
    flags = ("set", "--image-size", 32, "--stem", "stock", "-b", 12, "-j", 1, "--epochs", 1)
    env = {"PYTHONPATH": str(site.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = Launched(None, "resnet_main.py", *flags, cwd=tmp_path, env=env).finish()
    assert (done.code, done.err) == (0, ""), done


def test_a_steps_loss_is_finite_where_those_of_all_its_parts_are() -> None:
    whole = step_sums(torch.tensor(2.0), torch.tensor(3))
    assert sum_of_parts([whole, whole]).tolist() == [1, 4, 6]
    broken = sum_of_parts([whole, step_sums(torch.tensor(math.inf), torch.tensor(3)), whole])
    assert broken.tolist() == [0, math.inf, 9]


def test_a_steps_sums_count_each_sample_once_and_no_padding() -> None:
    logits = torch.eye(8)[[0, 1, 2, 3]] + 0.1 * torch.arange(8.0)
    targets = torch.tensor([0, 4, 0, 3])  # likeliest, among the five likeliest, not, padding
    losses = torch.tensor([1.0, 2.0, 4.0, math.nan])
    sums = metrics.batch_sums(logits, targets, losses, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert sums.tolist() == [1, 7, 100, 200, 3]
    means = Sums(build_accelerator(), [*metrics.METRICS]).means(sums)
    assert means == pytest.approx({"Loss": 7 / 3, "Acc@1": 100 / 3, "Acc@5": 200 / 3})
