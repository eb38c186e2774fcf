"""Layouts, the decode cache, and what each process sees of an epoch."""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kit import REAL_DATA, image, make_dataset, run
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from engine import files
from engine.cli import UserError
from image_classification import cache
from image_classification import data as image_data
from image_classification import sources as image_sources
from image_classification.cache import BadImageError, open_image, refuse_bad_images, small_side
from image_classification.data import ImageLoader
from image_classification.folders import find_images
from image_classification.settings import TINY_IMAGENET


def load(root: Path, size: int = 32) -> image_data.ImageData:
    return image_data.load_dataset(str(root), size, workers=0, download=False)


def loader(
    images: Any, rank: int = 0, world_size: int = 1, train: bool = True, **options: Any
) -> ImageLoader:
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=world_size
    )
    options = {"batch_size": 12, "image_size": 32, "seed": 5, "workers": 0, **options}
    return ImageLoader(accelerator, images, train=train, **options)


def test_all_layouts_give_the_same_classes_labels_and_pixels(tmp_path: Path) -> None:
    found = [
        load(make_dataset(tmp_path / name, layout))
        for name, layout in (("a", "tiny"), ("b", "sorted"), ("c", "plain"))
    ]
    for data in found:
        assert data.classes == ["n00000000", "n00000001", "n00000002"]
        assert len(data.train) == 24
        assert data.train.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
        labels = {
            Path(p).name: int(t) for p, t in zip(data.val.paths, data.val.targets, strict=True)
        }
        assert labels == {f"val_{i}.JPEG": i % 3 for i in range(10)}
        assert isinstance(data.train, image_data.DecodedImages)
        assert torch.equal(data.train.images, found[0].train.images)  # type: ignore[union-attr]
        grey = data.train.images[1]
        assert torch.equal(grey[0], grey[2]) and not torch.equal(grey, data.train.images[0])


def test_real_tiny_imagenet(tmp_path: Path) -> None:
    archive = REAL_DATA / "tiny-imagenet-20.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive}")
    files.unpack(archive, "tiny-imagenet-200", tmp_path / "data")
    data = image_data.load_dataset(str(tmp_path / "data"), 64, workers=2, download=False)
    assert data.classes[:2] == ["n01443537", "n01629819"]
    assert (len(data.train), len(data.val)) == (10_000, 1_000)
    assert data.val.targets.bincount().tolist() == [50] * 20
    assert isinstance(data.train, image_data.DecodedImages)
    grey = (data.train.images[:, 0] == data.train.images[:, 2]).flatten(1).all(1)
    assert grey.sum() >= 39


