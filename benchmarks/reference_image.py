"""An image classifier as it is commonly written, to measure the kit against.

In the manner of pytorch/examples' imagenet: ImageFolder and PIL in worker processes, float32,
contiguous tensors, the metrics read back in every step. It knows nothing of the kit, so nothing
that the kit sets or imports can make it faster or slower.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import rounds
import torch
import torch.nn.functional as F
from rounds import Round
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision import transforms as T
from torchvision.datasets import ImageFolder


def image_loader(
    folder: str,
    samples: list[tuple[str, int]],
    batch_size: int,
    image_size: int,
    side: int,
    workers: int,
    train: bool,
) -> DataLoader[Any]:
    """Batches of `samples`, each the path of an image and its class.

    Args:
        folder: with a folder of images for each class.
        side: to which validation images are resized before the crop.
    """
    steps: list[Any] = [T.Resize(side), T.CenterCrop(image_size)]
    if train:
        steps = [T.RandomResizedCrop(image_size), T.RandomHorizontalFlip()]
    normalise = T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    dataset = ImageFolder(folder, T.Compose([*steps, T.ToTensor(), normalise]))
    dataset.samples = samples  # Tiny-ImageNet's validation images do not lie by class
    pinned = not rounds.on_cpu()
    return DataLoader(dataset, batch_size, shuffle=train, num_workers=workers, pin_memory=pinned)


def build_network(arch: str, stem: str, classes: int) -> nn.Module:
    network: Any = models.get_model(arch, num_classes=classes)
    if stem in ("stride1", "cifar"):
        network.conv1.stride = (1, 1)
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network  # type: ignore[no-any-return]


class Sums:
    """Loss and right answers of an epoch, read back from the device for every batch."""

    def __init__(self) -> None:
        self.loss = self.right1 = self.right5 = 0.0

    def add(self, loss: torch.Tensor, output: torch.Tensor, targets: torch.Tensor) -> None:
        hits = output.topk(min(5, output.shape[1]), dim=1).indices == targets[:, None]
        self.loss += loss.item() * len(targets)
        self.right1 += hits[:, 0].sum().item()
        self.right5 += hits.sum().item()


def training(loader: dict[str, Any], network: dict[str, Any]) -> Round:
    """Images a second of an epoch."""
    device, batches = rounds.device(), image_loader(**loader)
    model = build_network(**network).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def epoch() -> None:
        model.train()
        sums = Sums()
        for images, targets in batches:
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            output = model(images)
            loss = F.cross_entropy(output, targets)
            sums.add(loss, output, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return lambda: [len(loader["samples"]) / rounds.seconds(epoch)]


def validation(loader: dict[str, Any], network: dict[str, Any]) -> Round:
    """Images a second of an evaluation."""
    device, batches = rounds.device(), image_loader(**loader)
    model = build_network(**network).to(device)

    @torch.no_grad()
    def evaluation() -> None:
        model.eval()
        sums = Sums()
        for images, targets in batches:
            images, targets = images.to(device), targets.to(device)
            output = model(images)
            sums.add(F.cross_entropy(output, targets), output, targets)

    return lambda: [len(loader["samples"]) / rounds.seconds(evaluation)]


def loading(loader: dict[str, Any]) -> Round:
    """Augmented images a second, from the first batch on: starting the workers is not loading."""
    device, batches = rounds.device(), image_loader(**loader)
    return lambda: [rounds.rate_after_first(len(images.to(device)) for images, _ in batches)]


def import_torch() -> Round:
    """Seconds of a process that imports torch and nothing else."""
    command = [sys.executable, "-c", "import torch"]
    return lambda: [rounds.seconds(lambda: subprocess.run(command, check=True))]
