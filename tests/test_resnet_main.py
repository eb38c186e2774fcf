"""The main job, as its user runs it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from kit import KIT, PROBE, Result, error_line, launch, make_dataset, read, run, same_bits, scalars
from torch.nn import functional as F
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor, v2

TAGS = {f"{name}/{split}" for name in ("Loss", "Acc@1", "Acc@5") for split in ("train", "val")}
TAGS |= {"LR", "Throughput/train"}
FAST = ("--image-size", 32, "--stem", "stock", "-b", 8, "-j", 1, "--lr", 0.01)
SUMMARY = re.compile(r"^ \* Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3}) Loss (\d+\.\d{3})$", re.MULTILINE)
LINE = re.compile(
    r"^Epoch: \[0\]\[1/3\]\tTime +\d+\.\d{3} \( *\d+\.\d{3}\)\tData +\d+\.\d{3} \( *\d+\.\d{3}\)"
    r"\tLoss \d\.\d{4}e[+-]\d\d \(\d\.\d{4}e[+-]\d\d\)\tAcc@1 +\d+\.\d\d \( *\d+\.\d\d\)"
    r"\tAcc@5 +\d+\.\d\d \( *\d+\.\d\d\)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a dataset, `set`, and two epochs trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    make_dataset(folder / "set")
    result = run("resnet_main.py", "set", *FAST, "--epochs", 2, "--seed", 1, cwd=folder)
    assert result.code == 0, result
    return folder, result


def test_foreign_weights_are_evaluated_as_by_torchvision(tmp_path: Path) -> None:
    """With its stem, and at the original's size unless the images are small."""
    torch.manual_seed(1)
    model = models.resnet18(num_classes=3)
    original = {"epoch": 9, "arch": "resnet18", "state_dict": model.state_dict()}
    torch.save({**original, "best_acc1": torch.tensor(5.0)}, tmp_path / "o.pth.tar")
    home = tmp_path / "hub" / "checkpoints"
    home.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), home / "resnet18-f37072fd.pth")

    def by_torchvision(root: Path, size: int, resized: int) -> list[float]:
        steps = [v2.Resize(resized), v2.CenterCrop(size), ToTensor()]
        steps += [v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        folder = ImageFolder(root / "val", v2.Compose(steps))
        images, targets = zip(*folder, strict=True)
        with torch.inference_mode():
            logits = model.eval()(torch.stack(images))
        hits = (logits.argmax(1) == torch.tensor(targets)).double().mean()
        loss = F.cross_entropy(logits, torch.tensor(targets))
        return [100 * hits.item(), loss.item()]

    flags = ("-e", "-b", 10, "-j", 0)
    for side, size, resized in ((300, 224, 256), (64, 64, 64)):
        root = make_dataset(tmp_path / str(side), "plain", side=side)
        found = run("resnet_main.py", root, *flags, "--resume", "o.pth.tar", cwd=tmp_path)
        acc1, _, loss = map(float, SUMMARY.findall(found.out)[0])
        assert [acc1, loss] == pytest.approx(by_torchvision(root, size, resized), abs=1e-3)
        assert f"which size of images they are: {size} px" in found.out
    asked = (*flags, "--resume", "o.pth.tar", "--image-size", 80)
    found = run("resnet_main.py", root, *asked, cwd=tmp_path)
    assert "80 px, stem stock" in found.out and "which size" not in found.out
    environment = {"TORCH_HOME": str(tmp_path)}
    found = run("resnet_main.py", "300", *flags, "--pretrained", cwd=tmp_path, env=environment)
    assert "=> using pre-trained model 'resnet18', 3 classes, 224 px, stem stock\n" in found.out


def test_lines_are_the_originals(trained: tuple[Path, Result]) -> None:
    _, result = trained
    assert LINE.search(result.out)
    assert len(SUMMARY.findall(result.out)) == 2
    assert "\r" not in result.out + result.err
    assert "=> creating model 'resnet18', 3 classes, 32 px, stem stock" in result.out


def test_tensorboard_has_the_tags_and_one_point_an_epoch(trained: tuple[Path, Result]) -> None:
    folder, result = trained
    found = scalars(folder / "output" / "resnet18-cpu" / "logs")
    assert set(found) == TAGS
    assert all([step for step, _ in points] == [0, 1] for points in found.values())
    last = SUMMARY.findall(result.out)[-1]
    for tag, printed in zip(("Acc@1/val", "Acc@5/val", "Loss/val"), last, strict=True):
        assert found[tag][1][1] == pytest.approx(float(printed), abs=5e-4)


def test_the_checkpoint_is_plain_data_and_rebuilds_the_model(trained: tuple[Path, Result]) -> None:
    folder, result = trained
    output = folder / "output" / "resnet18-cpu"
    names = {"checkpoint.pth", "checkpoint.previous.pth", "model_best.pth", "logs"}
    assert {p.name for p in output.iterdir()} == names | {".checkpoint.pth.lock"}
    content = read(output / "checkpoint.pth")
    assert set(content) >= {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "scheduler"}
    assert (content["epoch"], content["step"], content["stem"]) == (2, 0, "stock")
    assert (content["image_size"], content["num_classes"], content["seed"]) == (32, 3, 1)
    assert content["classes"] == ["n00000000", "n00000001", "n00000002"]
    models.resnet18(num_classes=3).load_state_dict(content["state_dict"])
    best = read(output / "model_best.pth")
    assert best["best_acc1"] == content["best_acc1"]
    assert best["best_acc1"] == max(float(acc1) for acc1, _, _ in SUMMARY.findall(result.out))


def test_evaluation_needs_no_flags_and_does_not_depend_on_the_number_of_processes(
    trained: tuple[Path, Result],
) -> None:
    folder, result = trained
    flags = ("-e", "--resume", "output/resnet18-cpu/checkpoint.pth", "-b", 8)
    alone = run("resnet_main.py", "set", *flags, cwd=folder)
    assert SUMMARY.findall(alone.out) == SUMMARY.findall(result.out)[-1:], alone
    # In batches of 8, of which four processes get 2, 1, 1, 1.
    make_dataset(folder / "larger", val=37)
    alone = run("resnet_main.py", "larger", *flags, cwd=folder)
    four = launch("cpu4.yaml", "resnet_main.py", "larger", *flags, cwd=folder)
    assert "=> 4 processes on CPU" in four.out
    assert len(SUMMARY.findall(alone.out)) == 1, alone
    assert SUMMARY.findall(alone.out) == SUMMARY.findall(four.out), four


def test_an_evaluation_of_random_weights_says_so(trained: tuple[Path, Result]) -> None:
    result = run("resnet_main.py", "set", *FAST, "-e", cwd=trained[0])
    assert result.code == 0, result
    assert "the figures of random weights" in result.out


def test_flags_that_disagree_with_the_checkpoint_are_named(trained: tuple[Path, Result]) -> None:
    flags = ["set", "-e", "--resume", "output/resnet18-cpu/model_best.pth"]
    line = error_line(run("resnet_main.py", *flags, "-a", "resnet50", cwd=trained[0]))
    assert line.endswith("model_best.pth has arch resnet18, not resnet50: leave the flag out")
    flags += ["--image-size", "64", "--stem", "stock"]
    result = run("resnet_main.py", *flags, cwd=trained[0])
    assert result.code == 0
    assert "--image-size 32, this run has 64" in result.out
    assert "--stem" not in result.out
    assert "random weights" not in result.out
    assert "3 classes, 64 px, stem stock" in result.out  # the weights fit any size


def test_a_resume_that_would_not_be_the_same_run_is_refused_or_named(
    trained: tuple[Path, Result],
) -> None:
    folder, _ = trained
    flags = ["set", "--output-dir", "odd", "--checkpoint-every", 2, "--epochs", 2]
    probe = ("kill", "resnet_main.py", 0, 2, *flags, *FAST, "--seed", 1)
    assert run("tests/process_probe.py", *probe, cwd=folder, env=PROBE).code == 9
    again = [*flags, "--resume", "odd/checkpoint.pth"]  # which knows what FAST said
    for change, message in {
        ("--seed", 2): "has seed 1, not 2: leave the flag out, or begin anew",
        ("-b", 4): "within an epoch of batch_size 8, and this run has 4",
    }.items():
        assert message in error_line(run("resnet_main.py", *again, *change, cwd=folder))
    given = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.01}
    former = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
    more = ("--lr", 0.02, "--momentum", 0.5, "--wd", 0.01)
    changed = run("resnet_main.py", *again, *more, cwd=folder)
    assert changed.code == 0, changed
    for name in given:
        flag = name.replace("_", "-")
        line = f"was trained with --{flag} {former[name]}, this run has {given[name]}\n"
        assert line in changed.out
    assert changed.out.count("was trained with") == 3
    group = read(folder / "odd" / "checkpoint.pth")["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in given} == given
    done = run("resnet_main.py", *again, cwd=folder)
    assert done.code == 0
    assert "=> 2 epochs are done: raise --epochs to go on" in done.out
    other = run("resnet_main.py", *again, "-b", 4, "--epochs", 3, cwd=folder)
    assert "was trained with --batch-size 8, this run has 4\n" in other.out, other
    assert read(folder / "odd" / "checkpoint.pth")["batch_size"] == 4
    for key, value in {
        "epoch": -4,
        "step": 9,
        "sums": [[1.0]],
        "optimizer": "gone",
        "image_size": 10**9,
    }.items():
        content = read(folder / "odd" / "checkpoint.pth")
        torch.save({**content, key: value}, folder / "bad.pth")
        flags = ["set", *FAST, "--seed", 1, "--epochs", 3, "--resume", "bad.pth"]
        line = error_line(run("resnet_main.py", *flags, "--output-dir", "bad", cwd=folder))
        assert "checkpoint bad.pth: " in line


def test_four_processes_train_on_the_samples_of_one_and_reach_its_weights(tmp_path: Path) -> None:
    """Decoded and large images; without batch normalisation; a last batch not to be divided."""
    flags = [make_dataset(tmp_path / "small", train=9)]
    flags += [make_dataset(tmp_path / "large", "plain", train=9, side=160)]
    script = KIT / "tests" / "process_probe.py"
    results = [
        launch(config, script, "same", *flags, cwd=tmp_path, env=PROBE)
        for config in ("cpu.yaml", "cpu4.yaml")
    ]
    assert [r.code for r in results] == [0, 0], results
    assert [r.out.splitlines()[-1] for r in results] == ["1 processes", "4 processes"]
    lines = [r.out.splitlines() for r in results]
    batches = [[line for line in out if line.startswith("BATCH")] for out in lines]
    assert len(batches[0]) == 10  # of each dataset three, and the last two again
    assert batches[0] == batches[1]
    assert batches[0][1:3] == batches[0][3:5] != batches[0][0:2]
    weights = [next(line for line in out if line.startswith("WEIGHTS")) for out in lines]
    one, four = ([float(x) for x in line.split()[1:]] for line in weights)
    assert len(one) == 4 + 96
    assert one == pytest.approx(four, rel=1e-5, abs=1e-7)


def test_four_processes_killed_and_resumed_end_with_the_bits_of_undisturbed_ones(
    tmp_path: Path,
) -> None:
    """Of large images that are decoded once, by the first process."""
    make_dataset(tmp_path / "set", train=9, side=160)
    once = ("--decode-once", 48)
    flags = ["set", *FAST, *once, "--epochs", 2, "--seed", 1, "--cutmix", 1, "--mixup", 0.2]
    whole = launch("cpu4.yaml", "resnet_main.py", *flags, "--output-dir", "whole", cwd=tmp_path)
    assert whole.code == 0, whole
    assert "find_unused_parameters" not in whole.err
    assert len(SUMMARY.findall(whole.out)) == 2
    assert whole.out.count("=> creating model") == whole.out.count("=> decoding") == 1
    flags += ["--output-dir", "killed", "--checkpoint-every", 3]
    killed = (KIT / "tests" / "process_probe.py", "kill", "resnet_main.py", 1, 3)
    assert launch("cpu4.yaml", *killed, *flags, cwd=tmp_path, env=PROBE).code != 0
    resume = ("--resume", "killed/checkpoint.pth")
    second = launch("cpu4.yaml", "resnet_main.py", *flags, *resume, cwd=tmp_path)
    assert "(epoch 1, step 3)" in second.out
    same_bits(tmp_path / "whole" / "checkpoint.pth", tmp_path / "killed" / "checkpoint.pth")
    evaluate = ("set", "-e", "--resume", "whole/checkpoint.pth", "-b", 8, *once)
    alone = run("resnet_main.py", *evaluate, cwd=tmp_path)
    assert SUMMARY.findall(alone.out) == SUMMARY.findall(whole.out)[-1:]


def test_four_processes_evaluate_what_was_trained_with_sync_bn(tmp_path: Path) -> None:
    """The setting comes from the checkpoint, and matters in training alone."""
    make_dataset(tmp_path / "set")
    flags = ("--epochs", 1, "--sync-bn", "-a", "resnext50_32x4d", "--log-dir", "logs")
    trained = run("resnet_main.py", "set", *FAST, *flags, cwd=tmp_path)
    assert trained.code == 0, trained
    assert len(scalars(tmp_path / "logs")["Loss/val"]) == 1
    evaluate = ("set", "-e", "--resume", "output/resnext50_32x4d-cpu/checkpoint.pth")
    four = launch("cpu4.yaml", "resnet_main.py", *evaluate, cwd=tmp_path)
    assert four.code == 0, four
    assert SUMMARY.findall(four.out) == SUMMARY.findall(trained.out)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: apt install g++")
def test_each_shape_is_compiled_once_and_in_the_first_epoch(tmp_path: Path) -> None:
    """Full and last batch of training and of validation; by a compiler that only counts."""
    make_dataset(tmp_path / "set", train=9)  # 27 and 10 images, in batches of 8
    flags = ("set", *FAST, "--epochs", 3, "--compile")
    result = run("tests/process_probe.py", "compile", *flags, cwd=tmp_path, env=PROBE)
    assert result.code == 0, result
    assert re.findall(r"COMPILED (\d+)", result.out) == ["4"] * 3
    assert len(SUMMARY.findall(result.out)) == 3


def test_dummy_data_needs_no_disk(tmp_path: Path) -> None:
    """Stopped by its own learning rate: an epoch of 1.3 million images is not for a test."""
    flags = ("--dummy", "--image-size", 32, "-b", 4, "--lr", 1e30, "-a", "squeezenet1_1")
    result = run("resnet_main.py", *flags, cwd=tmp_path)
    assert "=> Dummy data is used!" in result.out
    assert "[     1/320292]" in result.out
    assert "the loss is not finite in epoch 0 at step" in error_line(result)


def test_a_validation_loss_that_is_not_finite_saves_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path / "one", val=3)
    flags = ("one", *FAST[:-1], 50, "--epochs", 1, "--seed", 2)
    line = error_line(run("resnet_main.py", *flags, cwd=tmp_path))
    assert "not finite" in line and "epoch 0" in line
    assert not list((tmp_path / "output" / "resnet18-cpu").glob("*.pth"))


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (("--lr", 1e30), "[012]"),
        # The weight of a normalisation is 1: its update overflows at once, after a finite loss.
        (("--lr", 10, "--wd", 1e38), "0"),
    ],
)
def test_a_loss_or_weights_that_are_not_finite_keep_the_last_good_checkpoint(
    flags: tuple[object, ...], step: str, trained: tuple[Path, Result]
) -> None:
    folder, _ = trained
    checkpoint = folder / "output" / "resnet18-cpu" / "checkpoint.pth"
    before = checkpoint.read_bytes()
    resume = ("--epochs", 9, "--resume", checkpoint, "--checkpoint-every", 1)
    result = run("resnet_main.py", "set", *FAST, *resume, *flags, cwd=folder)
    assert re.search(rf"not finite in epoch 2 at step {step}: lower --lr", error_line(result))
    kept = read(checkpoint)
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    checkpoint.write_bytes(before)


