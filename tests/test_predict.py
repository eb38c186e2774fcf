"""What a classifier says of images, beside a plain torch computation."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from kit import error_line, image, make_dataset, read, run
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = ["goldfish", "n00000001", "newt"]
FAST = ["--epochs", 1, "-b", 8, "-j", 0, "--image-size", 32, "--stem", "stock", "--lr", 0.001]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained models, one of small images, which validation sees whole, and one of larger."""
    folder = tmp_path_factory.mktemp("predict")
    for name, side in (("small", 40), ("large", 160)):
        make_dataset(folder / name, "plain", side=side)
        (folder / name / "words.txt").write_text(
            "n00000000\tgoldfish, Carassius auratus\nn00000002\tnewt\n"
        )
        result = run("resnet_main.py", name, *FAST, "--output-dir", f"{name}_run", cwd=folder)
        assert result.code == 0, result
    image("wide", 160).resize((150, 90)).save(folder / "wide.png")
    return folder


def plain(checkpoint: Path, picture: Path, whole_side: int | None) -> list[float]:
    """The likelihoods of all classes, by torchvision's own transforms."""
    if whole_side is None:
        steps: list[torch.nn.Module] = [v2.Resize(round(32 * 256 / 224)), v2.CenterCrop(32)]
    else:
        steps = [v2.Resize(whole_side), v2.CenterCrop(whole_side)]
    pixels = v2.functional.pil_to_tensor(v2.Compose(steps)(Image.open(picture).convert("RGB")))
    pixels = v2.functional.resize(pixels.float(), [32, 32], antialias=True)
    model = models.resnet18(num_classes=3)
    model.load_state_dict(read(checkpoint)["state_dict"])
    with torch.inference_mode():
        logits = model.eval()(v2.functional.normalize(pixels / 255, MEAN, STD)[None])
    likelihoods: list[float] = logits.softmax(1)[0].tolist()
    return likelihoods


@pytest.mark.parametrize(("kind", "whole_side"), [("small", 40), ("large", None)])
def test_likelihoods_are_those_of_a_plain_computation(
    folder: Path, kind: str, whole_side: int | None
) -> None:
    checkpoint = folder / f"{kind}_run" / "model_best.pth"
    flags = (checkpoint, "wide.png", f"{kind}/val", "--csv", f"{kind}.csv")
    result = run("predict.py", *flags, cwd=folder)
    assert result.code == 0, result
    with (folder / f"{kind}.csv").open() as file:
        rows = list(csv.DictReader(file))
    pictures = list(dict.fromkeys(row["file"] for row in rows))
    val = sorted(str(p.relative_to(folder)) for p in (folder / kind / "val").rglob("*.JPEG"))
    assert pictures == ["wide.png", *val]
    for picture in pictures:
        own = [row for row in rows if row["file"] == picture]
        expected = plain(checkpoint, folder / picture, whole_side)
        order = sorted(range(3), key=lambda i: -expected[i])
        assert [row["rank"] for row in own] == ["1", "2", "3"]
        assert [row["class"] for row in own] == [f"n0000000{i}" for i in order]
        assert [row["name"] for row in own] == [NAMES[i] for i in order]
        found = [float(row["likelihood"]) for row in own]
        assert found == pytest.approx([expected[i] for i in order], abs=1e-4)
    best = {row["file"]: row for row in rows if row["rank"] == "1"}
    lines = dict(line.split(": ") for line in result.out.splitlines() if ": " in line)
    assert [*lines] == pictures
    for picture, said in lines.items():
        share = 100 * float(best[picture]["likelihood"])
        name, number, _ = said.split(", ")[0].split(" ")
        assert name == best[picture]["name"]
        assert float(number) == pytest.approx(share, abs=0.051)


def test_validation_counts_what_is_predicted(folder: Path) -> None:
    checkpoint = folder / "small_run" / "model_best.pth"
    flags = (checkpoint, "small/val", "--top", 1, "--csv", "top.csv")
    assert run("predict.py", *flags, cwd=folder).code == 0
    with (folder / "top.csv").open() as file:
        right = [row["class"] == row["file"].split("/")[2] for row in csv.DictReader(file)]
    assert 100 * sum(right) / len(right) == pytest.approx(read(checkpoint)["best_acc1"])


def test_names_are_the_classes_or_numbers_where_a_checkpoint_has_no_others(folder: Path) -> None:
    content = read(folder / "small_run" / "model_best.pth")
    del content["names"]
    torch.save(content, folder / "unnamed.pth")
    result = run("predict.py", "unnamed.pth", "wide.png", cwd=folder)
    assert {word[:2] for word in result.out.split() if word[0] in "ng"} == {"n0"}, result
    torch.save(content["state_dict"], folder / "bare.pth")
    flags = ("bare.pth", "small/val", "-a", "resnet18", "--csv", "bare.csv")
    result = run("predict.py", *flags, cwd=folder)
    assert "for which size of images they are: 64 px" in result.err, result
    with (folder / "bare.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"0", "1", "2"}


def test_bad_images_are_named_after_the_others(folder: Path) -> None:
    mixed = folder / "mixed"
    (mixed / "deeper").mkdir(parents=True)
    (mixed / ".hidden").mkdir()
    good = mixed / "deeper" / "good.png"
    shutil.copy(folder / "wide.png", good)
    shutil.copy(folder / "wide.png", mixed / ".hidden" / "no.png")
    (mixed / "empty.png").touch()
    (mixed / "text.jpg").write_text("no image")
    (mixed / "notes.txt").write_text("not asked for")
    flags = ("small_run/model_best.pth", "mixed", "--csv", "mixed.csv")
    result = run("predict.py", *flags, cwd=folder)
    note, line = result.err.splitlines()
    assert note.startswith("=> mixed: 1 file(s) left out: 1 .txt (images end in .jpg")
    assert "2 of 3 images cannot be read: mixed/empty.png (empty), mixed/text.jpg (not an" in line
    assert result.code == 2
    assert result.out.splitlines()[0].startswith("mixed/deeper/good.png: ")
    with (folder / "mixed.csv").open() as file:
        assert {row["file"] for row in csv.DictReader(file)} == {"mixed/deeper/good.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["small_run/model_best.pth", "gone.jpg"], "gone.jpg: no such file or folder"),
        (
            ["small_run/model_best.pth", "hollow"],
            "hollow: holds no images; 1 file(s) left out: 1 .heic",
        ),
        (["small_run/model_best.pth", "wide.png", "--csv", "wide.png"], "the file of IMAGE too"),
        (["small_run/model_best.pth", "wide.png", "--top", "0"], "must be at least 1"),
        (["gone.pth", "wide.png"], "gone.pth"),
        (["nan.pth", "wide.png", "--csv", "nan.csv"], "its weights give no finite likelihoods"),
        (["other.pth", "wide.png"], "names are not the names of 3 classes: damaged"),
    ],
)
def test_mistakes_end_in_one_line(folder: Path, flags: list[str], message: str) -> None:
    (folder / "hollow").mkdir(exist_ok=True)
    (folder / "hollow" / "phone.heic").touch()
    content = read(folder / "small_run" / "model_best.pth")
    torch.save({**content, "names": ["one"]}, folder / "other.pth")
    content["state_dict"]["fc.weight"][0, 0] = float("nan")
    torch.save(content, folder / "nan.pth")
    result = run("predict.py", *flags, cwd=folder)
    assert message in error_line(result)
    assert not (folder / "nan.csv").exists()