def test_broken_datasets_are_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    annotations = root / "val" / "val_annotations.txt"
    good = annotations.read_text()

    def refused(pattern: str, where: Path = root) -> None:
        with pytest.raises(UserError, match=pattern):
            find_images(where)

    for bad, pattern in (
        (good + "val_77.JPEG\tn00000001\t0\t0\t1\t1\n", "line 11: .*val_77.JPEG does not exist"),
        (good.replace("n00000002", "n00000009"), "line 3: class n00000009 is not in train"),
        (good + good.splitlines()[0], "annotated twice"),
        (good.split("\n", 1)[1], r"1 image\(s\) .* have no line: val_0.JPEG"),
        ("", "annotates no image"),
    ):
        annotations.write_text(bad)
        refused(pattern)
    refused("no such folder", tmp_path / "nothing")
    refused("is a file", annotations)
    (tmp_path / "empty").mkdir()
    refused(r"no folder train/ \(it holds nothing\)", tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    refused("no folder val/", tmp_path / "empty")
    (tmp_path / "empty" / "val").mkdir()
    refused("train/ holds no class folders", tmp_path / "empty")
    (tmp_path / "empty" / "train" / "cat").mkdir()
    refused("cat: holds no images", tmp_path / "empty")

    annotations.unlink()
    refused("val_annotations.txt: missing")

    plain = make_dataset(tmp_path / "plain", "plain")
    (plain / "val" / "dog").mkdir()
    refused(r"val/ has 1 class\(es\) that train/ lacks: dog", plain)


def test_validation_images_lie_in_one_place(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "sorted")
    expected = find_images(root).val.targets
    images = root / "val" / "images"
    images.mkdir()  # scripts that sort the images leave it behind, with the annotations
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn00000000\n")
    assert find_images(root).val.targets == expected
    stray = images / "val_0.JPEG"
    shutil.copy(root / "val" / "n00000000" / "images" / "val_0.JPEG", stray)
    with pytest.raises(UserError, match=f"has class folders in .*/val and images in {images};"):
        find_images(root)
    stray.unlink()
    for name in ("n00000000", "n00000001"):
        (root / "val" / name).rename(images / name)
    with pytest.raises(UserError, match=f"class folders in .*/val and class folders in {images};"):
        find_images(root)
    (root / "val" / "n00000002").rename(images / "n00000002")
    assert find_images(root).val.targets == expected
    shutil.rmtree(images)
    with pytest.raises(UserError, match="has no images in val/; wanted are class folders"):
        find_images(root)
    shutil.copy(root / "train" / "n00000000" / "images" / "n00000000_0.JPEG", root / "val")
    with pytest.raises(UserError, match="has its images flat in val/, without classes; wanted are"):
        find_images(root)


def test_the_images_of_a_class_are_those_of_imagefolder(tmp_path: Path) -> None:
    """In subfolders, beside them, behind links; what cannot be read is named."""
    root = make_dataset(tmp_path / "set", "plain")
    deep, elsewhere = root / "train" / "n00000000" / "a" / "b", tmp_path / "elsewhere"
    deep.mkdir(parents=True)
    (root / "train" / "n00000001" / "images").mkdir()
    for i, folder in ((3, deep), (5, deep.parent)):
        (root / "train" / "n00000000" / f"n00000000_{i}.JPEG").rename(folder / f"{i}.PnG")
    moved = root / "train" / "n00000001" / "images" / "x.jpg"
    (root / "train" / "n00000001" / "n00000001_4.JPEG").rename(moved)
    (root / "train" / "n00000002").rename(elsewhere)
    link = root / "train" / "n00000002"
    link.symlink_to(elsewhere)
    theirs = [ImageFolder(root / part).samples for part in ("train", "val")]
    for hidden in (".ipynb_checkpoints", "@eaDir"):
        for folder in (root / "train", root / "train" / "n00000000", deep):
            (folder / hidden).mkdir()
            shutil.copy(moved, folder / hidden / "x.jpg")
    shutil.copy(moved, deep / "._x.jpg")
    found = find_images(root)
    assert [[*zip(*split, strict=True)] for split in (found.train, found.val)] == theirs

    def refused(what: Path) -> None:
        with pytest.raises(UserError, match=f"^{what}: a link to .*, which is missing"):
            find_images(root)

    elsewhere.rename(tmp_path / "gone")
    refused(link)
    link.unlink()
    (root / "val" / "n00000002").rename(tmp_path / "also gone")
    (deep / "more").symlink_to("nowhere")
    refused(deep / "more")
    (deep / "more").unlink()
    (root / "val" / "n00000003").symlink_to(elsewhere)
    refused(root / "val" / "n00000003")


def test_bad_images_are_all_named_at_once(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    paths = find_images(root).train.paths
    whole = Path(paths[3]).read_bytes()
    Path(paths[3]).write_bytes(whole[: len(whole) // 2])
    Path(paths[10]).write_bytes(b"")
    Path(paths[17]).write_text("a web page")
    Path(paths[20]).unlink()
    Path(paths[20]).symlink_to("nowhere")
    met = BadImageError(paths[3])
    with pytest.raises(UserError, match=f"^{paths[3]} cannot be read"):
        refuse_bad_images(met, root, paths, 0, 4)
    for attempt in (lambda: load(root), lambda: refuse_bad_images(met, root, paths, 0, 1)):
        with pytest.raises(UserError) as refusal:
            attempt()
        message = str(refusal.value)
        assert message.startswith("4 of ")
        for path, why in (
            (paths[3], "truncated"),
            (paths[10], "empty"),
            (paths[17], "not an image"),
            (paths[20], "missing"),
        ):
            assert f"{path} ({why})" in message
    assert not list(root.glob(".decoded*"))


def test_the_cache_is_made_once_and_again_when_a_file_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset(tmp_path / "set")
    first = load(root).train
    assert "decoding 34 images" in capsys.readouterr().out
    load(root)
    assert "decoding" not in capsys.readouterr().out
    image("another").save(first.paths[0])
    second = load(root).train
    assert "decoding" in capsys.readouterr().out
    assert not torch.equal(first.images[0], second.images[0])  # type: ignore[union-attr]
    assert torch.equal(first.images[1:], second.images[1:])  # type: ignore[union-attr]
    # Two files change places, as `cp -p` or `touch -r` would have it: equal sizes and times.
    paths = [Path(p) for p in first.paths[2:4]]
    contents = [p.read_bytes().ljust(9000) for p in paths]
    for _ in range(2):
        contents.reverse()
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
            os.utime(path, (0, 0))
        third = load(root).train
        assert "decoding" in capsys.readouterr().out
    assert torch.equal(second.images, third.images)  # type: ignore[union-attr]
    assert len(list(root.glob(".decoded*"))) == 1
    # A cache that was cut is not taken for whole.
    pixels = next(root.glob(".decoded*"))
    pixels.write_bytes(pixels.read_bytes()[:-1])
    load(root)
    assert "decoding" in capsys.readouterr().out


def test_read_only_datasets_share_the_temporary_folder_but_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a reproducible archive: equal names, sizes and modification times."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(
        "image_classification.cache.tempfile.gettempdir", lambda: str(tmp_path / "tmp")
    )
    roots = [tmp_path / name for name in "ab"]
    for shade, root in enumerate(roots):
        for part, name in itertools.product(("train", "val"), "xy"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(100):
                Image.new("RGB", (8, 8), (200 * shade,) * 3).save(folder / f"{i}.bmp")
                os.utime(folder / f"{i}.bmp", (0, 0))
    monkeypatch.setattr("image_classification.cache.os.access", lambda *_: False)  # not root's
    for _ in range(2):
        for shade, root in enumerate(roots):
            data = load(root, size=8)
            assert (data.val.images == 200 * shade).all()  # type: ignore[union-attr]
    assert capsys.readouterr().out.count("decoding 400 images") == 2
    assert not list(tmp_path.glob("?/.decoded*"))
    # Images of a file system, mounted at one place: not even the time of the last change differs.
    still: Any = SimpleNamespace(
        stat=lambda path: SimpleNamespace(st_size=9, st_mtime_ns=0, st_ctime_ns=0), path=os.path
    )
    monkeypatch.setattr("image_classification.cache.os", still)
    names = [cache._fingerprint(root, find_images(root).val.paths, 8) for root in roots]
    assert names[0] != names[1]


def test_large_images_go_through_the_originals_transforms(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "plain", side=160)
    assert small_side(find_images(root).train.paths) is None
    mixed = make_dataset(tmp_path / "mixed", "plain")
    image("odd", 160).save(mixed / "val" / "n00000000" / "val_0.JPEG")
    assert isinstance(load(mixed).train, image_data.ImageFiles)
    data = load(root, size=56)
    assert isinstance(data.train, image_data.ImageFiles)
    assert isinstance(data.val, image_data.ImageFiles)
    original = v2.Compose([v2.Resize(64), v2.CenterCrop(56), v2.PILToTensor()])
    expected = original(Image.open(data.val.paths[4]).convert("RGB"))
    assert torch.equal(data.val[4, None].permute(2, 0, 1), expected)
    Path(data.train.paths[0]).unlink()
    with pytest.raises(BadImageError):
        list(loader(data.train, image_size=56, workers=1).epoch(0))


def test_workers_live_for_an_epoch(tmp_path: Path) -> None:
    """Training's have gone when validation has its own: there are never more than -j."""
    data = load(make_dataset(tmp_path / "set", "plain", side=160))
    workers = min(2, os.cpu_count() or 1)
    loaders = [loader(data.train, workers=2), loader(data.val, train=False, workers=2)]
    others = {*multiprocessing.active_children()}  # of earlier tests
    for part in (*loaders, *loaders):
        for _ in part.epoch(0):
            assert len({*multiprocessing.active_children()} - others) == workers
        assert {*multiprocessing.active_children()} <= others


@pytest.mark.parametrize("side", [64, 160])
def test_processes_share_the_batches_of_one(tmp_path: Path, side: int) -> None:
    # 27 samples in global batches of 12: the last one has 3, for 4 processes.
    data = load(make_dataset(tmp_path / "set", train=9, side=side))
    alone = list(loader(data.train).epoch(3))
    together = [list(loader(data.train, rank, 4).epoch(3)) for rank in range(4)]
    assert [len(batch.indices) for batch in alone] == [12, 12, 3]
    assert sorted(torch.cat([b.indices for b in alone]).tolist()) == list(range(27))
    for step, batch in enumerate(alone):
        parts = [batches[step] for batches in together]
        assert len({p.images.shape for p in parts}) == 1
        real = [p.weights.bool() for p in parts]
        for field in ("indices", "targets", "images"):
            mine = torch.cat([getattr(p, field)[r] for p, r in zip(parts, real, strict=True)])
            assert torch.equal(mine, getattr(batch, field)), field
        assert {p.size for p in parts} == {len(batch.indices)}


def test_an_epoch_can_start_anywhere_and_differs_from_the_next(tmp_path: Path) -> None:
    data = load(make_dataset(tmp_path / "set", train=9))
    train = loader(data.train)
    whole, rest = list(train.epoch(1)), list(train.epoch(1, start=1))
    assert torch.equal(whole[1].images, rest[0].images)
    assert torch.equal(whole[2].images, rest[1].images)
    other = next(iter(train.epoch(2)))
    assert not torch.equal(other.indices, whole[0].indices)
    assert not torch.equal(
        next(iter(loader(data.train, seed=6).epoch(1))).indices, whole[0].indices
    )


def test_mixing_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    data = load(make_dataset(tmp_path / "set", train=9))
    mix = v2.RandomChoice([v2.CutMix(num_classes=3), v2.MixUp(num_classes=3)])
    alone = list(loader(data.train, mix=mix).epoch(0))
    together = [list(loader(data.train, rank, 2, mix=mix).epoch(0)) for rank in range(2)]
    for step, batch in enumerate(alone):
        for field in ("images", "soft_targets", "targets"):
            parts = [getattr(b[step], field)[b[step].weights.bool()] for b in together]
            assert torch.equal(torch.cat(parts), getattr(batch, field)), field
    assert alone[0].soft_targets is not None
    torch.testing.assert_close(alone[0].soft_targets.sum(1), torch.ones(12))
    plain = next(iter(loader(data.train).epoch(0)))
    assert not torch.equal(plain.images, alone[0].images)


def test_validation_batches_go_whole_to_the_processes_in_turn(tmp_path: Path) -> None:
    data = load(make_dataset(tmp_path / "set", val=30))

    def batches(rank: int, world_size: int) -> list[list[int]]:
        own = loader(data.val, rank, world_size, train=False, batch_size=8)
        return [batch.indices.tolist() for batch in own.epoch(0)]

    assert batches(0, 1) == [[*range(i, min(i + 8, 30))] for i in range(0, 30, 8)]
    for rank in range(4):
        assert batches(rank, 4) == batches(0, 1)[rank::4]


def test_the_sample_is_drawn_alike_everywhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image_sources.draw_sample(tmp_path / name)
    trees = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert [p.read_bytes() for p in trees[0]] == [p.read_bytes() for p in trees[1]]
    data = image_data.load_dataset(str(tmp_path / "a"), 64, workers=2, download=False)
    assert (len(data.classes), len(data.train), len(data.val)) == (10, 2500, 500)
    assert data.val.targets.bincount().tolist() == [50] * 10


def test_tiny_imagenet_is_downloaded_verified_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer itself is tested in test_files.py; here a copy stands for it."""
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "made" / "tiny-imagenet-200")
    archive = Path(shutil.make_archive("made", "zip", tmp_path / "made"))
    monkeypatch.setattr(image_sources, "TINY_IMAGENET_SIZE", archive.stat().st_size)
    monkeypatch.setattr(
        image_sources,
        "TINY_IMAGENET_DIGEST",
        f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}",
    )
    calls = []

    def fetch(url: str, path: Path, **_: object) -> None:
        calls.append(url)
        path.parent.mkdir()
        shutil.copy(archive, path)

    monkeypatch.setattr(files, "download", fetch)
    default = str(TINY_IMAGENET)
    root = image_sources.resolve(default, download=True)
    assert len(find_images(root).train.paths) == 24
    assert calls == ["http://cs231n.stanford.edu/tiny-imagenet-200.zip"]
    # An archive put there by hand is taken, also with --no-download; a wrong one is not.
    shutil.rmtree(root)
    assert image_sources.resolve(default, download=False) == root
    shutil.rmtree(root)
    root.with_name("tiny-imagenet-200.zip").write_bytes(b"?")
    with pytest.raises(UserError, match="bytes expected"):
        image_sources.resolve(default, download=True)
    assert len(calls) == 1


def test_a_stray_among_images_of_one_size_changes_no_other(tmp_path: Path) -> None:
    """Whether its header is looked at or not; cut, broken or of another size."""
    root = make_dataset(tmp_path / "set", "plain", train=20)
    whole = load(root).train
    assert isinstance(whole, image_data.DecodedImages)
    place = next(i for i, path in enumerate(whole.paths) if path.endswith("_4.JPEG"))
    for size in ((65, 64), (63, 64), (640, 480), (1, 1)):
        image("stray", 64).resize(size).save(whole.paths[place])
        other = load(root).train
        assert isinstance(other, image_data.DecodedImages), size
        same = [torch.equal(a, b) for a, b in zip(whole.images, other.images, strict=True)]
        assert [i for i, equal in enumerate(same) if not equal] == [place]


@pytest.mark.parametrize("error", [struct.error("unpack"), EOFError(), KeyError(3), TypeError("x")])
def test_whatever_a_damaged_image_raises_names_its_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "set", "plain")
    victim = find_images(root).val.paths[3]
    whole_open = Image.open

    def failing(path: Any, *args: Any) -> Image.Image:
        if path == victim:
            raise error
        return whole_open(path, *args)

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(UserError, match=rf"1 of 34 image files .*{Path(victim).name} \(damaged"):
        load(root)


def test_names_that_only_look_alike_are_shown_apart(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "plain", classes=1)
    (root / "train" / "n00000000").rename(root / "train" / "caf\u00e9")
    (root / "val" / "n00000000").rename(root / "val" / "cafe\u0301")
    with pytest.raises(UserError) as refusal:
        find_images(root)
    assert "cafe\\u0301" in str(refusal.value)


def test_annotations_may_have_a_mark_and_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    annotations = root / "val" / "val_annotations.txt"
    odd = os.fsdecode(b"\xca\xfd.JPEG")
    (root / "val" / "images" / "val_4.JPEG").rename(root / "val" / "images" / odd)
    content = annotations.read_bytes().replace(b"val_4.JPEG", b"\xca\xfd.JPEG")
    annotations.write_bytes(b"\xef\xbb\xbf" + content)
    val = find_images(root).val
    assert val.targets[[Path(path).name for path in val.paths].index(odd)] == 4 % 3


def test_names_of_large_images_may_be_no_utf8(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / os.fsdecode(b"d\xe4ta"), "plain", side=160)
    odd = os.fsdecode(b"\xca\xfd.JPEG")
    next(root.glob("val/n00000001/*")).rename(root / "val" / "n00000001" / odd)
    expected = find_images(root).val
    for workers in (0, 2):
        val = load(root).val
        assert isinstance(val, image_data.ImageFiles) and val.paths == expected.paths
        batch = next(iter(loader(val, train=False, workers=workers).epoch(0)))
        assert batch.targets.tolist() == expected.targets
    Path(val.paths[expected.targets.index(1)]).unlink()
    with pytest.raises(BadImageError, match="n00000001"):
        list(loader(val, train=False).epoch(0))


SIXTEEN = [0, 255, 256, 257, 32896, 65535]


@pytest.mark.parametrize(
    ("name", "kind", "values", "mode", "expected"),
    [
        ("grey.png", "uint8", [0, 7, 255], "L", [0, 7, 255]),
        ("deep.png", "uint16", SIXTEEN, "I;16", [0, 0, 1, 1, 128, 255]),
        ("deep.tif", ">u2", SIXTEEN, "I;16B", [0, 0, 1, 1, 128, 255]),
        ("dark.pgm", "uint16", [0, 100, 200], "I", [0, 0, 0]),
        ("wide.tif", "int32", [-9, *SIXTEEN, 10**6], "I", [0, 0, 0, 1, 1, 128, 255, 255]),
        ("bytes.tif", "int32", [-9, 0, 7, 255], "I", [0, 0, 7, 255]),
        ("unit.tif", "float32", [-1, 0, 0.5, 1], "F", [0, 0, 128, 255]),
        ("floats.tif", "float32", [-1, 0, 1.5, 255], "F", [0, 0, 1, 255]),
        ("large.tif", "float32", SIXTEEN, "F", [0, 0, 1, 1, 128, 255]),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled(
    name: str, kind: str, values: list[float], mode: str, expected: list[int], tmp_path: Path
) -> None:
    path = tmp_path / name
    Image.fromarray(np.array([values], kind)).save(path)
    with Image.open(path) as raw:
        assert raw.mode == mode
    decoded = open_image(str(path))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("side", [32, 160])
def test_what_an_owner_may_not_expect_is_one_line_each_at_every_start(
    side: int, tmp_path: Path
) -> None:
    """Small images, whose second start finds them decoded, and large ones."""
    root = make_dataset(tmp_path / "set", "plain", classes=3, side=side)
    for part in ("train", "val"):
        for i, name in enumerate(("1", "10", "2")):
            (root / part / f"n0000000{i}").rename(root / part / name)
    for path in root.glob("*/*/*.JPEG"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(path.with_suffix(".png"))
        path.unlink()
    for name in ("2/a.jfif", "10/b.JFIF", "10/deep/c.avif", "1/notes", "1/1_boxes.txt", "d.png"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "val" / "1" / "val_0.png", root / "train" / name)
    for name in ("1/.DS_Store", "10/._e.jfif", "2/@eaDir/f.avif", ".cache/g.heic"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).touch()
    flags = (root, "-e", "--image-size", 32, "--stem", "stock", "-j", 0)
    for is_first in (True, False):
        out = run("resnet_main.py", *flags, cwd=tmp_path).out
        assert ("=> decoding" in out) == (is_first and side == 32)
        assert out[out.index(f"=> {root}: 24 training") :].splitlines()[1:4] == [
            f"=> {root}: 5 file(s) left out: 2 .jfif, 1 without an ending, 1 .avif, 1 .png beside "
            "the class folders (images end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, "
            ".webp)",
            f"=> {root}: classes are sorted as text: 1, 10, 2: class 1 is `10`",
            f"=> {root}: pixels of more than 8 bits (I;16) are scaled to 8",
        ]
    images = load(root).val
    if isinstance(images, image_data.DecodedImages):
        deep = np.asarray(Image.open(images.paths[0]))
        assert images.images[0, 1].tolist() == (deep >> 8).tolist()


def test_an_ordinary_dataset_and_a_cache_of_other_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset(tmp_path / "set", classes=3)
    (root / "train" / "n00000001" / "n00000001_boxes.txt").touch()
    (root / "val" / "images" / ".DS_Store").touch()
    monkeypatch.setattr(cache, "DECODING", cache.DECODING - 1)
    load(root)
    monkeypatch.undo()
    capsys.readouterr()
    assert load(root).notes == []
    assert "=> decoding" in capsys.readouterr().out
    (root / "val" / "images" / "x.heic").touch()
    assert [note.split(" (")[0] for note in load(root).notes] == [
        f"=> {root}: 1 file(s) left out: 1 .heic"
    ]


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (["0", "1", "2", "9"], None),
        (["01", "02", "10"], None),
        (["a10", "b2"], None),
        ([str(i) for i in range(12)], "0, 1, 10, 11, 2, …: class 2 is `10`"),
        (["class_8", "class_9", "class_10"], "class_10, class_8, class_9: class 0 is `class_10`"),
    ],
)
def test_numbered_classes_in_another_order_than_their_numbers(
    classes: list[str], line: str | None, tmp_path: Path
) -> None:
    for part, name in itertools.product(("train", "val"), classes):
        (tmp_path / part / name).mkdir(parents=True)
        (tmp_path / part / name / "x.png").touch()
    expected = [f"=> {tmp_path}: classes are sorted as text: {line}"] if line else []
    assert find_images(tmp_path).notes == expected


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpegs_have_the_pixels_that_pil_has(mode: str, subsampling: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture = image("a", 160, mode).resize((157, 91))
    picture.save(
        path,
        subsampling=subsampling,
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0",
    )
    with Image.open(path) as saved:
        assert saved.getexif()[0x112] == 6  # turned by 90 degrees, which the original ignores
    expected = np.asarray(open_image(str(path)))
    assert cache.decode(str(path)).tolist() == expected.tolist()
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadImageError) as refusal:
        cache.decode(str(path))
    assert cache.describe(refusal.value) == "truncated"
