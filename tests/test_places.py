"""Where runs are kept: none replaces another, and no name or file is taken for another."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import (
    KIT,
    Result,
    Running,
    error_line,
    launch,
    make_corpus,
    make_dataset,
    read,
    run,
    scalars,
)

from engine import checkpoints, files
from engine.checkpoints import previous_of
from engine.cli import UserError
from engine.metrics import Curves
from image_classification.checkpoint import default_folder
from word_language_model.checkpoint import beside
from word_language_model.export import export_onnx
from word_language_model.model import build_model
from word_language_model.settings import ModelSpec

TINY = ("--data", "set", "--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", 5, "--epochs")


def contents(folder: Path) -> dict[Path, bytes]:
    names = (p for p in folder.rglob("*") if not p.name.startswith((".std", ".")))
    return {p: p.read_bytes() for p in names if p.is_file()}


def lm(folder: Path, *flags: object) -> Result:
    return run("lm_main.py", *TINY, *flags, cwd=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, `set`, and a run of two epochs, `model.pt`, the first the better."""
    folder = tmp_path_factory.mktemp("trained")
    make_corpus(folder / "set")
    assert lm(folder, 1).code == 0
    worse = lm(folder, 2, "--resume", "auto", "--lr", 1e4)
    assert worse.code == 0, worse
    assert read(folder / "model.checkpoint.pt")["annealed"] == 1
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_is_never_replaced_unasked(folder: Path) -> None:
    before = contents(folder)
    (folder / "b").mkdir()
    shutil.copy(folder / "model.pt", folder / "b")
    for flags, path in (
        ((), "model.checkpoint.pt"),
        (("--resume", "b/model.pt"), "model.checkpoint.pt"),
    ):
        line = error_line(lm(folder, 9, *flags))
        assert f"{path} is of an earlier run: --resume auto goes on with it" in line
        assert "--overwrite replaces it, and another --save leaves it alone" in line
    assert "give one of them" in error_line(lm(folder, 9, "--overwrite", "--resume", "auto"))
    assert before.items() <= contents(folder).items()
    for path in ("model.checkpoint.pt", "model.checkpoint.previous.pt"):
        (folder / path).unlink()
    assert "model.pt is of an earlier run" in error_line(lm(folder, 9))
    again = lm(folder, 2, "--resume", "auto")  # from the only file that is left
    assert "=> loaded checkpoint 'model.pt' (epoch 1, step 0)" in again.out
    anew = lm(folder, 1, "--overwrite", "--seed", 5)
    assert anew.code == 0, anew
    assert [read(folder / n)["seed"] for n in ("model.pt", "model.checkpoint.pt")] == [5, 5]
    assert not (folder / "model.checkpoint.previous.pt").exists()
    assert [step for step, _ in scalars(folder / "model.logs")["LR"]] == [1]

    make_dataset(folder / "images")
    images = ("images", "--image-size", 32, "--stem", "stock", "-b", 8, "-j", 1, "--epochs", 1)
    assert run("resnet_main.py", *images, cwd=folder).code == 0
    line = error_line(run("resnet_main.py", *images, cwd=folder))
    assert "output/resnet18-cpu/checkpoint.pth is of an earlier run" in line
    assert "another --output-dir" in line


def test_two_runs_do_not_write_one_place_at_the_same_time(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = [*TINY, 99999, "--checkpoint-every", 5]
    first = Running("lm_main.py", *flags, cwd=tmp_path, env={})
    first.wait_for((tmp_path / "model.checkpoint.pt").exists)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "model.pt").symlink_to(tmp_path / "model.pt")
    (tmp_path / "again" / "model.checkpoint.pt").symlink_to(tmp_path / "model.checkpoint.pt")
    overwrite = ("--overwrite", "--save", tmp_path / "again" / "model.pt")
    other = launch("cpu4.yaml", "lm_main.py", *flags, *overwrite, cwd=tmp_path)
    lines = [line for line in other.err.splitlines() if "lm_main.py: error:" in line]
    assert len(lines) == 1, other
    writer = f"another run (process {first.pid} on {socket.gethostname()})"
    assert f"{writer} writes to {tmp_path}" in lines[0]
    assert first.process.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.finish()
    step = read(tmp_path / "model.checkpoint.pt")
    (tmp_path / "model.pt").unlink(missing_ok=True)  # as it is before the first epoch's end
    resumed = lm(tmp_path, step["epoch"] + 1, "--resume", "auto")
    assert resumed.code == 0, resumed
    assert f"(epoch {step['epoch']}, step {step['step']})" in resumed.out


