"""Two models whose predictions are known by construction, compared as a user does."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import Result, error_line, launch, run
from PIL import Image
from torchvision import models

from diff_eval import HEAD, OWN, THUMBNAIL, choose, copy_name, drawable_names
from diff_eval import compare as compare_models
from engine.cli import UserError
from image_classification.augment import MEAN, STD

# Grey levels of the validation images of each class; a model says 1 above its threshold.
LEVELS = {"cat": [10, 60, 110, 160, 210], "dog": [30, 90, 140, 190, 240], "fox": [50, 200]}
THRESHOLDS = {"a": 100, "b": 150}


def brightness_model(threshold: int, classes: int = 3) -> dict[str, torch.Tensor]:
    """A ResNet-18 that says class 1 for images brighter than `threshold`, else class 0.

    Its only path copies red to a feature: the residual branches and other channels are zero.
    """
    state = {
        name: torch.ones_like(tensor) if tensor.dim() == 1 else torch.zeros_like(tensor)
        for name, tensor in models.resnet18(num_classes=classes).state_dict().items()
    }
    for name, tensor in state.items():
        if name.endswith(("running_mean", "bias")):
            tensor.zero_()
        elif "conv1.weight" in name and name.startswith("conv1"):
            tensor[0, 0, 3, 3] = 1
        elif "downsample.0" in name:
            tensor[0, 0] = 1
    red, spread = 255 * MEAN[0], 255 * STD[0]
    state["bn1.bias"][0] = red / spread  # back above zero, for the ReLU
    state["fc.weight"].zero_()
    state["fc.weight"][1, 0] = 5.0
    state["fc.bias"].fill_(-100.0)
    state["fc.bias"][0] = 0
    state["fc.bias"][1] = -5.0 * threshold / spread
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    for name, levels in LEVELS.items():
        for split in ("train", "val"):
            images = folder / "set" / split / name
            images.mkdir(parents=True)
            for i, level in enumerate(levels):  # the same file names in every class
                Image.new("RGB", (32, 32), (level, 0, 0)).save(images / f"{i}.png")
    (folder / "set" / "words.txt").write_text("dog\tdomestic dog, Canis familiaris\nelk\tmoose\n")
    for name, threshold in THRESHOLDS.items():
        state = brightness_model(threshold)
        kit = {"arch": "resnet18", "stem": "stock", "image_size": 32, "num_classes": 3}
        kit["classes"] = ["cat", "dog", "fox"]
        torch.save({**kit, "state_dict": state}, folder / f"{name}.pth")
        torch.save(state, folder / f"{name}_bare.pth")
    return folder


def compare(folder: Path, *flags: object) -> Result:
    result = run("diff_eval.py", *flags, "--data", "set", cwd=folder)
    assert result.code == 0, result
    return result


def copies(folder: Path) -> set[str]:
    tables = {"disagreements.csv", "contact_sheet.png", "comparison.json"}
    return {p.name for p in folder.iterdir()} - tables


def test_the_images_the_table_and_the_csv_are_those_known(folder: Path) -> None:
    result = compare(folder, "a.pth", "b.pth")
    # Between 100 and 150, a says 1 and b says 0.
    assert copies(folder / "diff") == {"0_a1_b0_2.png", "1_a1_b0_2.png"}
    original = folder / "set" / "val" / "dog" / "2.png"
    assert (folder / "diff" / "1_a1_b0_2.png").read_bytes() == original.read_bytes()
    sentence = (
        "The difference, a - b = +0.0 points, is no more than chance (95 % interval -32.7 to 32.7, "
        "McNemar p = 1)"
    )
    assert result.out.splitlines()[-10:] == [
        "=> classes 0 cat, 1 domestic dog",
        "a = a.pth: Acc@1 50.000 on 10 images",
        "b = b.pth: Acc@1 50.000 on 10 images",
        "agreement 80.000",
        "             b right   b wrong",
        "a right            4         1",
        "a wrong            1         4",
        " * a Acc@1 50.000 b Acc@1 50.000 disagree 2 of 10",
        sentence,
        f"=> {folder.resolve()}/diff/: 2 images, disagreements.csv, contact_sheet.png, "
        "comparison.json",
    ]
    comparison = json.loads((folder / "diff" / "comparison.json").read_text())
    low, high = comparison.pop("interval")
    assert -low == high == pytest.approx(100 * 1.959964 * (4 / 12 / 12) ** 0.5)
    assert comparison == {
        "a": "a.pth",
        "b": "b.pth",
        "count": 10,
        "decode_once": 0,
        "acc1": {"a": 50.0, "b": 50.0},
        **{"only_a": 1, "only_b": 1, "both": 4, "neither": 4},
        "disagree": 2,
        "difference": 0.0,
        "mcnemar_p": 1.0,
        "sentence": sentence,
    }
    with (folder / "diff" / "disagreements.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    row = rows["1_a1_b0_2.png"]
    assert row["source"] == "val/dog/2.png"
    assert (row["true_class"], row["wnid"], row["name"]) == ("1", "dog", "domestic dog")
    assert (row["a_prediction"], row["a_name"]) == ("1", "domestic dog")
    assert (row["b_prediction"], row["b_name"]) == ("0", "cat")
    with torch.inference_mode():
        for model in "ab":
            expected = (140 - THRESHOLDS[model]) / (255 * STD[0]) * 5
            sure = torch.tensor(abs(expected)).sigmoid()
            assert float(row[f"{model}_probability"]) == pytest.approx(float(sure), abs=1e-3)
    sheet = Image.open(folder / "diff" / "contact_sheet.png")
    assert sheet.size[0] > 300


def test_the_sentence_names_a_better_model_only_where_chance_would_rarely_make_it_so() -> None:
    def said(only_a: int, only_b: int) -> str:
        pairs = [(True, False)] * only_a + [(False, True)] * only_b
        pairs += [(True, True)] * (200 - len(pairs))
        right = [list(hits) for hits in zip(*pairs, strict=True)]
        sentence: str = compare_models([Path("a"), Path("b")], right, 30)["sentence"]
        return sentence

    assert said(6, 0) == "a is better by 3.0 points (95 % interval 0.3 to 5.7, McNemar p = 0.0312)"
    assert said(0, 6) == "b is better by 3.0 points (95 % interval 0.3 to 5.7, McNemar p = 0.0312)"
    assert said(30, 0).endswith(" (95 % interval 9.8 to 19.9, McNemar p < 0.0001)")
    for only_a, only_b, difference in ((5, 0, "+2.5"), (0, 5, "-2.5"), (9, 3, "+3.0")):
        assert said(only_a, only_b).startswith(
            f"The difference, a - b = {difference} points, is no more than chance (95 % interval "
        )


def test_classes_are_listed_without_a_checkpoint(folder: Path) -> None:
    result = compare(folder, "--classes", "help")
    lines = ["0\tcat\tcat", "1\tdog\tdomestic dog", "2\tfox\tfox"]
    assert result.out.splitlines() == lines
    assert "no-such" in error_line(
        run("diff_eval.py", "--classes", "help", "--data", "no-such", cwd=folder)
    )


def test_identical_checkpoints_do_not_differ_and_an_earlier_output_is_replaced(
    folder: Path,
) -> None:
    compare(folder, "a.pth", "b.pth", "--output-dir", "twice")
    result = compare(folder, "a.pth", "a.pth", "--output-dir", "twice")
    assert " * a Acc@1 50.000 b Acc@1 50.000 disagree 0 of 10" in result.out
    assert copies(folder / "twice") == set()
    assert len((folder / "twice" / "disagreements.csv").read_text().splitlines()) == 1


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to("elsewhere")
    for _ in range(2):
        compare(folder, "a.pth", "b.pth", "--output-dir", "link")
        assert (folder / "link").is_symlink()
        assert len(copies(folder / "elsewhere")) == 2


def test_bare_state_dicts_of_two_architectures(folder: Path) -> None:
    torch.manual_seed(0)
    other = models.squeezenet1_1(num_classes=3)
    torch.save(other.state_dict(), folder / "squeezenet.pth")
    flags = ("-a", "resnet18", "squeezenet1_1", "--image-size", 32, "--output-dir", "bare")
    result = compare(folder, "a_bare.pth", "squeezenet.pth", *flags)
    assert " * a Acc@1 50.000 b Acc@1 " in result.out


def test_classes_are_named_by_number_by_name_or_all(folder: Path) -> None:
    for names, count in ((("2",), 2), (("fox", "0"), 7), (("all",), 12)):
        flags = ("a.pth", "b.pth", "--output-dir", "classes", "--classes", *names)
        assert f" of {count}\n" in compare(folder, *flags).out


def test_misclassified_images_of_one_model_and_of_two(folder: Path) -> None:
    result = compare(folder, "--misclassified", "a.pth", "--output-dir", "wrong")
    wrong = {f"0_misclassified_to_1_{i}.png" for i in (2, 3, 4)}
    wrong |= {f"1_misclassified_to_0_{i}.png" for i in (0, 1)}
    assert copies(folder / "wrong") == wrong
    header = (folder / "wrong" / "disagreements.csv").read_text().splitlines()[0]
    assert header == "file,source,true_class,wnid,name,a_prediction,a_name,a_probability"
    assert " * a Acc@1 50.000 misclassified 5 of 10" in result.out
    # The surest first, in the table and on the sheet: the further from the threshold of 100.
    with (folder / "wrong" / "disagreements.csv").open() as file:
        probabilities = [float(row["a_probability"]) for row in csv.DictReader(file)]
    expected = [abs(level - 100) / (255 * STD[0]) * 5 for level in (210, 30, 160, 110, 90)]
    assert probabilities == pytest.approx(torch.tensor(expected).sigmoid().tolist(), abs=1e-3)
    with Image.open(folder / "wrong" / "contact_sheet.png") as sheet:
        middle = HEAD + THUMBNAIL // 2
        assert sheet.getpixel((THUMBNAIL // 2, middle)) == (210, 0, 0)
        assert sheet.getpixel((THUMBNAIL // 2 + THUMBNAIL + 8, middle)) == (30, 0, 0)
    compare(folder, "--misclassified", "a.pth", "b.pth", "--output-dir", "wrong")
    assert len(copies(folder / "wrong")) == 10
    assert "1_b_misclassified_to_0_2.png" in copies(folder / "wrong")


def test_a_copy_for_each_image_also_where_names_are_equal_or_long(folder: Path) -> None:
    root = folder / "days"
    long = f"{'e' * 251}.png"
    for split in ("train", "val"):
        for name in ("cat", "dog", "fox"):
            for day in ("day1", "day2"):
                (root / split / name / day).mkdir(parents=True)
                level = 120 if day == "day1" else 130  # a says 1, b says 0
                for image in ("0.png", long):
                    path = root / split / name / day / image
                    Image.new("RGB", (32, 32), (level, 0, 0)).save(path)
    for _ in range(2):  # the second replaces the first
        flags = ("a.pth", "b.pth", "--data", "days", "--output-dir", "days_out")
        result = run("diff_eval.py", *flags, "--classes", "all", cwd=folder)
        assert result.code == 0, result
    assert "days_out/: 12 images, " in result.out
    assert len(copies(folder / "days_out")) == 12
    assert {"0_a1_b0_0.png", "0_a1_b0_0_2.png"} < copies(folder / "days_out")
    with (folder / "days_out" / "disagreements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["source"] for row in rows}) == 12
    for row in rows:
        original = (root / row["source"]).read_bytes()
        assert (folder / "days_out" / row["file"]).read_bytes() == original


def test_the_names_of_copies_differ_in_more_than_case_and_are_cut() -> None:
    taken: set[str] = set()
    names = [
        copy_name("0_a1_b0", Path("v", name), taken, 16)
        for name in (
            "a.png",
            "A.png",
            "long name.png",
            "long name 2.png",
            "\u00e9\u00e9\u00e9.png",
            "a\nb",
        )
    ]
    assert names[:4] == ["0_a1_b0_a.png", "0_a1_b0_A_2.png", "0_a1_b0_long.png", "0_a1_b0_lo_2.png"]
    assert names[4:] == ["0_a1_b0_\u00e9\u00e9.png", "0_a1_b0_a\nb"]
    assert all(map(OWN.fullmatch, names))


def test_a_flag_serves_a_checkpoint_that_does_not_say_and_no_other(folder: Path) -> None:
    state = brightness_model(150)
    named = {f"net.{name}": tensor for name, tensor in state.items()}  # as Lightning's
    torch.save({"state_dict": named}, folder / "lightning.pth")
    both = ("a.pth", "lightning.pth", "--image-size", 32, "--stem", "stock", "-a", "resnet18")
    result = compare(folder, *both, "--output-dir", "lightning")
    assert " * a Acc@1 50.000 b Acc@1 50.000 disagree 2 of 10" in result.out
    for flags, message in {
        ("-a", "resnet50"): "a.pth has arch resnet18, not resnet50: leave the flag out",
        ("--stem", "stock", "cifar"): "b.pth has stem stock, not cifar: leave the flag out",
        ("--image-size", "64"): "a.pth has image size 32, not 64: leave the flag out",
        ("--image-size", "32", "64"): "b.pth has image size 32, not 64: leave the flag out",
    }.items():
        data = ("--data", "set", "--output-dir", "refused")
        assert message in error_line(
            run("diff_eval.py", "a.pth", "b.pth", *flags, *data, cwd=folder)
        )


def test_bare_state_dicts_and_four_processes_give_the_same(folder: Path) -> None:
    flags = ["diff_eval.py", "a_bare.pth", "b.pth", "--data", "set", "--classes", "all"]
    alone = run(*flags, "-a", "resnet18", "--output-dir", "one", cwd=folder)
    four = launch("cpu4.yaml", *flags, "-b", 4, "--output-dir", "four", cwd=folder)
    assert alone.code == four.code == 0, (alone, four)
    one, other = (sorted((folder / name).iterdir()) for name in ("one", "four"))
    assert [p.name for p in one] == [p.name for p in other]
    tables = [(folder / n / "disagreements.csv").read_text() for n in ("one", "four")]
    assert tables[0] == tables[1]


def test_bad_input_is_one_line_and_touches_nothing(folder: Path) -> None:
    mine = folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    state = brightness_model(100, classes=4)
    torch.save({"arch": "resnet18", "state_dict": state}, folder / "four.pth")
    other = {"arch": "resnet18", "state_dict": brightness_model(9), "classes": ["a", "b", "c"]}
    torch.save(other, folder / "other.pth")
    content = torch.load(folder / "a.pth", weights_only=True)
    content["state_dict"]["fc.weight"][0, 0] = torch.nan
    torch.save(content, folder / "nan.pth")
    torch.save({**content, "model": "LSTM", "vocabulary": ["a"]}, folder / "text.pth")
    for flags, message in {
        ("a.pth", "b.pth", "--output-dir", "mine"): "did not write (thesis.txt)",
        ("a.pth", "b.pth", "--output-dir", "a.pth"): "a.pth is the file of CHECKPOINT too",
        ("a.pth", "b.pth", "--output-dir", "other.pth"): "other.pth is a file",
        ("a.pth",): "2 checkpoints wanted",
        ("a.pth", "none.pth"): "none.pth: no such file",
        ("a.pth", "four.pth"): "a.pth has 3 classes and four.pth 4",
        ("a.pth", "nan.pth"): "checkpoint nan.pth: its weights give no finite outputs",
        ("a.pth", "text.pth"): "text.pth: holds the language model LSTM, no classifier",
        ("a.pth", "other.pth"): "other.pth: knows class a where the dataset has cat",
        ("a.pth", "b.pth", "--classes", "3"): "no class 3: the dataset has 0 to 2",
        ("a.pth", "b.pth", "--classes", "elk"): "no class elk",
        ("a.pth", "b.pth", "--classes", "²"): "no class ²",
        ("a.pth", "b.pth", "--output-dir", "."): "did not write (",
        ("a.pth", "b.pth", "-a", "alexnet", "vgg11", "vgg13"): "one for each checkpoint",
        ("--classes", "0", "1", "a.pth", "b.pth"): "2 checkpoints wanted, before the flags",
        ("a.pth", "b.pth", "--data", "nowhere"): "nowhere is missing, and this script downloads",
    }.items():
        data = () if "--data" in flags else ("--data", "set")
        assert message in error_line(run("diff_eval.py", *flags, *data, cwd=folder))
    assert (mine / "thesis.txt").read_text() == "precious"


def test_numbers_are_positions_and_names_are_names() -> None:
    classes, readable = ["1", "2", "cat", "=odd"], ["one", "two", "domestic cat", "two"]
    for names, expected in (
        (["0", "1"], {0, 1}),
        (["=1"], {0}),
        (["cat", "=cat"], {2}),
        (["==odd"], {3}),
        (["domestic cat", "one"], {0, 2}),
        (["two"], {1, 3}),
        (["all"], {0, 1, 2, 3}),
    ):
        assert choose(names, classes, readable) == expected
    for name in ("4", "dog", "=3", "-1", "", "="):
        with pytest.raises(UserError, match="no class"):
            choose([name], classes, readable)


def test_names_that_no_font_or_no_encoding_has(folder: Path) -> None:
    """Of images, classes, the dataset and the output; the sheet's font has only ASCII letters."""
    data = folder / os.fsdecode(b"d\xe4ta")
    classes = ["cat", os.fsdecode(b"d\xf6g"), "\u9c7c"]
    for name, levels in zip(classes, LEVELS.values(), strict=True):
        for split in ("train", "val"):
            (data / split / name).mkdir(parents=True)
            for i, level in enumerate(levels):
                path = data / split / name / os.fsdecode(b"\xca\xfd%d.png" % i)
                Image.new("RGB", (32, 32), (level, 0, 0)).save(path)
    (data / "words.txt").write_text("\ufeffcat\t\u732b, \u8c93\n", encoding="utf-8")
    output = os.fsdecode(b"\xe4us")
    flags: list[object] = ["a_bare.pth", "b_bare.pth", "-a", "resnet18", "--stem", "stock"]
    flags += ["--image-size", 32, "--classes", "all", "--data", data, "--output-dir", output]
    result = run("diff_eval.py", *flags, cwd=folder)
    assert result.code == 0, result
    assert " * a Acc@1 41.667 b Acc@1 41.667 disagree 2 of 12\n" in result.out
    assert os.fsdecode(b"0_a1_b0_\xca\xfd2.png") in copies(folder / output)
    with (folder / output / "disagreements.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {row["wnid"]: row["name"] for row in rows}
    assert names == {"cat": "\u732b", "d\\udcf6g": "d\\udcf6g"}
    found: Any = SimpleNamespace(classes=[*classes, "ok"])
    readable = ["\u732b", classes[1], classes[2], "fine"]
    assert drawable_names(found, readable) == ["cat", "class 1", "class 2", "fine"]
