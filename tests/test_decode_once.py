"""--decode-once: the same regions of larger images, from copies that are decoded once."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from kit import Running, error_line, image, make_dataset, read, run
from PIL import Image

from engine import files
from engine.cli import UserError
from image_classification import augment, cache
from image_classification.data import DecodedImages, ImageData, ImageLoader, load_dataset

SIDE = 64  # of the copies
SIZES = [(240, 120), (120, 240), (200, 190), (90, 100), (400, 64)]  # width, height


def load(root: Path, size: int, decode_once: int = 0) -> ImageData:
    return load_dataset(str(root), size, 0, download=False, decode_once=decode_once)


def batches(
    data: ImageData, train: bool, rank: int = 0, world_size: int = 1, **options: Any
) -> list[Any]:
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=world_size
    )
    options = {"batch_size": 12, "image_size": data.image_size, "seed": 5, "workers": 0, **options}
    images = data.train if train else data.val
    return list(ImageLoader(accelerator, images, train=train, **options).epoch(1))


def pixels(data: ImageData, train: bool) -> torch.Tensor:
    """Of all samples of an epoch, from 0 to 255."""
    images = torch.cat([batch.images for batch in batches(data, train)])
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (augment.MEAN, augment.STD))
    return images * std + mean


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Images that tell where their pixels lie: red rises from left to right, green downwards.

    Blue marks the corner at the top left.
    """
    for part, count in (("train", 40), ("val", 10)):
        folder = tmp_path / "maps" / part / "all"
        folder.mkdir(parents=True)
        for i in range(count):
            width, height = SIZES[i % len(SIZES)]
            across = (torch.arange(width) + 0.5).expand(height, width) * 255 / width
            down = (torch.arange(height) + 0.5)[:, None].expand(height, width) * 255 / height
            corner = 255 * ((across < 64) & (down < 64))
            whole = torch.stack([across, down, corner], dim=2).round().to(torch.uint8)
            Image.fromarray(whole.numpy()).save(folder / f"{i:02}.png")
    return tmp_path / "maps"


@pytest.mark.parametrize("train", [True, False])
def test_regions_are_those_of_the_images_themselves(maps: Path, train: bool) -> None:
    """Crop, flip and aspect ratio, of landscapes and portraits."""
    one_pixel = 255 / SIDE
    own, copied = (pixels(load(maps, 32, side), train) for side in (0, SIDE))
    assert (own[:, :2] - copied[:, :2]).abs().max() < one_pixel
    assert (own[:, 2] - copied[:, 2]).abs().mean() < 8  # blurred at the mark's edges
    assert own[:, 2].mean() > (6 if train else 1)  # and it is seen
    if train:  # every crop is another, and half of them are flipped
        rising = own[:, 0, :, -1].mean(1) > own[:, 0, :, 0].mean(1)
        assert 8 < rising.sum() < 32
        corners = own[:, :2, 0, 0].round().unique(dim=0)
        assert len(corners) > 30


