"""Where images come from: a folder, Tiny-ImageNet's archive, or the built-in sample."""

from __future__ import annotations

import colorsys
import math
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from engine import files
from engine.cli import UserError
from image_classification.settings import TINY_IMAGENET

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_SIZE = 248_100_043
TINY_IMAGENET_DIGEST = "md5:90528d7ca1a48142e341f4ef8d21d0de"

SAMPLE = Path("data/sample")
SAMPLE_CLASSES = {
    "n90000001": "disc",
    "n90000002": "ring",
    "n90000003": "square",
    "n90000004": "triangle",
    "n90000005": "star",
    "n90000006": "cross",
    "n90000007": "crescent",
    "n90000008": "stripes",
    "n90000009": "checks",
    "n90000010": "dots",
}
SAMPLE_TRAIN, SAMPLE_VAL = 250, 50  # images a class
SIDE = 64
CANVAS = 2 * SIDE  # drawn at twice the size and reduced, for smooth edges


def resolve(name: str, download: bool) -> Path:
    """The folder that the argument DIR names, which is made if the kit can make it.

    `sample` is drawn. Tiny-ImageNet's default folder is unpacked from an archive beside it, which
    is downloaded when it is missing.

    Raises:
        UserError: Tiny-ImageNet cannot be downloaded, its archive is another file, or the disk is
            full.
    """
    if name == "sample":
        sample = files.built_in(SAMPLE)
        if not sample.exists():
            print(f"=> drawing the sample dataset into {sample}", flush=True)
            draw_sample(sample)
        return sample
    root = Path(name)
    if root != TINY_IMAGENET or root.exists():
        return root
    archive = root.with_name(f"{root.name}.zip")
    try:
        if archive.exists():
            files.check_file(
                archive, str(archive), size=TINY_IMAGENET_SIZE, digest=TINY_IMAGENET_DIGEST
            )
        elif download:
            print(f"=> downloading {TINY_IMAGENET_URL} to {archive}", flush=True)
            files.download(
                TINY_IMAGENET_URL, archive, size=TINY_IMAGENET_SIZE, digest=TINY_IMAGENET_DIGEST
            )
        else:
            raise UserError("--no-download was given")
    except UserError as reason:
        raise UserError(
            f"{root} is missing and cannot be downloaded ({reason}): put {TINY_IMAGENET_URL} at "
            f"{archive} by hand, name another DIR, or try the built-in dataset: sample"
        ) from reason
    files.unpack(archive, root.name, root)
    return root


def draw_sample(root: Path) -> None:
    """Draw a dataset of ten shapes and textures in Tiny-ImageNet's own layout.

    Every image follows from its name alone. Clutter, weak contrast and noise leave even a good
    model some errors; every twentieth image is grey.

    Raises:
        UserError: a full disk, or a folder that is not writable.
    """
    with files.writing(root) as temporary:
        for wnid in tqdm(SAMPLE_CLASSES, desc="drawing", unit=" classes", disable=None):
            folder = temporary / "train" / wnid / "images"
            folder.mkdir(parents=True)
            for i in range(SAMPLE_TRAIN):
                _draw(wnid, f"{wnid}_{i}").save(folder / f"{wnid}_{i}.JPEG", quality=90)
        folder = temporary / "val" / "images"
        folder.mkdir(parents=True)
        lines = []
        order = list(SAMPLE_CLASSES) * SAMPLE_VAL
        random.Random("validation order").shuffle(order)
        for i, wnid in enumerate(order):
            name = f"val_{i}"
            _draw(wnid, name).save(folder / f"{name}.JPEG", quality=90)
            lines.append(f"{name}.JPEG\t{wnid}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n")
        (temporary / "val" / "val_annotations.txt").write_text("".join(lines))
        (temporary / "wnids.txt").write_text("".join(f"{w}\n" for w in SAMPLE_CLASSES))
        words = "".join(f"{wnid}\t{word}\n" for wnid, word in SAMPLE_CLASSES.items())
        (temporary / "words.txt").write_text(words)