def test_no_two_names_share_a_file() -> None:
    names = ["m", "m.pt", "m.pth", "m.PT", "lr0.2", "lr0.5", "lr0", "lr0.pt", "m-", "m..pt", "m."]
    names += ["m.previous", "m-checkpoint", "m-logs.pt"]
    found = []
    for name in names:
        latest, log_dir = beside(Path("a", name))
        found += [latest, previous_of(latest), log_dir]
    assert len({*found}) == len(found) == 3 * len(names)
    assert not {str(path) for path in found} & {f"a/{name}" for name in names}
    assert beside(Path("model.pt")) == (Path("model.checkpoint.pt"), Path("model.logs"))


@pytest.mark.parametrize("source", ["model.pt", "model.checkpoint.pt", "alone.pt"])
def test_a_run_that_goes_on_elsewhere_takes_its_best_epoch_along(source: str, folder: Path) -> None:
    shutil.copy(folder / "model.checkpoint.pt", folder / "alone.pt")
    best = read(folder / "model.pt")
    away = ("--resume", source, "--save", "b/model.pt", "--lr", 1e4)
    result = lm(folder, 3, *away)
    assert result.code == 0, result
    if source == "alone.pt":  # whose best epoch is nowhere, and no later one is better
        assert "=> alone.pt is without its best epoch: b/model.pt takes a better" in result.out
        assert "b/model.pt does not hold this run's best weights: testing the last" in result.out
        assert not (folder / "b" / "model.pt").exists()
        return
    kept = read(folder / "b" / "model.pt")
    assert kept["best_val_loss"] == best["best_val_loss"]
    assert all(torch.equal(kept["state_dict"][n], t) for n, t in best["state_dict"].items())
    assert read(folder / "b" / "model.checkpoint.pt")["epoch"] == 3
    assert "does not hold" not in result.out


def test_outputs_are_neither_inputs_nor_each_other(folder: Path) -> None:
    (folder / "link.pt").symlink_to("model.pt")
    shutil.copytree(folder / "set", folder / "train" / "a")
    before = contents(folder)
    graph, compare = ("export_graph.py", "--format", "gv"), ("diff_eval.py", "a", "b")
    cases: dict[tuple[str, ...], str] = {
        ("lm_main.py", "--save", "m.pt", "--onnx-export", "m.pt"): "is the file of --onnx-export",
        ("lm_main.py", "--save", "m.pt", "--onnx-export", "./x/../m.checkpoint.pt"): "m.checkpoint",
        ("lm_main.py", "--save", "m.pt", "--onnx-export", "set/train.txt"): "is the file of --data",
        ("lm_main.py", "--save", "m.pt", "--log-dir", "m.pt/logs"): "lies in --save m.pt",
        ("lm_main.py", "--save", "m.pt", "--log-dir", "m.checkpoint.pt"): "the file of --log-dir",
        ("lm_main.py", "--evaluate", "--onnx-export", "link.pt"): "is the file of --resume",
        ("resnet_main.py", ".", "--output-dir", "train/b"): "train/b/checkpoint.pth lies in DIR",
        ("lm_generate.py", "--outf", "link.pt"): "--outf link.pt is the file of --checkpoint",
        (*graph, "--checkpoint", "model.pt", "--output", "link.pt"): "is the file of --checkpoint",
        (*compare, "--data", ".", "--output-dir", "train/a"): "lies in --data",
    }
    for (script, *flags), message in cases.items():
        data = ("--data", "set") if script == "lm_main.py" else ()
        line = error_line(run(script, *data, *flags, cwd=folder))
        assert message in line, (flags, line)
    assert contents(folder) == before
    assert not (folder / "m.logs").exists()


def test_paths_are_compared_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    Path("way").symlink_to("real")
    Path("dangling").symlink_to("real/none")
    same = ["real/none", "way/none", "dangling", "./real/../way/none", str(tmp_path / "real/none")]
    for one, other in itertools.permutations(map(Path, same), 2):
        with pytest.raises(UserError, match="is the file of --b too"):
            files.refuse_clashes([("--a", one)], inputs=[("--b", other)])
    for path in ("none", "real/none2", "real"):
        files.refuse_clashes([("--a", Path("way/none"))], [("--b", Path(path))])


