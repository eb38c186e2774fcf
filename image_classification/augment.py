"""Augmentation of whole image batches on the training device, each sample with its own crop.

The distribution is that of the original's RandomResizedCrop and RandomHorizontalFlip.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

SCALE = (0.08, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height
ATTEMPTS = 10

# ImageNet's channel statistics, as in the original. Not tensors: torch decides about huge pages
# at its first allocation, which has to come after build_accelerator has asked for them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`MEAN` and `STD` for pixels from 0 to 255; cached, as a copy to the GPU stalls the step."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return mean.to(device), std.to(device)


def fast_format(device: torch.device) -> torch.memory_format:
    """The order of images and weights in memory that convolutions like best."""
    if device.type == "mps":
        # Its batch normalisation had wrong gradients with channels_last (pytorch issue 175189).
        return torch.contiguous_format
    return torch.channels_last


class Crops(NamedTuple):
    """Crop boxes in pixels and flips of n samples; every field has the shape [n]."""

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    flip: torch.Tensor


def draw_crops(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw crops and flips of `n` samples, whatever the sizes of their images.

    Returns:
        [n, 2 * ATTEMPTS + 3], float32: widths and heights of ten boxes in units of the square root
        of the image's area; place from the top and from the left, and flip, from 0 to 1.
    """
    scale = torch.empty(n, ATTEMPTS).uniform_(*SCALE, generator=generator)
    ratio = torch.empty(n, ATTEMPTS).uniform_(*map(math.log, RATIO), generator=generator).exp_()
    rest = torch.rand(n, 3, generator=generator)
    return torch.cat([(scale * ratio).sqrt_(), (scale / ratio).sqrt_(), rest], dim=1)


def fit_crops(drawn: torch.Tensor, height: torch.Tensor | int, width: torch.Tensor | int) -> Crops:
    """The crops that `draw_crops` has drawn, in images of `height` × `width` pixels (or each [n]).

    The rule is that of torchvision.transforms.RandomResizedCrop.get_params: the first of ten boxes
    of random area and aspect ratio that fits, else the largest central box of an allowed ratio.
    """
    height, width = (torch.as_tensor(side).float().expand(len(drawn)) for side in (height, width))
    boxes = drawn[:, : 2 * ATTEMPTS].unflatten(1, (2, ATTEMPTS))
    w, h = (boxes * (height * width).sqrt()[:, None, None]).round().unbind(1)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    down, right, flip = drawn[:, 2 * ATTEMPTS :].unbind(1)
    top, left = (down * (height - h + 1)).floor(), (right * (width - w + 1)).floor()

    ratio = (width / height).clamp(*RATIO)
    central_w = (height * ratio).round().minimum(width)
    central_h = (width / ratio).round().minimum(height)
    any_fits = fits.any(dim=1)
    return Crops(
        top=torch.where(any_fits, top, ((height - central_h) / 2).floor()),
        left=torch.where(any_fits, left, ((width - central_w) / 2).floor()),
        height=torch.where(any_fits, h, central_h),
        width=torch.where(any_fits, w, central_w),
        flip=flip < 0.5,
    )


def resized_crop(images: torch.Tensor, crops: Crops, size: int) -> torch.Tensor:
    """Crop, resize to `size` × `size` and flip every image by its own box.

    Bilinear. Where crops can only be enlarged, the result is that of torchvision's resized_crop.
    Where they may shrink, the mean of several points a pixel comes close to its antialiasing.

    Args:
        images: [n, 3, height, width], uint8.
        crops: of the n images, on their device.

    Returns:
        [n, 3, size, size], float32 from 0 to 255.
    """
    height, width = images.shape[-2:]
    oversampling = math.ceil(max(height, width) / size)
    points = size * oversampling
    centre = (torch.arange(points, device=images.device) + 0.5) / points
    top, left, box_height, box_width, flip = (field[:, None] for field in crops)
    across = torch.where(flip, 1 - centre, centre)
    # Source coordinates in pixels, clamped to the box's outermost pixel centres: its edge repeats,
    # as if the crop were a picture of its own.
    x = left + (across * box_width).clamp(min=0.5).minimum(box_width - 0.5)
    y = top + (centre * box_height).clamp(min=0.5).minimum(box_height - 0.5)
    grid = torch.empty(len(images), points, points, 2, device=images.device)
    grid[..., 0] = (x * (2 / width) - 1)[:, None, :]
    grid[..., 1] = (y * (2 / height) - 1)[:, :, None]
    # Without points beyond the edge both modes agree. MPS knows the first only since torch 2.13.
    edge = "zeros" if images.device.type == "mps" else "border"
    sampled = F.grid_sample(images.float(), grid, padding_mode=edge, align_corners=False)
    return F.avg_pool2d(sampled, oversampling) if oversampling > 1 else sampled


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize square images, [n, 3, side, side] uint8, to float32 [n, 3, size, size]."""
    pixels = images.float()
    if images.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise float pixels from 0 to 255 by ImageNet's statistics, into `fast_format`.

    Works in place on `pixels`: fresh memory costs more than the arithmetic.
    """
    mean, std = _statistics(pixels.device)
    return pixels.sub_(mean).div_(std).contiguous(memory_format=fast_format(pixels.device))