def _draw(wnid: str, name: str) -> Image.Image:
    rng = random.Random(f"sample image {name}")
    grey = rng.randrange(70, 186)
    background = tuple(grey + rng.randrange(-20, 21) for _ in range(3))
    image = Image.new("RGB", (CANVAS, CANVAS), background)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(4, 9)):  # clutter
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(6, 30)
        shade = tuple(max(0, min(255, c + rng.randrange(-45, 46))) for c in background)
        draw.line([(x - r, y - r), (x + r, y + rng.uniform(-r, r))], shade, rng.randrange(2, 12))
    # Each class has a typical hue, so that a few epochs are enough; at times it is its neighbour's.
    hue = list(SAMPLE_CLASSES).index(wnid) / len(SAMPLE_CLASSES) + rng.gauss(0, 0.03)
    colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.35, 1))
    mask = _shape(SAMPLE_CLASSES[wnid], rng)
    image.paste(tuple(round(255 * c) for c in colour), mask=mask)
    if rng.random() < 0.4:  # an occluding line
        x, width = rng.uniform(0.2, 0.8) * CANVAS, rng.randrange(4, 14)
        shade = tuple(rng.randrange(256) for _ in range(3))
        draw.line([(x, 0), (x + rng.uniform(-60, 60), CANVAS)], shade, width)

    small = TF.pil_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BOX)).float()
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    small += torch.randn(small.shape, generator=noise) * rng.uniform(6, 20)
    noisy: Image.Image = TF.to_pil_image(small.round().clamp(0, 255).to(torch.uint8))
    return noisy.convert("L") if rng.random() < 0.05 else noisy


def _shape(word: str, rng: random.Random) -> Image.Image:
    """A mask of the class's shape at a random place, size and angle."""
    radius = rng.uniform(28, 52)
    cx, cy = centre = [rng.uniform(radius * 0.9, CANVAS - radius * 0.9) for _ in range(2)]
    angle = rng.uniform(0, 2 * math.pi)
    mask = Image.new("1", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(mask)

    def at(distance: float, turn: float) -> tuple[float, float]:
        """The point at `distance` radii from the centre, `turn` turns from the shape's angle."""
        phi = angle + 2 * math.pi * turn
        return cx + radius * distance * math.cos(phi), cy + radius * distance * math.sin(phi)

    if word == "disc":
        draw.circle(centre, radius * 0.85, fill=1)
    elif word == "ring":
        draw.circle(centre, radius * 0.95, fill=1)
        draw.circle(centre, radius * rng.uniform(0.5, 0.7), fill=0)
    elif word == "crescent":
        draw.circle(centre, radius, fill=1)
        draw.circle(at(0.5, 0), radius * 0.85, fill=0)
    elif word == "square":
        draw.polygon([at(1, k / 4) for k in range(4)], fill=1)
    elif word == "triangle":
        draw.polygon([at(1.1, k / 3) for k in range(3)], fill=1)
    elif word == "star":
        draw.polygon([at(1.1 if k % 2 else 0.45, k / 10) for k in range(10)], fill=1)
    elif word == "cross":
        for turn in (0.0, 0.25):
            ends = [at(1, turn), at(1, turn + 0.5)]
            draw.line(ends, fill=1, width=round(radius * 0.5))
    else:  # a texture, within a disc
        cells = rng.randrange(4, 7)
        step = 2 / cells
        for i in range(cells + 1):
            for j in range(cells + 1):
                u, v = -1 + i * step, -1 + j * step
                if (word == "checks" and (i + j) % 2) or (word == "stripes" and i % 2):
                    continue
                corners = [(u, v), (u + step, v), (u + step, v + step), (u, v + step)]
                placed = [at(math.hypot(p, q), math.atan2(q, p) / 2 / math.pi) for p, q in corners]
                if word == "dots":
                    draw.circle(placed[0], radius * step * 0.32, fill=1)
                else:
                    draw.polygon(placed, fill=1)
        window = Image.new("1", mask.size)
        ImageDraw.Draw(window).circle(centre, radius, fill=1)
        mask = Image.composite(mask, Image.new("1", mask.size), window)
    return mask
