"""One process that accumulates four parts trains what four processes do, to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit import PROBE, error_line, launch, make_corpus, make_dataset, read, run, scalars

PARTS = ("--gradient-accumulation-steps", 4)
IMAGES = (
    "set",
    "--image-size",
    32,
    "--stem",
    "stock",
    "-b",
    16,
    "-j",
    0,
    "--seed",
    1,
    "--lr",
    0.01,
)
TEXT = ("--data", "set", "--emsize", 8, "--nhid", 8, "--batch_size", 8, "--bptt", 5)


def alike(one: Path, other: Path, least: float) -> None:
    """Weights, statistics and losses of two runs that differ by rounding alone.

    Args:
        least: largest difference of a value from that of the other run.
    """
    ours, theirs = (read(path)["state_dict"] for path in (one, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=least, atol=least)


def curves_alike(one: Path, other: Path, least: float) -> None:
    ours, theirs = (scalars(path) for path in (one, other))
    for tag in ("Loss/train", "Loss/val"):
        assert [epoch for epoch, _ in ours[tag]] == [epoch for epoch, _ in theirs[tag]]
        losses = [[loss for _, loss in curves[tag]] for curves in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=least)


def test_images_with_normalisation_mixing_and_a_last_batch_that_is_padded(tmp_path: Path) -> None:
    """Of a model without kinks, at which rounding would decide about a gradient."""
    make_dataset(tmp_path / "set", train=9)  # 27 images: a batch of 16 and one of 11
    flags = (*IMAGES, "--cutmix", 1, "--epochs", 3)
    steps = {}
    for name, parts in (("four", ()), ("one", PARTS), ("whole", ())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set").symlink_to("../set")
        probe: tuple[Any, ...] = ("tests/process_probe.py", "follow", *flags, *parts)
        options: dict[str, Any] = {"cwd": tmp_path / name, "env": PROBE}
        done = launch("cpu4.yaml", *probe, **options) if name == "four" else run(*probe, **options)
        assert done.code == 0, done
        steps[name] = torch.load(tmp_path / name / "steps.pt")
    assert len(steps["one"]) == len(steps["four"]) == 6
    for one, four in zip(steps["one"], steps["four"], strict=True):
        for what in ("weights", "buffers"):
            torch.testing.assert_close(one[what], four[what], rtol=1e-5, atol=1e-6)
    # Without parts it is another training.
    assert (steps["one"][-1]["weights"] - steps["whole"][-1]["weights"]).abs().max() > 1e-4
    folders = (tmp_path / "one/output/resnet18-cpu", tmp_path / "four/output/resnet18-cpu4")
    curves_alike(folders[0] / "logs", folders[1] / "logs", 1e-5)


@pytest.mark.parametrize(("model", "lr", "epochs"), [("LSTM", 1, 2), ("Transformer", 0.5, 1)])
def test_language_models_with_dropout(model: str, lr: float, epochs: int, tmp_path: Path) -> None:
    """In a second epoch one process goes on with what four have begun."""
    make_corpus(tmp_path / "set")
    flags = (*TEXT, "--model", model, "--lr", lr, "--epochs", 1, "--save")
    one, four, on = (tmp_path / name / "model.checkpoint.pt" for name in ("one", "four", "on"))
    done = launch("cpu4.yaml", "lm_main.py", *flags, "four/model.pt", cwd=tmp_path)
    assert done.code == 0, done
    done = run("lm_main.py", *flags, "one/model.pt", *PARTS, cwd=tmp_path)
    assert done.code == 0, done
    alike(one, four, 1e-4)
    curves_alike(one.with_name("model.logs"), four.with_name("model.logs"), 1e-5)
    if epochs == 2:
        more = ("--data", "set", "--resume", "four/model.checkpoint.pt", "--epochs", 2, "--save")
        assert run("lm_main.py", *more, "on/model.pt", *PARTS, cwd=tmp_path).code == 0
        assert launch("cpu4.yaml", "lm_main.py", *more, "four/model.pt", cwd=tmp_path).code == 0
        alike(on, four, 1e-4)


def test_an_accumulating_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags: tuple[Any, ...] = (*TEXT, *PARTS, "--epochs", 2, "--checkpoint-every", 20)
    assert run("lm_main.py", *flags, "--save", "a/model.pt", cwd=tmp_path).code == 0
    probe: tuple[Any, ...] = ("kill", "lm_main.py", 1, 20, *flags, "--save", "b/model.pt")
    assert run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE).code == 9
    again = ("--data", "set", "--save", "b/model.pt", "--resume", "auto")
    assert run("lm_main.py", *again, cwd=tmp_path).code == 0
    alike(tmp_path / "a" / "model.checkpoint.pt", tmp_path / "b" / "model.checkpoint.pt", 0.0)


def test_parts_that_cannot_be_equal_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", train=4)
    line = error_line(run("resnet_main.py", *IMAGES, "-b", 6, *PARTS, cwd=tmp_path))
    assert "--batch-size 6 is for all processes together and cannot be divided by 4" in line
    line = error_line(run("resnet_main.py", *IMAGES, *PARTS, "--sync-bn", cwd=tmp_path))
    assert "--sync-bn needs all parts of a batch at once" in line
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    line = error_line(run("resnet_main.py", *IMAGES, cwd=tmp_path, env=env))
    assert "--gradient-accumulation-steps is a flag of the script" in line
