"""What the flags of the image commands offer, and what a checkpoint keeps of them.

Imports nothing slow, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TINY_IMAGENET = Path("data/tiny-imagenet-200")
STEMS = ("stride1", "stock", "cifar")

# What a resumed run takes from its checkpoint unless a flag says otherwise; the weights decide
# MODEL_SETTINGS.
MODEL_SETTINGS = ("arch", "stem")
SETTINGS = (
    *(*MODEL_SETTINGS, "image_size", "epochs", "batch_size", "lr", "momentum", "weight_decay"),
    *("lr_schedule", "warmup_epochs", "label_smoothing", "cutmix", "mixup", "sync_bn", "seed"),
    *("gradient_accumulation_steps", "decode_once"),
)


class ModelSpec(NamedTuple):
    """All that is needed, beside a state dict, to rebuild a model."""

    arch: str
    stem: str | None  # None where the architecture is not a ResNet
    num_classes: int
    image_size: int  # pixels a side


DEFAULT = ModelSpec("resnet18", "stride1", num_classes=200, image_size=64)  # for Tiny-ImageNet


def has_stem(arch: str) -> bool:
    """Whether `arch` is a ResNet, to which --stem applies."""
    return "resne" in arch  # resnet18, wide_resnet50_2, resnext50_32x4d


def default_spec(arch: str) -> ModelSpec:
    """The defaults for another architecture."""
    return DEFAULT._replace(arch=arch, stem=DEFAULT.stem if has_stem(arch) else None)