@pytest.mark.parametrize("train", [True, False])
def test_a_gpu_takes_the_same_regions_as_a_cpu(
    maps: Path, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that are sampled at points, as on a GPU, beside images that are resized in turn."""
    images = (data := load(maps, 32, SIDE)).train
    assert isinstance(images, DecodedImages) and images.sizes is not None
    height, width = images.sizes.T
    crops = augment.central_crops(height, width, 32)
    if train:
        drawn = augment.draw_crops(len(images), torch.Generator().manual_seed(0))
        crops = augment.fit_crops(drawn, height, width)
    crops = augment.scale_crops(crops, height, width, SIDE)
    rows = torch.arange(len(images))
    one_by_one = augment.crop_each(images.images, rows, crops, data.image_size)
    sampled = augment.resized_crop(images.images, crops, data.image_size)
    assert (one_by_one - sampled)[:, :2].abs().max() < 255 / SIDE
    monkeypatch.setattr(augment, "POINTS_AT_ONCE", 7 * 64**2)  # in parts, for the memory's sake
    assert torch.equal(sampled, augment.resized_crop(images.images, crops, data.image_size))


def test_copies_of_the_images_own_size_give_the_same_pixels(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "plain", side=160)
    for size, train in ((56, True), (140, True), (200, True), (140, False)):
        parts = [batches(load(root, size, side), train) for side in (0, 160)]
        for own, copied in zip(*parts, strict=True):
            assert torch.equal(own.indices, copied.indices)
            assert torch.equal(own.images, copied.images), (size, train)


def test_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    data = load(make_dataset(tmp_path / "set", train=9, side=160), 32, SIDE)
    for train in (True, False):
        alone = torch.cat([batch.images for batch in batches(data, train)])
        found = torch.full_like(alone, torch.nan)
        order = torch.cat([batch.indices for batch in batches(data, train)]).tolist()
        for rank in range(4):
            for batch in batches(data, train, rank, 4):
                for index, own in zip(batch.indices.tolist(), batch.images, strict=True):
                    found[order.index(index)] = own
        assert torch.equal(found, alone)


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset whose decoding ended at image 20 of 34, in batches of four."""
    root = make_dataset(tmp_path / "set", "plain", side=160)
    for i, path in enumerate(sorted(root.glob("train/*/*.JPEG"))):
        image(i, 160).resize((130 + i, 160 - i)).save(path)
    monkeypatch.setattr(cache, "BATCH", 4)
    monkeypatch.setattr(cache, "FLUSH_EVERY", 0)
    whole, calls = cache.decode, []

    def failing(path: str) -> torch.Tensor:
        calls.append(path)
        if len(calls) > 20:
            raise Interrupted
        return whole(path)

    monkeypatch.setattr(cache, "decode", failing)
    with pytest.raises(Interrupted):
        load(root, 32, SIDE)
    monkeypatch.setattr(cache, "decode", whole)
    yield root
    assert not [*root.glob(".decoded*.unfinished"), *root.glob(".decoded*.lock")]


def test_an_interrupted_decoding_goes_on_where_it_was(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, unfinished = interrupted, next(interrupted.glob(".decoded*"))
    # What was written last is not trusted, as a power failure may have taken it.
    row = 3 * SIDE**2
    with unfinished.open("r+b") as file:
        file.seek(20 * row)
        file.write(b"?" * row)
        file.seek(34 * row + 3 * 8)
        file.write(bytes(8))  # the fourth image's size
    capsys.readouterr()
    train = load(root, 32, SIDE).train
    assert isinstance(train, DecodedImages) and train.sizes is not None
    assert train.sizes.tolist() == [[160 - i, 130 + i] for i in range(24)]
    out = capsys.readouterr().out
    assert f"=> decoding 34 images into {root}/.decoded-" in out
    assert "(0.2 MB of " in out and " that are free; 19 are there)" in out
    fresh = Path(shutil.copytree(root / "train", tmp_path / "fresh" / "train")).parent
    shutil.copytree(root / "val", fresh / "val")
    load(fresh, 32, SIDE)
    assert "are there" not in capsys.readouterr().out
    one, other = (next(place.glob(".decoded*")).read_bytes() for place in (root, fresh))
    assert one == other
    load(root, 32, SIDE)
    assert "decoding" not in capsys.readouterr().out


def test_what_was_decoded_of_other_images_does_not_stay(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unfinished file, and a whole one; copies of another size stay."""
    victim = next(interrupted.glob("train/*/*.JPEG"))
    load(interrupted, 32, 40)
    for seed in ("new", "newer"):
        image(seed, 150).save(victim)
        data = load(interrupted, 32, SIDE)
        assert "are there" not in capsys.readouterr().out
        assert isinstance(data.train, DecodedImages) and data.train.sizes is not None
        place = data.train.paths.index(str(victim))
        assert data.train.sizes[place].tolist() == [150, 150]
        assert sorted(p.name.split("-")[1] for p in interrupted.glob(".dec*")) == ["40px", "64px"]


def test_bad_files_are_all_named_and_nothing_stays(interrupted: Path) -> None:
    """Also those that an interrupted decoding has met."""
    paths = sorted(interrupted.glob("train/*/*.JPEG"))
    for path in paths[1], paths[-1]:
        path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(UserError, match=r"^2 of 34 image files cannot be read") as refusal:
        load(interrupted, 32, SIDE)
    assert all(f"{path} (truncated)" in str(refusal.value) for path in (paths[1], paths[-1]))
    assert not [*interrupted.glob(".decoded*")]


def test_a_full_disk(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the decoding and in the middle of it."""
    unfinished = next(interrupted.glob(".decoded*"))
    usage: Any = SimpleNamespace(free=14 * 3 * SIDE**2 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"set has no room for 0.2 MB of decoded images"):
            load(interrupted, 32, SIDE)
        usage.free += 1
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fsync(_: int) -> None:
            raise full

        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device; make room, and decoding"):
            load(interrupted, 32, SIDE)
    assert unfinished.exists()
    load(interrupted, 32, SIDE)
    assert "; 20 are there)" in capsys.readouterr().out


def test_a_disk_that_fails_once_does_not_vouch_for_what_it_lost(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linux reports a failed write at one `fsync` only, and drops the pages."""
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fsync(_: int) -> None:
        if failures:
            raise failures.pop()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="Input/output error"):
            load(interrupted, 32, SIDE)
    capsys.readouterr()
    load(interrupted, 32, SIDE)
    assert "; 20 are there)" in capsys.readouterr().out


def test_an_image_that_a_disk_does_not_give_is_named(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no bad file, and the disk with the decoded file is not the one that failed."""
    last = str(max(interrupted.glob("val/*/*")))
    whole = cache.decode

    def failing(path: str) -> torch.Tensor:
        if path == last:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"{last}: .*output"):
        patch.setattr(cache, "decode", failing)
        load(interrupted, 32, SIDE)
    load(interrupted, 32, SIDE)


def test_killed_before_the_file_got_its_name(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "replace", interrupt)
        load(interrupted, 32, SIDE)
    whole = next(interrupted.glob(".decoded*.unfinished")).read_bytes()
    capsys.readouterr()
    load(interrupted, 32, SIDE)
    assert "; 34 are there)" in capsys.readouterr().out
    assert next(interrupted.glob(".decoded*.uint8")).read_bytes() == whole


def interrupt(*_: object) -> None:
    raise Interrupted


def test_of_two_decodings_without_locks_one_file_stays(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network disks have no locks. The faster one ends while the slower one decodes."""
    write = cache._write

    def slower(*args: Any) -> None:
        monkeypatch.setattr(cache, "_write", write)
        load(interrupted, 32, SIDE)
        write(*args)

    monkeypatch.setattr(cache, "lock", lambda *_, **__: None)
    monkeypatch.setattr(cache, "_write", slower)
    load(interrupted, 32, SIDE)
    assert [path.suffix for path in interrupted.glob(".decoded*")] == [".uint8"]


def test_who_has_waited_for_a_decoding_is_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock holds, although the first attempt at it opened the file as well."""
    path = str(tmp_path / "lock")
    attempt = "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, 6)"
    first = [sys.executable, "-c", f"{attempt}; print(flush=True); input()", path]
    with subprocess.Popen(first, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        threading.Timer(0.3, holder.kill).start()
        with cache._alone(Path(path)):
            other = subprocess.run([sys.executable, "-c", attempt, path], capture_output=True)
    assert "waiting for it" in capsys.readouterr().out
    assert b"BlockingIOError" in other.stderr


def test_copies_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    """ImageNet's are 262 GB. (The file here is a hole.)"""
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    side = math.isqrt(memory // 3) + 1
    name = f".decoded-{side}px-{cache._fingerprint(tmp_path, ['1.png'], side)}.uint8"
    with (tmp_path / name).open("wb") as file:
        file.truncate(3 * side**2)
        file.seek(0, os.SEEK_END)
        file.write(np.array([5, 7], np.int32).tobytes())
    images, sizes = cache.decoded_images(tmp_path, ["1.png"], side, 0, scaled=True)
    assert images.shape == (1, 3, side, side) and sizes.tolist() == [[5, 7]]
    assert images[0, :, -1, -1].tolist() == [0, 0, 0]


def test_a_run_keeps_it_and_others_wait_for_its_decoding(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "plain", train=4, side=160)
    common = ("--image-size", 32, "--stem", "stock", "-b", 6, "-j", 0)
    once = ("--decode-once", SIDE)
    # Meanwhile this process decodes.
    paths = [path for split in ("train", "val") for path in getattr(load(root, 32), split).paths]
    name = f".decoded-{SIDE}px-{cache._fingerprint(root, paths, SIDE)}"
    held = files.lock(root / f"{name}.lock", "", 0)
    training = Running("resnet_main.py", root, *common, *once, "--epochs", 1, cwd=tmp_path, env={})
    training.wait_for(lambda: "=> another process decodes the images" in training.out.read_text())
    load(root, 32, SIDE)
    assert held is not None
    held.close()
    trained = training.finish()
    assert trained.code == 0, trained
    assert "=> decoding" not in trained.out and "decoded in memory as 64 x 64" in trained.out

    output = tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth"
    content = read(output)
    assert (content["decode_once"], content["whole_side"]) == (SIDE, None)
    figures = [line for line in trained.out.splitlines() if line.startswith(" * ")]
    evaluate = ("resnet_main.py", root, "-e", "--resume", output, "-j", 0)
    as_trained = run(*evaluate, *once, cwd=tmp_path).out
    assert figures[-1] in as_trained and "=> evaluated on" not in as_trained
    itself = run(*evaluate, cwd=tmp_path).out
    assert "=> evaluated on the images themselves; as in training with --decode-once 64" in itself
    assert "decoded by workers" in itself
    compared = run(
        *("diff_eval.py", output, output, "--data", root, "--classes", "all", "-j", 0),
        *once,
        cwd=tmp_path,
    )
    assert compared.code == 0 and figures[-1].split()[2] in compared.out.split()
    assert "=> evaluated on the images' copies of --decode-once 64" in compared.out
    comparison = json.loads((tmp_path / "diff" / "comparison.json").read_text())
    assert comparison["decode_once"] == SIDE
    assert len(list(root.glob(".decoded*"))) == 1

    changed = run(
        *("resnet_main.py", root, "--resume", "auto", "-j", 0, "--epochs", 2, "--decode-once", 0),
        cwd=tmp_path,
    )
    assert "was trained with --decode-once 64, this run has 0" in changed.out
    assert "was measured on other validation data" in changed.out


def test_where_it_has_no_effect_or_an_odd_one_a_line_says_so(tmp_path: Path) -> None:
    small = make_dataset(tmp_path / "small", "plain", train=4)
    large = make_dataset(tmp_path / "large", "plain", train=4, side=160)
    flags = ("-e", "--image-size", 32, "--stem", "stock", "-j", 0, "--decode-once")
    out = run("resnet_main.py", small, *flags, 64, cwd=tmp_path).out
    assert "=> small squares are always decoded once: --decode-once has no effect" in out
    out = run("resnet_main.py", large, *flags, 20, cwd=tmp_path).out
    assert "=> --decode-once 20 is less than --image-size 32: even whole images are enlarged" in out
    refused = run("resnet_main.py", large, *flags, -1, cwd=tmp_path)
    assert "--decode-once" in error_line(refused)
