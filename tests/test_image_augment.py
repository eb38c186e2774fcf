"""The batch augmentation against torchvision's, which the original uses."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from image_classification import augment as image_augment


def crops_of(n: int, height: int, width: int, seed: int) -> image_augment.Crops:
    drawn = image_augment.draw_crops(n, torch.Generator().manual_seed(seed))
    return image_augment.fit_crops(drawn, height, width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (400, 30)])
def test_crops_follow_the_distribution_of_torchvision(height: int, width: int) -> None:
    n = 4000
    crops = crops_of(n, height, width, seed=1)
    ours = torch.stack([field.float() for field in crops[:4]], dim=1)
    torch.manual_seed(2)
    shape = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(shape, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = torch.tensor(drawn, dtype=torch.float32)
    # Two-sample Kolmogorov-Smirnov distance of top, left, height, width and area.
    area = [(t[:, 2] * t[:, 3])[:, None] for t in (ours, theirs)]
    for a, b in zip(
        torch.cat([ours, area[0]], 1).T, torch.cat([theirs, area[1]], 1).T, strict=True
    ):
        points = torch.cat([a, b]).unique()
        cdfs = [torch.searchsorted(x.sort().values, points, right=True) / n for x in (a, b)]
        assert (cdfs[0] - cdfs[1]).abs().max() < 1.95 * (2 / n) ** 0.5  # p = 0.001
    assert (crops.top + crops.height).max() <= height
    assert (crops.left + crops.width).max() <= width
    assert 0.45 < crops.flip.float().mean() < 0.55


def test_enlarged_crops_equal_torchvisions() -> None:
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    crops = crops_of(64, 64, 64, seed=3)
    result = image_augment.resized_crop(images, crops, 96)
    for i, image in enumerate(images):
        box = [int(field[i]) for field in crops[:4]]
        expected = TF.resized_crop(image.float(), *box, [96, 96], antialias=True)
        expected = expected.flip(-1) if crops.flip[i] else expected
        torch.testing.assert_close(result[i], expected, atol=1e-2, rtol=0)


def test_shrunk_crops_come_close_to_torchvisions_antialiasing() -> None:
    coarse = torch.rand(32, 3, 16, 16) * 255
    images = torch.nn.functional.interpolate(coarse, 64, mode="bilinear").to(torch.uint8)
    crops = crops_of(32, 64, 64, seed=3)
    result = image_augment.resized_crop(images, crops, 24)
    for i, image in enumerate(images):
        box = [int(field[i]) for field in crops[:4]]
        expected = TF.resized_crop(image.float(), *box, [24, 24], antialias=True)
        expected = expected.flip(-1) if crops.flip[i] else expected
        assert (result[i] - expected).abs().mean() < 4  # of 255


def test_normalise_is_the_originals() -> None:
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = TF.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    result = image_augment.normalise(image.float())
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert result.is_contiguous(memory_format=torch.channels_last)
