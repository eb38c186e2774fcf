"""Images that cost what photographs cost to decode, for benchmarks without ImageNet."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

COUNT = 400  # of training images, and half as many to validate with
CLASSES = 4
LONG, SHORT = 500, 375  # pixels, as most of ImageNet's; every fourth image is a portrait


def make(root: Path) -> Path:
    """Fill `root` with train/ and val/: JPEGs of 95 KB, with detail of all scales."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", COUNT), ("val", COUNT // 2)):
        for number in range(count):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            shape = (LONG, SHORT) if number % 4 == 3 else (SHORT, LONG)
            noise = _noise(*shape, generator).permute(1, 2, 0).numpy()
            Image.fromarray(noise).save(folder / f"{number}.jpg", quality=90)
    return root


def _noise(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[3, height, width] uint8; its colours vary less than its brightness, as a photograph's."""
    total, cells = torch.zeros(1, 3, height, width), 2
    while cells < height:
        grey = torch.randn(1, 1, cells, cells, generator=generator)
        colour = torch.randn(1, 3, cells, cells, generator=generator)
        total += F.interpolate(grey + colour / 2, (height, width), mode="bilinear")
        cells *= 2
    return (total[0] / total.std() * 55 + 120).clamp(0, 255).to(torch.uint8)
