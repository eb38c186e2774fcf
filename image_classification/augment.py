"""Augmentation of whole image batches on the training device, each sample with its own crop.

The distribution is that of the original's RandomResizedCrop and RandomHorizontalFlip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

SCALE = (0.08, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height
ATTEMPTS = 10
POINTS_AT_ONCE = 2**25  # that `resized_crop` takes, 32 bytes each; 8,192 images of 64 px

# ImageNet's channel statistics, as in the original. Not tensors: torch decides about huge pages
# at its first allocation, which has to come after build_accelerator has asked for them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@functools.cache
def _statistics(device: torch.device, width: int) -> list[torch.Tensor]:
    """`MEAN` and `STD` for pixels from 0 to 255, [3, `width`]; a copy to the GPU stalls a step."""
    columns = (torch.tensor(values)[:, None] * 255 for values in (MEAN, STD))
    return [column.expand(3, width).to(device) for column in columns]


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


def central_crops(height: torch.Tensor, width: torch.Tensor, size: int) -> Crops:
    """What the original's Resize and CenterCrop leave of images of these sizes, each [n].

    In pixels of the images, and not rounded: the original cuts after it has resized.
    """
    short = height.minimum(width)
    fields = []
    for side in (height, width):
        resized = (resized_side(size) * side / short).floor()
        fields.append(((resized - size) / 2).round() * side / resized)
        fields.append(size * side / resized)
    top, box_height, left, box_width = fields
    return Crops(top, left, box_height, box_width, flip=torch.zeros_like(top, dtype=torch.bool))


def resized_side(size: int) -> int:
    """The shorter side to which the original resizes before it crops `size` from the centre."""
    return round(size * 256 / 224)


def scale_crops(crops: Crops, height: torch.Tensor, width: torch.Tensor, side: int) -> Crops:
    """The same regions in copies of the images that were resized to `side` × `side`."""
    down, across = side / height, side / width
    top, left, box_height, box_width, flip = crops
    return Crops(top * down, left * across, box_height * down, box_width * across, flip)


def crop_image(image: torch.Tensor, box: Sequence[int], flip: bool, size: int) -> torch.Tensor:
    """Crop an image on the CPU, [h, w, 3] uint8, flip it and resize it to [size, size, 3].

    Args:
        box: top, left, height, width.
    """
    top, left, height, width = box
    # As a batch of one whose order torch recognises as channels-last: half the time.
    region = image[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    region = region.flip(-1) if flip else region  # it has fewer pixels than the result, mostly
    resized = F.interpolate(region, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


def crop_each(images: torch.Tensor, rows: torch.Tensor, crops: Crops, size: int) -> torch.Tensor:
    """`resized_crop` of images on a CPU, one by one: for large ones over ten times as fast.

    With torchvision's antialiasing; boxes are rounded to whole pixels.

    Args:
        images: [n, 3, side, side], uint8, in channels-last order.
        rows: [b], of the images that are wanted.
        crops: of these.

    Returns:
        [b, 3, size, size], float32 from 0 to 255.
    """
    side = images.shape[-1]
    top, left = (start.round().clamp(max=side - 1) for start in (crops.top, crops.left))
    height = (crops.top + crops.height).round().maximum(top + 1) - top
    width = (crops.left + crops.width).round().maximum(left + 1) - left
    boxes = torch.stack([top, left, height, width], dim=1).int().tolist()
    result = torch.empty(len(rows), size, size, 3, dtype=torch.uint8)
    whole = images.permute(0, 2, 3, 1)
    for place, (row, box, flip) in enumerate(
        zip(rows.tolist(), boxes, crops.flip.tolist(), strict=True)
    ):
        result[place] = crop_image(whole[row], box, flip, size)
    return result.permute(0, 3, 1, 2).float()


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
    if len(images) > (most := max(1, POINTS_AT_ONCE // points**2)):
        starts = range(0, len(images), most)
        parts = [[t[start : start + most] for t in (images, *crops)] for start in starts]
        return torch.cat([resized_crop(part[0], Crops(*part[1:]), size) for part in parts])
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
    mean, std = _statistics(pixels.device, pixels.shape[-1])
    if pixels.is_contiguous(memory_format=torch.channels_last):
        # Row by row: a CPU takes three times as long for one pixel's three numbers at a time.
        rows = pixels.permute(0, 2, 3, 1).flatten(2)
        rows.sub_(mean.T.flatten()).div_(std.T.flatten())
    else:
        pixels.sub_(mean[:, None]).div_(std[:, None])
    return pixels.contiguous(memory_format=fast_format(pixels.device))