def test_links_are_followed_and_devices_and_pipes_written_to(folder: Path) -> None:
    (folder / "big").mkdir()
    for name in ("text", "model.checkpoint.pt", "model.checkpoint.previous.pt"):
        (folder / "big" / name).write_text("before")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(f"big/{name}")
    os.mkfifo(folder / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((folder / "pipe").read_bytes()))
    reader.start()
    for outf in ("text", "pipe", "/dev/null", "/dev/full"):
        result = run("lm_generate.py", "--words", 30, "--outf", outf, cwd=folder)
        if outf == "/dev/full":
            assert "cannot write /dev/full: No space left on device" in error_line(result)
        else:
            assert result.code == 0, result
    reader.join(10)
    assert (folder / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    assert got == [(folder / "text").read_bytes()]
    assert len(got[0].split()) == 30
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    line = error_line(run("lm_generate.py", "--outf", "socket", cwd=folder))
    assert "socket is a socket, and a file is wanted" in line

    state = {"state_dict": {"a": torch.ones(1)}}
    latest, previous = folder / "model.checkpoint.pt", folder / "model.checkpoint.previous.pt"
    for epoch in (1, 2):
        checkpoints.save({**state, "epoch": epoch}, latest, previous=previous)
    for name in ("text", latest.name, previous.name):
        assert (folder / name).is_symlink()
        assert not (folder / "big" / name).is_symlink()
    assert [checkpoints.load(path)["epoch"] for path in (latest, previous)] == [2, 1]
    assert {p.name for p in (folder / "big").iterdir()} == {"text", latest.name, previous.name}


def test_an_onnx_model_with_its_weights_in_a_second_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one above 1.5 GB is, through a link to another disk, and over an earlier one."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    program = "torch.onnx._internal.exporter._onnx_program"
    monkeypatch.setattr(f"{program}._LARGE_MODEL_THRESHOLD", 0)
    (tmp_path / "big").mkdir()
    (tmp_path / "x.onnx").symlink_to("big/y.onnx")
    spec = ModelSpec("GRU", words=9, emsize=4, nhid=4, nlayers=1, nhead=1, tied=False)
    for _ in range(2):
        model = build_model(spec, dropout=0.0)
        export_onnx(model, tmp_path / "x.onnx", bptt=3)
        assert {p.name for p in (tmp_path / "big").iterdir()} == {"y.onnx", "y.onnx.data"}
        found = onnx.load(tmp_path / "big" / "y.onnx")
        tensors = [onnx.numpy_helper.to_array(t) for t in found.graph.initializer]
        decoder = model.decoder.weight.detach().numpy()
        assert any(
            t.shape in ((9, 4), (4, 9)) and set(t.flat) == set(decoder.flat) for t in tensors
        )
    with pytest.raises(UserError, match="/dev/null takes one file, and this needs 2"):
        export_onnx(model, Path("/dev/null"), bptt=3)


LONG = "l" * 250


def test_names_are_refused_before_the_first_epoch_or_work(folder: Path) -> None:
    before = contents(folder)
    for flags, message in {
        ("--save", ""): "argument --save: is empty: a variable that is not set?",
        ("--data", ""): "argument --data: is empty",
        ("--save", "/"): "argument --save: / is a directory, and a file is wanted",
        ("--save", "set/.."): "is a directory",
        ("--save", LONG): f"{LONG}-checkpoint.pt: File name too long; choose another with --save",
        ("--save", f"{LONG[25:]}.pt"): "File name too long",  # that of its temporaries alone
        ("--save", "new.pt", "--log-dir", "l" * 300): "File name too long",
        ("--resume", "l" * 300): "File name too long",
        ("--data", "l" * 300): "File name too long",
    }.items():
        save = () if "--save" in flags else ("--save", "new.pt")
        line = error_line(run("lm_main.py", *TINY, 1, *save, *flags, cwd=folder))
        assert message in line, (flags, line)
    assert contents(folder) == before
    odd = "m[1]*?.pt"
    assert lm(folder, 1, "--save", odd).code == 0
    killed = folder / f".{odd[:-3]}.checkpoint.pt.{socket.gethostname()}-4194305.tmp"
    killed.write_text("of a process that is no more")
    assert "(epoch 1, step 0)" in lm(folder, 2, "--save", odd, "--resume", "auto").out
    assert not killed.exists()


# Root without the right to pass by permissions.
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_a_folder_that_may_not_be_searched_is_one_line(folder: Path) -> None:
    (folder / "x" / "c").mkdir(parents=True)
    (folder / "x").chmod(0)
    for script, *flags in (
        ("lm_main.py", "--save"),
        ("lm_main.py", "--save", "new.pt", "--resume"),
        ("lm_generate.py", "--checkpoint"),
    ):
        command = [*ORDINARY, sys.executable, str(KIT / script), *flags, "x/c/m"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        line = error_line(Result(result.returncode, result.stdout, result.stderr))
        assert "x/c" in line and "Permission denied" in line
    (folder / "x").chmod(0o755)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_in_a_read_only_checkout_the_built_in_data_lie_in_the_temporary_folder(
    tmp_path: Path,
) -> None:
    checkout, temporary, out = (
        tmp_path / name for name in ("checkout", "temporary", "späte Läufe")
    )
    for folder in (checkout, temporary, out):
        folder.mkdir()
    checkout.chmod(0o555)
    command = [*ORDINARY, sys.executable, str(KIT / "lm_main.py"), "--save", str(out / "modèle.pt")]
    command += ["--data", "sample", "--epochs", "1", "--emsize", "4", "--nhid", "4"]
    command += ["--batch-size", "400"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result
    text = temporary / f"reproduction-kit-{os.getuid()}-sample-text"
    assert {path.name for path in text.iterdir()} == {"train.txt", "valid.txt", "test.txt"}
    assert list(checkout.iterdir()) == []
    assert scalars(out / "modèle.logs").keys() >= {"Loss/train", "Perplexity/val"}


READ_ONLY = """
mount --make-rprivate / && mount --bind /tmp /tmp && mount -o remount,bind,ro /tmp &&
mount -t tmpfs -o ro tmpfs /var/tmp && mount -o remount,bind,ro / && cd / && exec "$@"
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_without_a_temporary_folder_only_what_needs_one_says_so(trained: Path) -> None:
    """All is read-only, as in a container that is started so, but for one folder."""

    def read_only(*command: object) -> Result:
        words = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", sys.executable, *map(str, command)]
        env = {k: v for k, v in os.environ.items() if k not in ("TMPDIR", "TEMP", "TMP")}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        return Result(done.returncode, done.stdout, done.stderr)

    probe = read_only("-c", "import tempfile; tempfile.gettempdir()")
    if "No usable temporary directory" not in probe.err:
        pytest.skip("read-only mounts are not permitted here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        shutil.copytree(trained / "set", Path(folder, "set"))
        save, text = Path(folder, "model.pt"), Path(folder, "text")
        flags = ("--data", Path(folder, "set"), *TINY[2:], 1, "--save", save)
        assert read_only(KIT / "lm_main.py", *flags).code == 0
        generate = (KIT / "lm_generate.py", "--checkpoint", save, "--words", 9, "--outf")
        assert read_only(*generate, text).code == 0
        assert len(text.read_text().split()) == 9
        line = error_line(read_only(*generate, "/dev/null"))
        assert "no temporary folder can be written: TMPDIR=/a/folder names one" in line


def test_a_run_without_a_folder_is_named_by_what_it_runs_on(tmp_path: Path) -> None:
    torch.save({"arch": "resnet34", "state_dict": {"w": torch.zeros(1)}}, tmp_path / "of.pth")
    for arch, resume, evaluate, device, processes, name in (
        (None, None, False, "cpu", 1, "resnet18-cpu"),
        ("resnet50", tmp_path / "of.pth", False, "cpu", 4, "resnet50-cpu4"),
        (None, Path("auto"), False, "cuda", 1, "resnet18-gpu1"),
        (None, tmp_path / "of.pth", False, "cuda", 4, "resnet34-gpu4"),
        (None, Path("none.pth"), True, "cpu", 1, "resnet18-cpu"),
    ):
        accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
        args = Namespace(arch=arch, resume=resume, evaluate=evaluate)
        assert default_folder(accelerator, args) == Path("output", name)


def test_a_log_folder_whose_name_is_no_utf8_is_one_line(tmp_path: Path) -> None:
    """Checkpoints may lie there, TensorBoard's curves not."""
    accelerator: Any = SimpleNamespace(is_main_process=True)
    with pytest.raises(UserError, match=r"cannot write to .*choose another with --log-dir"):
        Curves(accelerator, tmp_path / os.fsdecode(b"o\xfe"), 0)
