"""Checkpoints are data, whole or absent."""

import argparse
import os
import random
import resource
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import image

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import UserError

STATE: dict[str, Any] = {"epoch": 1, "state_dict": {"weight": torch.arange(200_000.0)}}


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for content in (Malicious(marker), {"state_dict": {"a": Malicious(marker)}}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(UserError, match="could run code"):
            checkpoints.load(tmp_path / "bad.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match="this turns it into weights") as refusal:
        checkpoints.load(tmp_path / "module.pth")
    assert not marker.exists()
    command = shlex.split(str(refusal.value).partition("weights: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert {*checkpoints.load(tmp_path / "weights.pth")["state_dict"]} == {"weight", "bias"}


WEIGHTS = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "epoch"),
    [
        (WEIGHTS, None),
        ({"model_state_dict": WEIGHTS, "epoch": 3}, 3),
        ({"net": WEIGHTS, "acc": 91.0, "epoch": 3}, 3),
        ({"weights": WEIGHTS, "optimizer": {"state": {}, "param_groups": []}}, None),
        ({"state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}}, None),
        # torchvision's references number the last epoch that is done.
        (
            {
                **{"model_ema": {"fc.weight": torch.zeros(1)}, "model": WEIGHTS, "optimizer": {}},
                **{"lr_scheduler": {}, "epoch": 29, "args": argparse.Namespace(lr=0.1)},
            },
            30,
        ),
    ],
)
def test_weights_under_others_keys(content: object, epoch: int | None, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    loaded = checkpoints.load(tmp_path / "a.pth")
    assert loaded.get("epoch") == epoch
    assert {*loaded["state_dict"]} == {*WEIGHTS}
    assert torch.equal(loaded["state_dict"]["fc.weight"], WEIGHTS["fc.weight"])


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/a.jpg", "a")
    with tarfile.open(tmp_path / "weights.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "photos.zip", "weights.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:")
    (tmp_path / "page.pth").write_text("<!doctype html><title>404</title>")
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    image("photo", 8).save(tmp_path / "photo.jpg")
    for name, message in {
        "script.pt": "is a TorchScript program. This turns it into weights: ",
        "photos.zip": "is a zip archive: unpack it",
        "weights.tar.gz": "is an archive: unpack it",
        "pointer.pth": "is the pointer to a file in git LFS",
        "page.pth": "is a web page",
        "model.h5": "is an HDF5 file",
        "photo.jpg": "is an image",
    }.items():
        with pytest.raises(UserError, match=f"{name}: {message}"):
            checkpoints.load(tmp_path / name)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for content in (
        b"",
        b"not a checkpoint",
        *(random.Random(n).randbytes(40) for n in range(200)),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pth: "):
            checkpoints.load(path)
    other: Any
    for other in ([1, 2], {"state_dict": {}}, {"state_dict": {"a": 1}}, torch.ones(3)):
        torch.save(other, path)
        with pytest.raises(UserError, match="no state_dict"):
            checkpoints.load(path)
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a directory"):
        checkpoints.load(tmp_path)


def test_every_flipped_bit_and_every_cut_is_found_or_harmless(tmp_path: Path) -> None:
    """Harmless is a bit of a header that nobody reads."""
    path = tmp_path / "a.pth"
    state = {"weight": torch.arange(40.0), "bias": torch.ones(3)}
    checkpoints.save({"epoch": 1, "state_dict": state}, path)
    assert list(tmp_path.iterdir()) == [path]
    whole = path.read_bytes()
    rng = random.Random(0)
    found = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = checkpoints.load(path)
        except UserError as error:
            assert "a.pth: damaged" in str(error) or "could run code" in str(error)
            found += 1
        else:
            assert loaded["epoch"] == 1
            for name, tensor in state.items():
                assert torch.equal(loaded["state_dict"][name], tensor), place
    assert found > 0.2 * len(whole)  # the rest is padding that aligns the tensors
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.pth: "):
            checkpoints.load(path)


def test_what_unfolds_into_more_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    expanded = torch.zeros(1).expand(10**9)
    for tensor in (torch.empty(10**6, 10**6, device="meta"), torch.eye(3).to_sparse(), expanded):
        torch.save({"state_dict": {"a": tensor}}, path)
        with pytest.raises(UserError, match="no state_dict of named tensors"):
            checkpoints.load(path)
    checkpoints.save({"state_dict": {"a": torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="more than its file's size"):
        checkpoints.load(path)


def test_weights_of_another_type_are_refused() -> None:
    model = torch.nn.Linear(2, 1)
    state = {"weight": torch.ones(1, 2, dtype=torch.int64), "bias": torch.ones(1)}
    with pytest.raises(UserError, match=r"weight is torch\.int64 instead of torch\.float32"):
        Checkpoint(Path("a")).load_state(model, state, "a line")


def test_a_writer_keeps_the_one_before_but_not_another_runs(tmp_path: Path) -> None:
    latest, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"

    def epochs() -> list[int | None]:
        return [checkpoints.load(p)["epoch"] if p.exists() else None for p in (latest, previous)]

    def write(resumed: Path | None, *numbers: int) -> None:
        with checkpoints.Writer(latest, resumed) as writer:
            for number in numbers:
                writer.save({**STATE, "epoch": number})

    write(None, 1)
    assert epochs() == [1, None]
    write(latest, 2, 3)
    assert epochs() == [3, 2]
    write(previous, 4)  # the latest was damaged: it must not take the place of a whole one
    assert epochs() == [4, 2]
    write(None, 5)  # another run, whose first checkpoint replaces this one's
    assert epochs() == [5, None]
    write(tmp_path / "elsewhere.pth", 6, 7)
    assert epochs() == [7, 6]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_two_renames_leaves_two_whole_files(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    checkpoints.save({**STATE, "epoch": 1}, previous)
    checkpoints.save({**STATE, "epoch": 2}, latest)
    left, replace = [renames], Path.replace

    def killed(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    try:
        checkpoints.save({**STATE, "epoch": 3}, latest, previous=previous)
    except KeyboardInterrupt:
        assert renames < 2
    assert not latest.samefile(previous)
    epochs = [checkpoints.load(path)["epoch"] for path in (latest, previous)]
    assert epochs == {0: [2, 1], 1: [3, 1], 2: [3, 2]}[renames]


def test_a_writer_saves_what_was_there_and_reports_a_failure(tmp_path: Path) -> None:
    weight = torch.zeros(1000, 1000)
    with checkpoints.Writer(tmp_path / "a.pth", None) as writer:
        writer.save({"state_dict": {"weight": weight, "tied": weight}})
        weight.add_(1)
    loaded = checkpoints.load(tmp_path / "a.pth")["state_dict"]
    assert loaded["weight"].sum() == 0
    assert (tmp_path / "a.pth").stat().st_size < 1.5 * 4e6  # the tied one once
    (tmp_path / "file").touch()
    writer = checkpoints.Writer(tmp_path / "file" / "a.pth", None)
    writer.save(STATE)
    with pytest.raises(UserError, match="cannot write"):
        writer.wait()
    with pytest.raises(UserError, match="cannot write"):
        writer.check()


def test_a_disk_that_is_full_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoints.save(STATE, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*a\.pth .* is kept"):
            checkpoints.save({**STATE, "epoch": 2}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_values_of_the_wrong_type_are_refused() -> None:
    assert Checkpoint(content={"epoch": 3}).value("epoch", int) == 3
    assert Checkpoint().value("epoch", int) is None
    for wrong, kind in (("3", "str"), (True, "bool")):
        with pytest.raises(UserError, match=f"checkpoint a.pth: epoch is a {kind}: damaged"):
            Checkpoint(Path("a.pth"), {"epoch": wrong}).value("epoch", int)


def test_adamws_count_of_steps_stays_where_torch_wants_it() -> None:
    """In main memory unless this run's own kernels want it beside the weights."""
    layer = torch.nn.Linear(2, 2)
    saved = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    saved.step()
    state = saved.state_dict()
    state["param_groups"][0].update(fused=True, lr=0.5)  # as a GPU's run may have it
    elsewhere = torch.optim.AdamW(torch.nn.Linear(2, 2, device="meta").parameters())
    Checkpoint(content={"optimizer": state}).load_optimizer(elsewhere)
    for values in elsewhere.state.values():
        assert values["step"].device.type == "cpu"
        assert values["step"] == 1
        assert values["exp_avg"].device.type == "meta"
    group = elsewhere.param_groups[0]
    assert (group["lr"], group["fused"]) == (1e-3, None)  # the run sets its rate itself


@pytest.mark.parametrize("other", ["AdamW", "RMSprop", "Adagrad"])
def test_the_state_of_another_optimizer_is_refused(other: str) -> None:
    model = torch.nn.Linear(2, 1)
    theirs = getattr(torch.optim, other)(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    theirs.step()
    checkpoint = Checkpoint(Path("a.pth"), {"optimizer": theirs.state_dict()})
    with pytest.raises(UserError, match=r"a\.pth: its optimizer .* \(no SGD: dampening is missing"):
        checkpoint.load_optimizer(torch.optim.SGD(model.parameters(), 0.1))
    ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    with pytest.raises(UserError, match=f"no {other}: "):
        Checkpoint(content={"optimizer": ours}).load_optimizer(theirs)
