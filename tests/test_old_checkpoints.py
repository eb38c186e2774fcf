"""Checkpoints of earlier versions of the kit resume to the bits of an undisturbed run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit import PROBE, differences, make_corpus, make_dataset, read, run

# What a checkpoint had before every setting was one of its keys.
LANGUAGE_MODEL = {
    *("model", "words", "emsize", "nhid", "nlayers", "nhead", "tied"),
    *("lr", "clip", "batch_size", "bptt", "dropout", "seed", "algorithm", "vocabulary"),
    *("epoch", "step", "annealed", "best_val_loss", "sums", "hidden", "state_dict", "optimizer"),
}
IMAGE_CLASSIFIER = {
    *("arch", "stem", "num_classes", "image_size", "classes", "seed", "batch_size", "samples"),
    *("epoch", "step", "sums", "best_acc1", "state_dict", "optimizer", "scheduler"),
}


def as_it_was(path: Path, old: set[str], **renamed: object) -> dict[str, Any]:
    """Rewrite the checkpoint at `path` with the keys `old` alone."""
    content = {**read(path), **renamed}
    content = {key: value for key, value in content.items() if key in old}
    assert content.keys() == old
    torch.save(content, path)
    return content


@pytest.mark.parametrize("algorithm", ["AdamW", "SGD"])
def test_a_language_models(algorithm: str, tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    adam = algorithm == "AdamW"
    flags: list[object] = ["--data", "set", "--emsize", 8, "--nhid", 8, "--batch-size", 4]
    flags += ["--bptt", 5, "--lr", 0.1 if adam else 10, "--clip", 0.5, "--dropout", 0.3]
    # A flag of its own today; then --dropout reached the Transformer's layers as well.
    flags += ["--model", "LSTM" if adam else "Transformer", "--layer-dropout", 0.3]
    flags += ["--seed", 7, "--epochs", 2, "--checkpoint-every", 7, *["--use-optimizer"] * adam]
    assert run("lm_main.py", *flags, "--save", "whole.pt", cwd=tmp_path).code == 0
    probe = ("kill", "lm_main.py", 1, 14, *flags)
    assert run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE).code == 9
    latest = tmp_path / "model.checkpoint.pt"
    old = as_it_was(latest, LANGUAGE_MODEL, algorithm=algorithm, words=40)
    assert len(old["optimizer"]["state"]) == (len(old["state_dict"]) if adam else 0)

    resume = ("--data", "set", "--resume", latest.name, "--epochs", 2)
    resumed = run("lm_main.py", *resume, *["--use-optimizer"] * (not adam), cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert f"=> loaded checkpoint '{latest.name}' (epoch 1, step 14)" in resumed.out
    assert "was trained with" not in resumed.out
    ignored = f"=> {latest.name} has use_optimizer False: --use-optimizer True is ignored"
    assert (ignored in resumed.out) == (not adam)
    assert list(differences(read(tmp_path / "whole.checkpoint.pt"), read(latest))) == []

    as_it_was(tmp_path / "model.pt", LANGUAGE_MODEL, algorithm=algorithm, words=40)
    evaluated = run("lm_main.py", "--evaluate", "--data", "set", cwd=tmp_path)
    assert evaluated.code == 0, evaluated
    assert "| Evaluation | test loss" in evaluated.out
    assert run("lm_generate.py", "--words", 9, cwd=tmp_path).code == 0


def test_an_image_classifiers(tmp_path: Path) -> None:
    """Learning rate, momentum and weight decay are those of its optimizer."""
    make_dataset(tmp_path / "set")
    flags: list[object] = ["set", "--image-size", 32, "--stem", "stock", "-b", 8, "-j", 1]
    flags += ["--lr", 0.01, "--momentum", 0.8, "--wd", 1e-3, "--seed", 1, "--epochs", 2]
    flags += ["--checkpoint-every", 2, "--output-dir"]
    assert run("resnet_main.py", *flags, "whole", cwd=tmp_path).code == 0
    probe = ("kill", "resnet_main.py", 1, 2, *flags, "killed")
    assert run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE).code == 9
    latest = tmp_path / "killed" / "checkpoint.pth"
    as_it_was(latest, IMAGE_CLASSIFIER, num_classes=3)

    resume = ("set", "-j", 1, "--output-dir", "killed", "--resume", latest, "--epochs", 2)
    resumed = run("resnet_main.py", *resume, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert "checkpoint.pth' (epoch 1, step 2)" in resumed.out
    assert "was trained with" not in resumed.out
    whole = read(tmp_path / "whole" / "checkpoint.pth")
    assert list(differences(whole, read(latest))) == []
    settings = {"lr": 0.01, "momentum": 0.8, "weight_decay": 1e-3, "batch_size": 8, "seed": 1}
    assert {name: whole[name] for name in settings} == settings

    as_it_was(latest, IMAGE_CLASSIFIER)
    other = run("resnet_main.py", *resume, "--lr", 0.02, "--wd", 0, "--epochs", 3, cwd=tmp_path)
    assert other.code == 0, other
    assert f"{latest} was trained with --lr 0.01, this run has 0.02\n" in other.out
    assert f"{latest} was trained with --weight-decay 0.001, this run has 0.0\n" in other.out
    assert other.out.count("was trained with") == 2
    group = read(latest)["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (0.02, 0.0, 0.8)
