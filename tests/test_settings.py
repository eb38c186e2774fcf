"""One rule settles every setting: a flag, else the checkpoint's value, else the default."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import (
    KIT,
    PROBE,
    differences,
    error_line,
    make_corpus,
    make_dataset,
    read,
    run,
    same_bits,
    scalars,
)

import lm_main
import resnet_main
from engine.cli import ArgumentParser, UserError, fraction, non_negative_float, positive_int
from image_classification import settings as image_settings
from word_language_model import settings as lm_settings

# Every setting of an image classifier, but for the last none of them its default.
IMAGES = {
    **{"arch": "resnet34", "stem": "stock", "image_size": 32, "epochs": 3, "batch_size": 8},
    **{"lr": 0.02, "momentum": 0.8, "weight_decay": 1e-3, "lr_schedule": "cosine"},
    **{"warmup_epochs": 1, "label_smoothing": 0.1, "cutmix": 1.0, "mixup": 0.2},
    **{"sync_bn": True, "seed": 7, "decode_once": 40},
    "gradient_accumulation_steps": 1,  # more do not go together with sync_bn
}
WORDS = {
    **{"model": "GRU", "emsize": 8, "nhid": 8, "nlayers": 1, "nhead": 1, "tied": True},
    **{"kernel_size": 3, "use_optimizer": True, "epochs": 2, "batch_size": 4, "bptt": 5},
    **{"lr": 0.05, "clip": 0.5, "dropout": 0.3, "layer_dropout": 0.2, "seed": 7},
    "gradient_accumulation_steps": 2,
}


def flags_of(settings: dict[str, Any]) -> list[object]:
    flags: list[object] = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return flags


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser("of a test", ("size", "rate", "kind", "share"))
    parser.add_argument("--size", type=positive_int, default=3)
    parser.add_argument("--rate", type=non_negative_float, default=0.5)
    parser.add_argument("--kind", choices=("one", "other"), default="one")
    parser.add_argument("--share", type=fraction)
    return parser


@pytest.mark.parametrize(
    ("flags", "found", "settled", "said"),
    [
        ("", {}, (3, 0.5, "one", None), []),
        ("--size 3 --share 0", {}, (3, 0.5, "one", 0.0), []),
        ("", {"size": 4, "rate": 0, "kind": None, "x": 1}, (4, 0.0, "one", None), []),
        ("--size 4 --rate 2", {"size": 4, "rate": 2.0}, (4, 2.0, "one", None), []),
        (
            "--rate 0 --size 4 --share 0.1",
            {"rate": 1.5, "size": 4, "share": 0.2},
            (4, 0.0, "one", 0.1),
            [
                "=> a.pt was trained with --rate 1.5, this run has 0.0",
                "=> a.pt was trained with --share 0.2, this run has 0.1",
            ],
        ),
    ],
)
def test_a_flag_else_the_checkpoints_value_else_the_default(
    parser: ArgumentParser,
    flags: str,
    found: dict[str, Any],
    settled: tuple[object, ...],
    said: list[str],
) -> None:
    lines: list[str] = []
    args = parser.parse(flags.split())
    changed = parser.settle(args, found, Path("a.pt"), lines.append, fixed=("size",))
    values = (args.size, args.rate, args.kind, args.share)
    assert [(type(value), value) for value in values] == [(type(v), v) for v in settled]
    assert lines == said
    assert changed == [f"{line.split()[5]} {line.split()[-1]}" for line in said]


def test_a_flag_that_cannot_change_the_run_is_refused(parser: ArgumentParser) -> None:
    args = parser.parse(["--size", "3"])
    with pytest.raises(UserError, match=r"^a.pt has size 4, not 3: leave it out$"):
        parser.settle(args, {"size": 4}, Path("a.pt"), print, ("size",), "leave it out")


@pytest.mark.parametrize(
    "found", [{"size": 0}, {"size": "many"}, {"rate": -1}, {"kind": "third"}, {"share": [1]}]
)
def test_a_value_that_its_flag_would_not_take_is_damage(
    parser: ArgumentParser, found: dict[str, Any]
) -> None:
    name, value = next(iter(found.items()))
    with pytest.raises(UserError) as refusal:
        parser.settle(parser.parse([]), found, Path("a.pt"), print)
    assert str(refusal.value) == f"checkpoint a.pt: {name} is {value!r}: damaged"


def test_these_are_all_settings() -> None:
    assert IMAGES.keys() == set(image_settings.SETTINGS)
    assert WORDS.keys() == set(lm_settings.SETTINGS)


def test_an_image_classifiers_settings_come_back(tmp_path: Path) -> None:
    """Killed within an epoch and resumed without a flag, it ends with an undisturbed run's bits."""
    make_dataset(tmp_path / "set", side=160)
    every = ("set", "-j", 1, "--checkpoint-every", 2, "--output-dir")
    whole = run("resnet_main.py", *every, "whole", *flags_of(IMAGES), cwd=tmp_path)
    assert whole.code == 0, whole
    content = read(tmp_path / "whole" / "checkpoint.pth")
    assert {name: content[name] for name in IMAGES} == IMAGES
    probe = ("kill", "resnet_main.py", 1, 2, *every, "killed", *flags_of(IMAGES))
    killed = run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE)
    assert killed.code == 9, killed
    resume = (*every, "killed", "--resume", "killed/checkpoint.pth")
    resumed = run("resnet_main.py", *resume, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert "checkpoint.pth' (epoch 1, step 2)" in resumed.out
    assert "trained with" not in resumed.out
    assert "drew --seed" not in resumed.out
    same_bits(tmp_path / "whole" / "checkpoint.pth", tmp_path / "killed" / "checkpoint.pth")
    rates = [value for _, value in scalars(tmp_path / "killed" / "logs")["LR"]]
    assert rates == pytest.approx([0.01, 0.02, 0.01])

    more = {"epochs": 4, "lr_schedule": "step", "weight_decay": 0.0, "cutmix": 0.0, "momentum": 0.8}
    other = run("resnet_main.py", *resume, *flags_of(more), "--no-sync-bn", cwd=tmp_path)
    assert other.code == 0, other
    lines = [line for line in other.out.splitlines() if "was trained with" in line]
    assert lines == [
        f"=> killed/checkpoint.pth was trained with --{before}, this run has {now}"
        for before, now in (
            ("epochs 3", "4"),
            ("weight-decay 0.001", "0.0"),
            ("lr-schedule cosine", "step"),
            ("cutmix 1.0", "0.0"),
            ("sync-bn True", "False"),
        )
    ]
    content = read(tmp_path / "killed" / "checkpoint.pth")
    expected = {**IMAGES, **more, "sync_bn": False}
    assert {name: content[name] for name in expected} == expected
    group = content["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"], group["initial_lr"]) == (0.0, 0.8, 0.02)
    epoch, rate = scalars(tmp_path / "killed" / "logs")["LR"][-1]
    assert epoch == 3
    assert rate == pytest.approx(0.02)