def test_bad_input_is_one_line_and_touches_nothing(trained: tuple[Path, Result]) -> None:
    folder, _ = trained
    best = "output/resnet18-cpu/model_best.pth"
    make_dataset(folder / "four", classes=4)
    (folder / "cut.pth").write_bytes((folder / best).read_bytes()[:1000])
    (folder / "text.pth").write_text("hello")
    torch.save(torch.nn.Linear(1, 1), folder / "code.pth")
    (folder / "file").write_text("a file")
    (folder / "empty").mkdir()
    damaged = make_dataset(folder / "damaged")
    victims = sorted((damaged / "train" / "n00000001" / "images").iterdir())[:2]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:300])
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".std")]
    before = {p: p.read_bytes() for p in files}
    cases: dict[tuple[object, ...], str] = {
        ("nowhere",): "dataset nowhere: no such folder",
        ("file",): "dataset file: is a file",
        ("empty",): "has no folder train/",
        ("damaged",): f"{victims[0].name} (truncated), ",
        ("damaged", "-e"): f"{victims[1].name} (truncated)",
        ("set", "--resume", "none.pth"): "none.pth: no such file",
        ("set", "--resume", "cut.pth"): "cut.pth: damaged, cut, or no checkpoint",
        ("set", "--resume", "text.pth"): "text.pth: damaged, cut, or no checkpoint",
        ("set", "--resume", "code.pth"): "code.pth: holds more than tensors",
        ("four", "--resume", best): "has 3 classes and the dataset 4",
        ("set", "-b", "0"): "-b/--batch-size: must be at least 1",
        ("set", "-b", "9" * 22): "fit 64 bits",
        ("set", "--seed", "9" * 22): "fit 64 bits",
        ("set", "-b", "x"): "must be a whole number, not 'x'",
        ("set", "--lr", "-1"): "must be a number from 0 on",
        ("set", "--lr", "nan"): "must be a number from 0 on",
        ("set", "--epochs", "-3"): "must be at least 1",
        ("set", "--label-smoothing", "1"): "must be from 0 to below 1, not 1",
        ("set", "-a", "resnet19"): "unknown architecture 'resnet19': did you mean resnet1",
        ("set", "-a", "maxvit_t"): "use --image-size 224",
        ("set", "--stem", "other"): "invalid choice: 'other'",
        ("set", "--output-dir", "file/x"): "cannot write to file/x/checkpoint.pth: Not a directory",
        ("set", "--log-dir", "file"): "cannot write to file: File exists",
        ("set", "--world-size", "4"): "accelerate launch --config_file",
        ("set", "--multiprocessing-distributed"): "accelerate launch --config_file",
        ("set", "--no-accel"): "accelerate launch --config_file",
        ("set", "--gpu", "0"): "accelerate launch --config_file",
        ("--no-download",): "put http://cs231n.stanford.edu/tiny-imagenet-200.zip at data/",
    }
    options = ("--output-dir", "elsewhere")
    for flags, message in cases.items():
        line = error_line(run("resnet_main.py", *options, *flags, cwd=folder))
        assert message in line, (flags, line)
    offline = run("resnet_main.py", *options, cwd=folder, env={"http_proxy": "http://127.0.0.1:9"})
    assert "or try the built-in dataset: sample" in error_line(offline)
    assert before == {p: p.read_bytes() for p in files}
    assert not (folder / "elsewhere" / "checkpoint.pth").exists()
