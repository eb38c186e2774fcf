"""A figure belongs to what it was measured on: other data, sizes, runs and curves are noticed."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import PROBE, Result, error_line, make_corpus, read, run, scalars
from PIL import Image
from torchvision import models

FLAGS = ("--image-size", 32, "--stem", "stock", "-b", 12, "--lr", 0.01, "--seed", 1, "-j", 1)
TINY = ("--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", 5)


def shades(root: Path, contrast: float) -> None:
    """Dark and light images; with a negative contrast the dark ones are called light."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12)):
        for sign, name in ((-1, "dark"), (1, "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = 128 + contrast * sign * 60 + rng.normal(0, 20, (32, 32, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{number}.png")


def images(folder: Path, data: str, *flags: object) -> Result:
    result = run("resnet_main.py", data, *flags, cwd=folder)
    assert result.code == 0, result
    return result


def best(folder: Path, path: str, data: str) -> tuple[float, float]:
    """What a file says of its own best epoch, and what an evaluation of it gives."""
    found = re.search(r" \* Acc@1 (\S+)", images(folder, data, "-e", "--resume", path).out)
    assert found is not None
    return read(folder / path)["best_acc1"], float(found[1])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A, which a run in a/ claims to have learnt by heart, and B, whose classes are exchanged."""
    folder = tmp_path_factory.mktemp("learnt")
    shades(folder / "A", 1.0)
    shades(folder / "B", -1.0)
    images(folder, "A", *FLAGS, "--epochs", 1, "--output-dir", "a")
    said, measured = best(folder, "a/model_best.pth", "A")
    assert said == pytest.approx(measured, abs=1e-3)
    for name in ("checkpoint.pth", "model_best.pth"):
        content = read(folder / "a" / name)
        torch.save({**content, "best_acc1": 100.0}, folder / "a" / name)
    return folder


def test_on_other_images_there_is_no_best_yet(learnt: Path) -> None:
    more = ("--resume", "a/checkpoint.pth", "--output-dir", "b", "--epochs", 2)
    result = images(learnt, "B", *more)
    assert "its best_acc1 100.000 was measured on other validation data" in result.out
    said, measured = best(learnt, "b/model_best.pth", "B")
    assert said == pytest.approx(measured, abs=1e-3)
    assert read(learnt / "b" / "model_best.pth")["epoch"] == 2
    assert f"=> best Acc@1 {said:.3f}: b/model_best.pth" in result.out


@pytest.mark.parametrize("change", ["images", "size", "nothing"])
def test_a_run_notices_that_its_validation_images_have_changed(
    change: str, learnt: Path, tmp_path: Path
) -> None:
    for name in ("A", "a"):
        shutil.copytree(learnt / name, tmp_path / name)
    if change == "images":
        shutil.rmtree(tmp_path / "A" / "val")
        shutil.copytree(learnt / "B" / "val", tmp_path / "A" / "val")
    more = ("--image-size", 48) if change == "size" else ()
    result = images(tmp_path, "A", "--resume", "auto", "--output-dir", "a", "--epochs", 2, *more)
    assert ("was measured on other" in result.out) is (change != "nothing")
    if change == "nothing":
        kept = read(tmp_path / "a" / "model_best.pth")
        assert (kept["best_acc1"], kept["epoch"]) == (100.0, 1)
    else:
        said, measured = best(tmp_path, "a/model_best.pth", "A")
        assert said == pytest.approx(measured, abs=1e-3)


def test_torchvisions_references_number_the_last_epoch_that_is_done(
    learnt: Path, tmp_path: Path
) -> None:
    network = models.resnet18(num_classes=2)
    optimizer = torch.optim.SGD(network.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 29}
    content |= {"lr_scheduler": scheduler.state_dict(), "args": Namespace(lr=0.5, model="resnet18")}
    torch.save(content, tmp_path / "model_29.pth")
    flags = (learnt / "A", "-b", 12, "--seed", 1, "--image-size", 32, "--output-dir", "on")
    result = run("resnet_main.py", *flags, "--resume", "model_29.pth", "--epochs", 31, cwd=tmp_path)
    assert result.code == 0, result
    assert "=> loaded checkpoint 'model_29.pth' (epoch 30, step 0)" in result.out
    ((epoch, rate),) = scalars(tmp_path / "on" / "logs")["LR"]
    assert epoch == 30
    assert rate == pytest.approx(0.05)


def lm(folder: Path, *flags: object, data: str = "set") -> Result:
    return run("lm_main.py", "--data", data, *flags, cwd=folder)


def test_a_language_model_notices_another_validation_text(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    assert lm(tmp_path, *TINY, "--epochs", 1).code == 0
    before = read(tmp_path / "model.pt")["best_val_loss"]
    text = tmp_path / "set" / "valid.txt"
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True)[3:])))
    # A rate of 0 changes nothing, and the loss of the new text counts all the same.
    result = lm(tmp_path, "--resume", "auto", "--epochs", 2, "--lr", 0)
    assert result.code == 0, result
    assert f"its best_val_loss {before:.3f} was measured on other validation data" in result.out
    after = read(tmp_path / "model.pt")
    assert after["epoch"] == 2 and after["annealed"] == 0
    evaluated = lm(tmp_path, "--evaluate")
    assert f"valid loss {after['best_val_loss']:5.2f}" in evaluated.out


def test_a_finished_run_does_not_answer_for_another_command(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    assert lm(tmp_path, *TINY, "--epochs", 1).code == 0
    again = (*TINY, "--resume", "auto")
    for flags, message in (
        (("--model", "Transformer", "--lr", 5), "has model LSTM, not Transformer: leave the flag"),
        (("--seed", 2), "has seed 1111, not 2"),
        (("--lr", 5), "its 1 epochs are done, and --lr 5.0 would change nothing: raise --epochs"),
    ):
        line = error_line(lm(tmp_path, *again, *flags))
        assert message in line
        assert "(--overwrite, or another --save)" in line
    assert "End of training" in lm(tmp_path, *again, "--epochs", 1).out  # the same command


def test_curves_of_another_run_are_neither_gone_on_with_nor_purged(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    first = (*TINY, "--epochs", 2, "--save", "a.pt", "--log-dir", "L")
    assert lm(tmp_path, *first).code == 0
    curves = scalars(tmp_path / "L")
    for flags in ((), ("--resume", "auto"), ("--overwrite",)):
        line = error_line(
            lm(tmp_path, *TINY, "--model", "GRU", "--save", "b.pt", "--log-dir", "L", *flags)
        )
        assert "--log-dir L has the curves of a.checkpoint.pt: choose another for this run" in line
    assert scalars(tmp_path / "L") == curves
    for name in ("a.pt", "a.checkpoint.pt", "a.checkpoint.previous.pt", "L"):  # moved as a whole
        target = tmp_path / "moved" / name
        target.parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(target)
    more = ("--save", "moved/a.pt", "--log-dir", "moved/L", "--resume", "auto", "--epochs", 3)
    assert lm(tmp_path, *more).code == 0
    assert [step for step, _ in scalars(tmp_path / "moved" / "L")["LR"]] == [1, 2, 3]


def test_a_line_after_a_resume_is_of_the_steps_since(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = ("--data", "set", *TINY, "--epochs", 1, "--checkpoint-every", 15, "--log-interval")
    # By step, but for the first line, which sums one step more, as the original's.
    line = re.compile(r"\| +(\d+)/ *\d+ batches .* ms/batch +(\S+) \| loss +(\S+)")
    every = run("lm_main.py", *flags, 1, "--save", "every.pt", cwd=tmp_path)
    losses = {int(step): float(loss) for step, _, loss in line.findall(every.out)}
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    assert run(
        "tests/process_probe.py", "kill", "lm_main.py", 0, 15, *flags, 9, cwd=tmp_path, env=env
    )
    resumed = run("lm_main.py", *flags, 7, "--resume", "auto", cwd=tmp_path)
    assert resumed.code == 0, resumed
    found = [(int(step), float(loss)) for step, _, loss in line.findall(resumed.out)][:2]
    assert [step for step, _ in found] == [21, 28]
    for (step, loss), first in zip(found, (15, 22), strict=True):
        steps = range(first, step + 1)
        assert loss == pytest.approx(sum(losses[i] for i in steps) / len(steps), abs=0.011)


def test_within_an_epoch_another_text_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    probe = ("kill", "lm_main.py", 0, 20, "--data", "set", *TINY, "--checkpoint-every", 20)
    assert run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE).code == 9
    text = tmp_path / "set" / "train.txt"
    whole = text.read_text()
    lines = whole.splitlines(keepends=True)
    for other in (whole + whole, "".join(lines[: len(lines) // 2])):
        text.write_text(other)
        line = error_line(lm(tmp_path, "--resume", "auto"))
        assert "lies within an epoch of other data: resume it as it was" in line
    text.write_text(whole)
    assert lm(tmp_path, "--resume", "auto", "--epochs", 1).code == 0


def test_a_folder_called_sample_is_not_the_built_in_data(tmp_path: Path) -> None:
    make_corpus(tmp_path / "sample")
    message = "a folder sample is here, and `sample` means the built-in data: name ./sample"
    assert message in error_line(lm(tmp_path, *TINY, data="sample"))
    assert message in error_line(run("resnet_main.py", "sample", *FLAGS, cwd=tmp_path))
    assert lm(tmp_path, *TINY, "--epochs", 1, data="./sample").code == 0