def test_a_language_models_settings_come_back(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    every = ("--data", "set", "--checkpoint-every", 7, "--save")
    whole = run("lm_main.py", *every, "whole/model.pt", *flags_of(WORDS), cwd=tmp_path)
    assert whole.code == 0, whole
    content = read(tmp_path / "whole/model.checkpoint.pt")
    assert {name: content[name] for name in WORDS} == WORDS
    probe = ("kill", "lm_main.py", 1, 14, *every, "model.pt", *flags_of(WORDS))
    killed = run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE)
    assert killed.code == 9, killed
    resume = (*every, "model.pt", "--resume", "model.checkpoint.pt")
    resumed = run("lm_main.py", *resume, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert "=> loaded checkpoint 'model.checkpoint.pt' (epoch 1, step 14)" in resumed.out
    assert "trained with" not in resumed.out
    undisturbed = read(tmp_path / "whole/model.checkpoint.pt")
    assert list(differences(undisturbed, read(tmp_path / "model.checkpoint.pt"))) == []
    assert scalars(tmp_path / "whole" / "model.logs") == scalars(tmp_path / "model.logs")

    more = {"epochs": 3, "lr": 0.01, "dropout": 0.0, "clip": 0.5}
    other = run("lm_main.py", *resume, *flags_of(more), cwd=tmp_path)
    assert other.code == 0, other
    lines = [line for line in other.out.splitlines() if "trained with" in line]
    assert lines == [
        "=> model.checkpoint.pt was trained with --epochs 2, this run has 3",
        "=> model.checkpoint.pt was trained with --lr 0.05, this run has 0.01",
        "=> model.checkpoint.pt was trained with --dropout 0.3, this run has 0.0",
    ]
    content = read(tmp_path / "model.checkpoint.pt")
    expected = {**WORDS, **more}
    assert {name: content[name] for name in expected} == expected
    assert content["optimizer"]["param_groups"][0]["lr"] == 0.01

    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    anew = "or begin anew (--overwrite, or another --save)"
    for flags, message in (
        (("--nhid", 99), "model.checkpoint.pt has nhid 8, not 99: leave the flag out, " + anew),
        (("--model", "CNN"), "has model GRU, not CNN"),
        (("--seed", 8), "has seed 7, not 8"),
        (("--lr", 5), "its 3 epochs are done, and --lr 5.0 would change nothing: raise --epochs, "),
        (("--epochs", 2), "its 3 epochs are done, and --epochs 2 would change nothing"),
    ):
        line = error_line(run("lm_main.py", *resume, *flags, cwd=tmp_path))
        assert message in line and anew in line
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_run_knows_whether_its_seed_was_ever_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses the kernels of a GPU, also where a resumed run does not repeat the flag."""
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "set")
    flags: list[object] = ["set", "-j", 1, "--stem", "stock", "--image-size", 32, "-b", 8]
    flags += ["--lr", 0.01, "--epochs", 1, "--output-dir"]
    backend = torch.backends.cudnn
    for name, seed in (("given", ["--seed", 1]), ("drawn", [])):
        assert run("resnet_main.py", *flags, name, *seed, cwd=tmp_path).code == 0
        monkeypatch.setattr(backend, "deterministic", name == "drawn")
        monkeypatch.setattr(backend, "benchmark", name == "given")
        more = ["set", "--output-dir", name, "--resume", "auto", "--epochs", "2"]
        _, args, _ = resnet_main.begin(more)
        assert args.seeded is (name == "given")
        assert (backend.deterministic, backend.benchmark) == (args.seeded, not args.seeded)
        assert run("resnet_main.py", *more, cwd=tmp_path).code == 0
        assert read(tmp_path / name / "checkpoint.pth")["seeded"] is args.seeded


def test_the_batches_of_an_unfinished_epoch_are_not_changed_by_a_flag(tmp_path: Path) -> None:
    """At the epoch's end they are, which is printed."""
    make_dataset(tmp_path / "set")
    flags: list[object] = ["set", "-j", 1, "--stem", "stock", "--image-size", 32, "-b", 8]
    flags += ["--lr", 0.01, "--epochs", 2, "--seed", 1, "--checkpoint-every", 2]
    flags += ["--output-dir", "killed"]
    probe = ("kill", "resnet_main.py", 0, 2)
    assert run("tests/process_probe.py", *probe, *flags, cwd=tmp_path, env=PROBE).code == 9
    resume = ("set", "-j", 1, "--output-dir", "killed", "--resume", "auto")
    line = error_line(run("resnet_main.py", *resume, "-b", 4, cwd=tmp_path))
    assert "lies within an epoch of batch_size 8, and this run has 4: resume it as it" in line
    assert run("resnet_main.py", *resume, cwd=tmp_path).code == 0
    other = run("resnet_main.py", *resume, "-b", 4, "--epochs", 3, cwd=tmp_path)
    assert other.code == 0, other
    assert "was trained with --batch-size 8, this run has 4\n" in other.out
    assert read(tmp_path / "killed" / "checkpoint.pth")["batch_size"] == 4


def test_help_says_what_a_docstring_says_first_and_ends_with_its_examples() -> None:
    doc = (
        "Do it.\n\n    python it.py\n    python it.py -a 1  # twice\n\nMore.\n\n    * no example\n"
    )
    text = ArgumentParser(doc).format_help()
    assert "\n\nDo it.\n\n" in text
    assert text.endswith("\n\nexamples:\n    python it.py\n    python it.py -a 1  # twice\n")
    assert "More" not in text and "no example" not in text


@pytest.mark.parametrize(
    "path", sorted(KIT.glob("accelerate_configs/*.yaml")), ids=lambda p: p.name
)
def test_help_says_which_yaml_takes_which_processes(path: Path) -> None:
    chosen = yaml.safe_load(path.read_text())
    nodes, processes = chosen["num_machines"], chosen["num_processes"]
    kind, precision = "CPU" if chosen["use_cpu"] else "GPU", chosen["mixed_precision"]
    counts = {1: "one", 2: "two", 4: "four"}
    for parser in (resnet_main.make_parser(), lm_main.make_parser()):
        (line,) = re.findall(rf"^ +{path.name} +(.*)", parser.format_help(), re.MULTILINE)
        words = re.findall(r"\w+", line)
        assert f"{counts[processes // nodes]} " in line and ("two nodes" in line) == (nodes == 2)
        assert kind in line and {"no": "float32"}.get(precision, precision) in words
