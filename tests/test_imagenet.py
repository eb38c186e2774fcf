"""ImageNet as people have it: validation images flat in val/, and whose labels they get."""

import random
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit import error_line, make_dataset, run
from torchvision.datasets import imagenet

from engine.cli import UserError
from image_classification.folders import find_images

# In the devkit's order, which is not the sorted one.
WNIDS = ["n02119789", "n02100735", "n01440764", "n03255030"]
COUNT = 12
ANSWERS = dict(enumerate(random.Random(1).choices(WNIDS, k=COUNT), 1))  # by image number
CSV = "ImageId,PredictionString\n" + "".join(
    f"{name},{wnid} 85 1 499 272 {wnid} 3 4 51 62 \n"
    for name, wnid in sorted(
        ((f"ILSVRC2012_val_{number:08d}", wnid) for number, wnid in ANSWERS.items()),
        key=lambda line: line[0][::-1],  # Kaggle's lines are in no order
    )
)


def imagenet_folder(root: Path, ending: str = ".JPEG") -> Path:
    for wnid in WNIDS:
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_1.JPEG").touch()
    (root / "val").mkdir()
    for number in ANSWERS:
        (root / "val" / f"ILSVRC2012_val_{number:08d}{ending}").touch()
    return root


def save_meta(root: Path, wnids: object) -> None:
    torch.save(({wnid: (wnid, "a name") for wnid in WNIDS}, wnids), root / "meta.bin")


def answers(root: Path) -> dict[int, str]:
    """The class that each validation image is found to have, by its number."""
    found = find_images(root)
    assert found.classes == sorted(WNIDS) and found.notes == []
    numbers = [int(Path(path).stem.rpartition("_")[2]) for path in found.val.paths]
    assert numbers == [*ANSWERS]
    targets = (found.classes[target] for target in found.val.targets)
    return dict(zip(numbers, targets, strict=True))


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as refused:
        find_images(root)
    return str(refused.value)


