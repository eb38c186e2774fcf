"""The language model job, as its user runs it, and the rules of the original that it follows."""

import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import (
    KIT,
    PROBE,
    STOPPED,
    Result,
    Running,
    differences,
    error_line,
    launch,
    make_corpus,
    read,
    run,
    same_bits,
    scalars,
)
from torch.nn import functional as F

from word_language_model import checkpoint as lm_checkpoint
from word_language_model import data as lm_data
from word_language_model import model as lm_model
from word_language_model.settings import MODELS, ModelSpec

TINY = ("--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", 5)
NO_DROPOUT = ("--dropout", 0, "--layer-dropout", 0)
EPOCH = re.compile(
    r"^-{89}\n\| end of epoch +(\d+) \| time: +\d+\.\d\ds \| valid loss +(\d+\.\d\d) \| "
    r"valid ppl +(\d+\.\d\d)\n-{89}$",
    re.MULTILINE,
)
END = re.compile(
    r"^={89}\n\| End of training \| test loss +(\d+\.\d\d) \| test ppl +(\d+\.\d\d)\n={89}$",
    re.MULTILINE,
)
LINE = re.compile(
    r"^\| epoch   1 \|    50/  105 batches \| lr 20\.00 \| ms/batch +\d+\.\d\d \| "
    r"loss +\d+\.\d\d \| ppl +\d+\.\d\d$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a corpus, `set`, and two epochs trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    make_corpus(folder / "set")
    flags = ("--data", "set", *TINY, "--epochs", 2, "--log-interval", 50, "--cuda")
    result = run("lm_main.py", *flags, cwd=folder)
    assert result.code == 0, result
    return folder, result


def test_lines_are_the_originals(trained: tuple[Path, Result]) -> None:
    _, result = trained
    assert len(LINE.findall(result.out)) == 1
    assert [epoch for epoch, _, _ in EPOCH.findall(result.out)] == ["1", "2"]
    assert len(END.findall(result.out)) == 1
    assert "\r" not in result.out + result.err
    assert "=> --cuda changes nothing" in result.out
    assert "2106 training, 737 validation and 527 test words, 40 different" in result.out


def test_tensorboard_has_the_tags_and_one_point_an_epoch(trained: tuple[Path, Result]) -> None:
    folder, result = trained
    found = scalars(folder / "model.logs")
    assert set(found) == {"Loss/train", "Loss/val", "Perplexity/val", "LR"}
    assert all([step for step, _ in points] == [1, 2] for points in found.values())
    for (_, loss, ppl), (_, point), (_, perplexity) in zip(
        EPOCH.findall(result.out), found["Loss/val"], found["Perplexity/val"], strict=True
    ):
        assert point == pytest.approx(float(loss), abs=6e-3)
        assert perplexity == pytest.approx(float(ppl), abs=6e-3)
        assert perplexity == pytest.approx(math.exp(point), rel=1e-5)


def test_the_checkpoint_is_plain_data_and_rebuilds_the_model(trained: tuple[Path, Result]) -> None:
    folder, result = trained
    best, latest = read(folder / "model.pt"), read(folder / "model.checkpoint.pt")
    sizes = {"model": "LSTM", "emsize": 8, "nhid": 8, "nlayers": 2, "nhead": 2, "tied": False}
    settings = {"dropout": 0.2, "layer_dropout": 0.1, "bptt": 5, "batch_size": 4}
    settings |= {"lr": 20.0, "clip": 0.25, "seed": 1111}
    for content in (best, latest):
        assert {key: content[key] for key in sizes | settings} == sizes | settings
        assert content["vocabulary"] == lm_data.load_corpus(str(folder / "set")).vocabulary
    losses = [float(loss) for _, loss, _ in EPOCH.findall(result.out)]
    assert best["best_val_loss"] == pytest.approx(min(losses), abs=6e-3)
    assert best["best_val_loss"] == latest["best_val_loss"]
    assert (latest["epoch"], latest["step"]) == (2, 0)
    model, _ = lm_checkpoint.restore_model(lm_checkpoint.load(folder / "model.pt"))
    assert list(differences(dict(model.state_dict()), best["state_dict"])) == []


def test_evaluation_needs_no_flags(trained: tuple[Path, Result]) -> None:
    folder, result = trained
    before = (folder / "model.pt").read_bytes()
    flags = ("--evaluate", "--data", "set", "--model", "LSTM")
    evaluated = run("lm_main.py", *flags, cwd=folder)
    assert evaluated.code == 0, evaluated
    losses = re.findall(r"\| Evaluation \| (\w+) loss +(\S+) \| \w+ ppl +(\S+)", evaluated.out)
    best = min(EPOCH.findall(result.out), key=lambda row: float(row[2]))
    assert losses == [("valid", *best[1:]), ("test", *END.findall(result.out)[0])]
    line = error_line(run("lm_main.py", *flags, "--emsize", 99, cwd=folder))
    assert line.endswith("error: model.pt has emsize 8, not 99: leave the flag out")
    assert before == (folder / "model.pt").read_bytes()


def follow_the_original(
    model: str, corpus: lm_data.Corpus, epochs: int, lr: float
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]], int]:
    """The rules of the original's loop, without dropout: weights, (train, valid) losses, anneals.

    Columns of 4, segments of 5 with the hidden state handed on, mean loss, the whole gradient
    scaled to a norm of 0.25, p -= lr * gradient, evaluation in 10 columns weighted by the rows
    of a segment, a quarter of the rate after an epoch that is not the best so far.
    """
    spec = ModelSpec(model, len(corpus.vocabulary), 8, 8, 2, 2, False)
    torch.manual_seed(1111)
    built = lm_model.build_model(spec, dropout=0.0)

    def pass_over(tokens: torch.Tensor, columns: int, train: bool) -> float:
        rows = len(tokens) // columns
        data = tokens[: rows * columns].view(columns, rows).t()
        hidden, total = built.initial_hidden(columns), 0.0
        for i in range(0, rows - 1, 5):
            length = min(5, rows - 1 - i)
            hidden = tuple(h.detach() for h in hidden)
            features, hidden = built.features(data[i : i + length], hidden)
            scores = F.log_softmax(built.decoder(features).view(-1, spec.words), dim=1)
            loss = F.nll_loss(scores, data[i + 1 : i + 1 + length].reshape(-1))
            total += length * loss.item()
            if train:
                built.zero_grad()
                loss.backward()
                gradients = [p.grad for p in built.parameters() if p.grad is not None]
                norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
                share = (0.25 / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
                with torch.no_grad():
                    for parameter, gradient in zip(built.parameters(), gradients, strict=True):
                        parameter.sub_(gradient * share, alpha=lr)
        return total / (rows - 1)

    losses: list[tuple[float, float]] = []
    anneals = 0
    for _ in range(epochs):
        train_loss = pass_over(corpus.train, 4, train=True)
        with torch.no_grad():
            val_loss = pass_over(corpus.valid, 10, train=False)
        if losses and val_loss >= min(val for _, val in losses):
            lr /= 4
            anneals += 1
        losses.append((train_loss, val_loss))
    return dict(built.state_dict()), losses, anneals


@pytest.mark.parametrize("model", MODELS)
def test_a_run_without_dropout_follows_the_originals_rules(model: str, tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    corpus = lm_data.load_corpus(str(tmp_path / "set"))
    lr, epochs = (5, 2) if model in ("Transformer", "RNN_RELU") else (20, 6)
    weights, losses, anneals = follow_the_original(model, corpus, epochs, lr)
    flags = ("--model", model, "--data", "set", *TINY, *NO_DROPOUT, "--lr", lr)
    result = run("lm_main.py", *flags, "--epochs", epochs, cwd=tmp_path)
    assert result.code == 0, result
    state = read(tmp_path / "model.checkpoint.pt")
    assert list(differences(weights, state["state_dict"])) == []
    found = scalars(tmp_path / "model.logs")
    # Validation sums a word's exponentials in parts. In float32 a sum of so few has a relative
    # error below 1e-5, and so has a loss, which is above 1 here.
    for tag, column in (("Loss/train", 0), ("Loss/val", 1)):
        expected = [row[column] for row in losses]
        assert [value for _, value in found[tag]] == pytest.approx(expected, rel=1e-4)
    printed = [float(ppl) for _, _, ppl in EPOCH.findall(result.out)]
    assert printed == pytest.approx([math.exp(val) for _, val in losses], rel=1e-3)
    assert state["annealed"] == anneals
    assert anneals > 0 or epochs == 2  # or the rule was not met


def test_adamw_keeps_its_rate(tmp_path: Path) -> None:
    """As in the original, where only the printed rate is lowered."""
    make_corpus(tmp_path / "set")
    flags = ("--data", "set", *TINY, "--use-optimizer", "--lr", 0.5, "--epochs", 4)
    result = run("lm_main.py", *flags, "--log-interval", 100, cwd=tmp_path)
    assert result.code == 0, result
    state = read(tmp_path / "model.checkpoint.pt")
    assert state["annealed"] > 0
    assert "| lr 0.12 |" in result.out
    assert [value for _, value in scalars(tmp_path / "model.logs")["LR"]] == [0.5] * 4
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert len(state["optimizer"]["state"]) == len(state["state_dict"])


def test_four_processes_lose_what_one_does(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags: list[object] = ["--data", "set", *TINY, *NO_DROPOUT, "--epochs", 2, "--save"]
    models: dict[str, tuple[object, ...]] = {
        "rnn.pt": (),
        "transformer.pt": ("--model", "Transformer", "--lr", 5),
        "cnn.pt": ("--model", "CNN", "--kernel-size", 3),
    }
    for name, more in models.items():
        assert run("lm_main.py", *flags, name, *more, cwd=tmp_path).code == 0
    four = launch("cpu4.yaml", "lm_main.py", *flags, "four.pt", cwd=tmp_path)
    assert four.code == 0, four
    assert "=> 4 processes on CPU" in four.out
    assert "FutureWarning" not in four.err
    assert len(EPOCH.findall(four.out)) == 2
    assert len(END.findall(four.out)) == 1
    alone, together = scalars(tmp_path / "rnn.logs"), scalars(tmp_path / "four.logs")
    for tag, points in alone.items():
        assert [v for _, v in together[tag]] == pytest.approx([v for _, v in points], rel=1e-4)

    probe = (KIT / "tests" / "lm_probe.py", "set", *models)
    outputs = [launch(f, *probe, cwd=tmp_path, env=PROBE).out for f in ("cpu.yaml", "cpu4.yaml")]
    digits = [re.findall(rf"{n} processes, (\S+: \S+)", o) for n, o in zip("14", outputs)]  # noqa: B905
    assert len(digits[0]) == len(models)
    assert digits[0] == digits[1]


def test_ctrl_c_tests_the_best_weights_and_the_run_can_go_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    """Stopped within the second epoch, with dropout, a hidden state and sums under way."""
    make_corpus(tmp_path / "set", train=8000)
    flags: list[object] = ["--data", "set", *TINY, "--epochs", 3, "--log-interval", 50]
    flags += ["--checkpoint-every", 7]
    undisturbed = run("lm_main.py", *flags, "--save", "whole.pt", cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed

    process = Running("lm_main.py", *flags, cwd=tmp_path, env={})
    latest = tmp_path / "model.checkpoint.pt"

    def is_far() -> bool:
        found = read(latest) if latest.exists() else {"epoch": 0}
        return found["epoch"] == 1 and bool(found["step"] > 100)

    process.wait_for(is_far)
    os.kill(process.pid, signal.SIGINT)
    stopped = process.finish()
    assert stopped.code == STOPPED, stopped
    assert "-" * 89 + "\nExiting from training early\n" + "=" * 89 in stopped.out
    assert len(EPOCH.findall(stopped.out)) == 1
    tested = run("lm_main.py", "--evaluate", "--data", "set", cwd=tmp_path)
    assert f"test loss  {END.findall(stopped.out)[0][0]} | test ppl" in tested.out

    assert read(latest)["epoch"] == 1
    assert read(latest)["step"] > 100
    resumed = run("lm_main.py", *flags, "--resume", latest.name, cwd=tmp_path)
    assert f"=> loaded checkpoint '{latest.name}' (epoch 1, step " in resumed.out
    assert END.findall(resumed.out) == END.findall(undisturbed.out)
    timeless = [re.sub(r"ms/batch +\S+", "", r.out).splitlines() for r in (undisturbed, resumed)]
    assert [x for x in timeless[1] if "| epoch   2 |   400" in x] == [
        x for x in timeless[0] if "| epoch   2 |   400" in x
    ]
    same_bits(tmp_path / "whole.checkpoint.pt", latest)
    best = [read(tmp_path / f"{name}.pt")["state_dict"] for name in ("whole", "model")]
    assert list(differences(*best)) == []


def test_a_run_that_is_stopped_in_its_final_test_goes_on_there(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = ("--data", "set", *TINY, "--epochs", 1)
    stopped = run("tests/process_probe.py", "final", *flags, cwd=tmp_path, env=PROBE)
    assert stopped.code == STOPPED, stopped
    assert f"stopped by SIGTERM, exit code {STOPPED}: --resume auto goes on" in stopped.out
    again = run("lm_main.py", *flags, "--resume", "auto", cwd=tmp_path)
    assert again.code == 0, again
    assert len(EPOCH.findall(stopped.out)) == 1 and not EPOCH.findall(again.out)
    assert END.findall(again.out)


def test_a_clip_of_nothing_clips_nothing(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set", train=500)
    flags = ("--data", "set", *TINY, "--lr", 0.1, "--epochs", 1, "--clip")
    for clip in (0, 1e9):
        done = run("lm_main.py", *flags, clip, "--save", f"{clip}/model.pt", cwd=tmp_path)
        assert done.code == 0, done
    ended = (read(tmp_path / f"{clip}" / "model.pt")["state_dict"] for clip in (0, 1e9))
    assert list(differences(*ended)) == []


def test_ctrl_c_before_the_first_epochs_end_tests_the_last_weights(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set", train=20_000)
    (tmp_path / "model.pt").write_text("of another run")
    flags = ("--data", "set", *TINY, "--checkpoint-every", 5, "--overwrite")
    process = Running("lm_main.py", *flags, cwd=tmp_path, env={})
    process.wait_for((tmp_path / "model.checkpoint.pt").exists)
    os.kill(process.pid, signal.SIGINT)
    stopped = process.finish()
    assert stopped.code == STOPPED, stopped
    assert "=> no epoch is done on this text: testing the weights as they are" in stopped.out
    assert len(END.findall(stopped.out)) == 1
    assert (tmp_path / "model.pt").read_text() == "of another run"


def test_a_dry_run_takes_one_step_exports_and_keeps_nothing(trained: tuple[Path, Result]) -> None:
    pytest.importorskip("onnxscript")
    folder, _ = trained
    (folder / "y.onnx").write_text("of the user")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[:2] != ".s"}
    flags = ("--data", "set", *TINY, "--model", "Transformer", "--tied", "--dry-run")
    for save in ("model.pt", "other.pt"):
        result = run("lm_main.py", *flags, "--save", save, "--onnx-export", "y.onnx", cwd=folder)
        assert result.code == 0, result
        assert len(EPOCH.findall(result.out)) == 1
        assert len(END.findall(result.out)) == 1
        assert re.search(r"exported in ONNX format at .*/y.onnx\.", result.out)
        assert "does not hold" not in result.out
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[:2] != ".s"}
    assert after == before
    evaluate = ("--data", "set", "--evaluate", "--onnx-export", "x.onnx")
    assert run("lm_main.py", *evaluate, cwd=folder).code == 0
    assert (folder / "x.onnx").stat().st_size > 1000


def test_a_missing_exporter_is_said_before_training(tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nsys.modules['onnxscript'] = None\nimport lm_main\n"
        "from engine.stop import run_script\nrun_script(lm_main.main)\n"
    )
    line = error_line(run(str(script), "--onnx-export", "x.onnx", cwd=tmp_path))
    assert "--onnx-export needs onnxscript: pip install onnx onnxscript" in line


@pytest.mark.parametrize(("scale", "step"), [(1, r"\d"), (1e4, "0")])
def test_a_loss_or_weights_that_are_not_finite_keep_the_last_good_checkpoint(
    scale: float, step: str, trained: tuple[Path, Result], tmp_path: Path
) -> None:
    """A decoder 10,000 times as large gives a finite loss, and gradients above 1 to the others:
    their first update overflows."""
    content = read(trained[0] / "model.checkpoint.pt")
    content["state_dict"]["decoder.weight"] *= scale
    latest = tmp_path / "model.checkpoint.pt"
    torch.save(content, latest)
    flags = ("--data", trained[0] / "set", "--epochs", 9, "--resume", latest, "--lr", 1e38)
    more = ("--clip", 1e38, "--checkpoint-every", 1)
    line = error_line(run("lm_main.py", *flags, *more, cwd=tmp_path))
    assert re.search(rf"the loss is not finite in epoch 3 at step {step}: lower --lr", line)
    assert not (tmp_path / "model.pt").exists()
    assert all(tensor.isfinite().all() for tensor in read(latest)["state_dict"].values())


def test_a_loss_too_large_for_a_perplexity_is_printed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = ("--data", "set", *TINY, "--lr", 1e5, "--model", "RNN_TANH")
    result = run("lm_main.py", *flags, "--dry-run", cwd=tmp_path)
    assert result.code == 0, result
    assert re.search(r"valid loss \d{4,}\.\d\d \| valid ppl +inf", result.out)


def damage(path: Path, name: str, **changes: object) -> str:
    content = {**read(path), **changes}
    torch.save({k: v for k, v in content.items() if v is not None}, path.with_name(name))
    return name


def test_bad_input_is_one_line_and_touches_nothing(trained: tuple[Path, Result]) -> None:
    folder, _ = trained
    best = folder / "model.pt"
    for name in ("without", "empty", "latin"):
        make_corpus(folder / name)
    make_corpus(folder / "tiny", train=30)
    make_corpus(folder / "other")
    (folder / "other" / "test.txt").write_text("a word more\n")
    (folder / "without" / "valid.txt").unlink()
    (folder / "empty" / "test.txt").write_bytes(b"")
    content = bytearray((folder / "latin" / "train.txt").read_bytes())
    content[9000] = 0xE9
    (folder / "latin" / "train.txt").write_bytes(content)
    (folder / "file").write_text("a file")
    torch.save({"arch": "resnet18", "state_dict": {"a": torch.ones(2)}}, folder / "image.pt")
    torch.save({"state_dict": {"a": torch.ones(2)}}, folder / "bare.pt")
    torch.save(torch.nn.Linear(1, 1), folder / "code.pt")
    (folder / "cut.pt").write_bytes(best.read_bytes()[:1000])
    vocabulary = read(best)["vocabulary"]
    state = read(best)["state_dict"]
    del state["rnn.bias_hh_l1"]
    resumed: dict[str, str] = {
        "none.pt": "none.pt: no such file",
        "cut.pt": "cut.pt: damaged, cut, or no checkpoint",
        "image.pt": "image.pt: holds the image model resnet18, not a language model",
        "bare.pt": "names no model and vocabulary",
        "code.pt": "holds a pickled module, which is code",
        damage(best, "1.pt", model="BERT"): "unknown model 'BERT': damaged",
        damage(best, "2.pt", model=3): "unknown model 3: damaged",
        damage(best, "3.pt", model="GRU"): "rnn.weight_ih_l0 has shape (32, 8) instead of (24, 8)",
        damage(best, "4.pt", model="Transformer"): ": not a Transformer of lm_main.py",
        damage(best, "13.pt", model="CNN"): ": not a CNN of lm_main.py",
        damage(best, "5.pt", vocabulary=vocabulary[:-1]): "has a vocabulary of 39 words",
        damage(best, "6.pt", vocabulary=list(range(40))): "its vocabulary is no list of words",
        damage(best, "7.pt", bptt=0): "bptt is 0: damaged",
        damage(best, "8.pt", lr="fast"): "lr is 'fast': damaged",
        damage(best, "9.pt", epoch=-1): "epoch -1, step 0 of 105: damaged",
        damage(best, "10.pt", step=3): "sums or hidden state are not those of a LSTM",
        damage(best, "11.pt", optimizer={"state": 1}): "its optimizer is not one for this model",
        damage(
            best, "12.pt", state_dict={k: v for k, v in state.items() if "bias_hh_l1" not in k}
        ): ("lacks rnn.bias_hh_l1: not a LSTM"),
    }
    cases: dict[tuple[object, ...], str] = {
        ("--data", "nowhere"): "corpus nowhere: no such folder (try --data sample",
        ("--data", "file"): "corpus file: is a file",
        ("--data", "without"): "corpus without: has neither valid.txt nor wiki.valid.tokens",
        ("--data", "empty"): "empty/test.txt: is empty",
        ("--data", "latin"): "latin/train.txt: byte 9000 (0xe9) is not UTF-8",
        ("--data", "tiny"): "the train text has 32 words, too few for 20 columns of two",
        (
            "--data",
            "other",
            "--resume",
            "model.pt",
        ): "has a vocabulary of 40 words and the corpus another, of 42: use the --data",
        ("--data", "set", "--resume", "model.pt", "--data", "without"): "has neither valid.txt",
        ("--model", "Transformer", "--emsize", 9, "--nhead", 3): "--emsize 9 is odd",
        ("--save", "set"): "--save set: is a directory",
        ("--save", "file/model.pt"): "cannot write to file/model.checkpoint.pt: File exists",
        ("--log-dir", "file"): "cannot write to file: File exists",
        ("--evaluate", "--save", "gone.pt"): "gone.pt: no such file",
        **{("--data", "set", "--resume", name): line for name, line in resumed.items()},
    }
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".std")]
    before = {p: p.read_bytes() for p in files}
    options = ("--save", "elsewhere.pt")
    for flags, message in cases.items():
        line = error_line(run("lm_main.py", *options, *flags, cwd=folder))  # the last --save wins
        assert message in line, (flags, line)
    offline = run("lm_main.py", *options, cwd=folder, env={"https_proxy": "http://127.0.0.1:9"})
    line = error_line(offline)
    assert "data/wikitext-2/train.txt is missing and cannot be downloaded" in line
    assert "or try the built-in corpus: --data sample" in line
    assert before == {p: p.read_bytes() for p in files}
    assert not (folder / "elsewhere.pt").exists()


def test_an_unfinished_epoch_is_resumed_with_its_own_batches(trained: tuple[Path, Result]) -> None:
    folder, _ = trained
    hidden = [torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)]
    middle: dict[str, Any] = {"epoch": 1, "step": 3, "sums": [[1.0, 2.0]], "hidden": hidden}
    remedy = "and this run has %d: resume it as it was, or from the end of an epoch"
    for changes, flags, message in (
        ({}, ("--batch_size", 8), f"lies within an epoch of batch_size 4, {remedy % 8}"),
        ({}, ("--bptt", 6), f"lies within an epoch of bptt 5, {remedy % 6}"),
        ({"hidden": hidden[:1]}, (), "hidden state are not those of a LSTM"),
        ({"hidden": [torch.zeros(2, 3, 8)] * 2}, (), "hidden state are not those of a LSTM"),
        ({"hidden": [1, 2]}, (), "hidden state are not those of a LSTM"),
        ({"sums": [1.0]}, (), "sums are not rows of 2 numbers"),
        ({"step": 106}, (), "epoch 1, step 106 of 105: damaged"),
    ):
        name = damage(folder / "model.checkpoint.pt", "part.pt", **{**middle, **changes})
        flags = ("--data", "set", "--resume", name, "--save", "elsewhere.pt", *flags)
        assert message in error_line(run("lm_main.py", *flags, cwd=folder))
