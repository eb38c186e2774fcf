"""Checkpoints are data, whole or absent."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint as checkpoints
from runtime import UserError

STATE: dict[str, Any] = {"epoch": 1, "state_dict": {"weight": torch.arange(200_000.0)}}


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_round_trip(tmp_path: Path) -> None:
    checkpoints.save(STATE, tmp_path / "new" / "a.pth", tmp_path / "new" / "best.pth")
    for name in ("a.pth", "best.pth"):
        loaded = checkpoints.load(tmp_path / "new" / name)
        assert torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for content in (Malicious(marker), {"state_dict": {"a": Malicious(marker)}}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(UserError, match="could run code"):
            checkpoints.load(tmp_path / "bad.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match="re-save its state_dict"):
        checkpoints.load(tmp_path / "module.pth")
    assert not marker.exists()


def test_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoints.save(STATE, path)
    whole = path.read_bytes()
    cuts = [whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint", whole[-500:]]
    for content in (*cuts, *(random.Random(n).randbytes(40) for n in range(200))):
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
    assert checkpoints.value({"epoch": 3}, "epoch", int, Path("a")) == 3
    assert checkpoints.value({}, "epoch", int, Path("a")) is None
    with pytest.raises(UserError, match="epoch is a str"):
        checkpoints.value({"epoch": "3"}, "epoch", int, Path("a"))