@pytest.mark.parametrize("ending", [".JPEG", ".jpg"])
def test_each_image_gets_its_own_label(ending: str, tmp_path: Path) -> None:
    kaggle = imagenet_folder(tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC", ending)
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text(CSV)
    (tmp_path / "link").symlink_to(kaggle)
    assert answers(kaggle) == answers(tmp_path / "link") == ANSWERS
    assert refusal(tmp_path / "kaggle").endswith(f"; DIR is {kaggle} then")

    beside = imagenet_folder(tmp_path / "beside", ending)
    (beside / "LOC_val_solution.csv").write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    assert answers(beside) == ANSWERS

    torchvision = imagenet_folder(tmp_path / "torchvision", ending)
    save_meta(torchvision, [*ANSWERS.values()])
    assert answers(torchvision) == ANSWERS


def make_devkit(root: Path) -> None:
    """An archive with a synset more than those with images, as the real one has 860 more."""
    scipy_io = pytest.importorskip("scipy.io")
    np = pytest.importorskip("numpy")
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    synsets = np.zeros(
        (len(WNIDS) + 1, 1),
        [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")],
    )
    for i, wnid in enumerate([*WNIDS, "n00001740"]):
        synsets[i, 0] = (i + 1, wnid, f"word {i}, other word", "", int(i == len(WNIDS)))
    scipy_io.savemat(data / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{WNIDS.index(wnid) + 1}\n" for wnid in ANSWERS.values())
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(data.parent, data.parent.name)


def test_without_labels_one_line_tells_ways_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = imagenet_folder(tmp_path / "it's ImageNet")
    make_devkit(root)
    before = [path for path in sorted(root.rglob("*")) if path.is_file()]
    message = refusal(root)
    assert error_line(run("resnet_main.py", root, cwd=tmp_path)).endswith(message)
    assert [path for path in sorted(root.rglob("*")) if path.is_file()] == before
    sort, make = re.findall("`(.*?)`", message)

    # With the devkit: the archive is known by its digest, which this one cannot have.
    monkeypatch.setattr(imagenet, "check_integrity", lambda path, md5=None: Path(path).is_file())
    cd, folder, *_, python, c, code = shlex.split(make)
    assert (cd, python, c) == ("cd", "python", "-c")
    monkeypatch.chdir(folder)
    exec(code)
    assert answers(root) == ANSWERS

    # With the script that sorts: a stand-in for it comes from a stand-in for wget.
    (root / "meta.bin").unlink()
    lines = [f"mkdir -p {wnid}" for wnid in WNIDS]
    lines += [f"mv ILSVRC2012_val_{i:08d}.JPEG {wnid}/" for i, wnid in ANSWERS.items()]
    (tmp_path / "valprep.sh").write_text("\n".join(lines))
    wget = tmp_path / "wget"
    wget.write_text(f'test "${{2##*/}}" = valprep.sh && cat {tmp_path}/valprep.sh\n')
    wget.chmod(0o755)
    subprocess.run(["bash", "-c", f"PATH={tmp_path}:$PATH; {sort}"], check=True)
    found = find_images(root).val
    assert {int(Path(p).stem[-8:]): Path(p).parent.name for p in found.paths} == ANSWERS

    # A sorting that was interrupted.
    image = next((root / "val").glob("*/*2.JPEG"))
    image.rename(root / "val" / image.name)
    assert f"has class folders in {root}/val and images in {root}/val;" in refusal(root)


def number_of_line(pattern: str) -> int:
    return next(i for i, line in enumerate(CSV.splitlines(), 1) if pattern in line)


LAST, LABEL = f"ILSVRC2012_val_{COUNT:08d}", f"line {number_of_line(f'{COUNT:08d}')}: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text + "ILSVRC2012_val_00000077,n01440764 1 2 3 4\n", r"line 14: .*/val/"
         "ILSVRC2012_val_00000077.JPEG does not exist"),
        (lambda text: text + text.splitlines()[3], f"line 14: {CSV.splitlines()[3][:23]}.JPEG is "
         "annotated twice"),
        (lambda text: re.sub(f"{LAST}.*\n", "", text), r": 1 image\(s\) of .*/val have no line: "
         f"{LAST}.JPEG"),
        (lambda text: text.replace(f"{LAST},n", f"{LAST},m"), LABEL + "class m.* is not in train/"),
        (lambda text: re.sub(f"{LAST},.*", LAST, text), LABEL + r"class \(none\) is not in train/"),
        (lambda text: re.sub(f"({LAST},n).*", r"\1", text), LABEL + "class n is not in train/"),
        (lambda text: re.sub(f"({LAST}.*)\n", r"\1", text, count=1), LABEL + "class n.* is not in"),
        (lambda text: re.sub(f"({LAST},n\\d* 1? ?85 1 499 272).*", r"\1 n01440764 1 2 3 4 "
         "n02100735 1 2 3 4", text), LABEL + "class n0.* n0.* is not in train/"),
        (lambda text: "", ": annotates no image"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(
    damage: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    root = imagenet_folder(tmp_path / "set")
    labels = root / "LOC_val_solution.csv"
    labels.write_text(damage(CSV))
    refused = refusal(root)
    assert re.match(f"{re.escape(str(labels))}:? ?{message}", refused), refused


def test_meta_bin_is_for_these_images(tmp_path: Path) -> None:
    root = imagenet_folder(tmp_path / "set")
    meta, wnids = root / "meta.bin", [*ANSWERS.values()]
    for labels, message in (
        ([*wnids, WNIDS[0]], f" label 13: {root}/val/ILSVRC2012_val_00000013.JPEG does not exist"),
        (wnids[:-1], f": 1 image(s) of {root}/val have no line: {LAST}.JPEG"),
        ([*wnids[:-1], "n09"], " label 12: class n09 is not in train/"),
        ([*range(1, 13)], " label 1: class 1 is not in train/"),
        ([], ": annotates no image"),
        (7, ": not torchvision's, or damaged: delete it"),
        (Path, ": not torchvision's, or damaged: delete it"),  # which would be code
    ):
        save_meta(root, labels)
        assert refusal(root) == f"{meta}{message}"
    save_meta(root, wnids)
    for damaged in (meta.read_bytes()[:-100], b"", b"ID\n1\n"):
        meta.write_bytes(damaged)
        assert refusal(root) == f"{meta}: not torchvision's, or damaged: delete it"
    # Two files of one number: no label may choose.
    save_meta(root, wnids)
    (root / "val" / f"{LAST}.png").touch()
    assert f"1 image(s) of {root}/val have no line: {LAST}" in refusal(root)


@pytest.mark.parametrize("side", [48, 150])
def test_it_trains(side: int, tmp_path: Path) -> None:
    """Small images, decoded in memory, and large ones."""
    root = make_dataset(tmp_path / "set", "tiny", val=6, side=side)
    labels = ["ImageId,PredictionString"]
    for i in range(6):
        name = f"ILSVRC2012_val_{6 - i:08d}"
        (root / "val" / "images" / f"val_{i}.JPEG").rename(root / "val" / f"{name}.JPEG")
        labels.append(f"{name},n0000000{i % 3} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(labels))
    out = run("resnet_main.py", root, "--epochs", 1, "-b", 8, "--image-size", 32, "--stem", "stock",
              "-j", 0, cwd=tmp_path).out  # fmt: skip
    assert "24 training and 6 validation images of 3 classes" in out and "* Acc@1" in out
