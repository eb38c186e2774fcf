"""`make demo`, and `make venv` on machines whose python3 is not the one that the kit needs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit import KIT, Result, make_dataset, run
from PIL import Image

# Says that it is another version; `-m venv` and `-m pip` are noted, and make what make needs.
STUB = """#!/bin/sh
if [ "$1" = -c ]; then
  exec {real} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
fi
echo "$0 $*" >> {calls}
for folder; do :; done
if [ "$2" = venv ]; then mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"; fi
"""


def put_stub(path: Path, version: tuple[int, int, int], calls: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(real=sys.executable, version=version, calls=calls))
    path.chmod(0o755)


def make_venv(folder: Path, version: tuple[int, int, int], **others: str) -> Result:
    put_stub(folder / "path" / "python3", version, folder / "calls")
    env = {"PATH": f"{folder / 'path'}:/usr/bin:/bin", **others}
    command = [shutil.which("make") or "make", "venv", f"VENV={folder / 'venv'}"]
    done = subprocess.run(command, cwd=KIT, env=env, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def test_the_demo_ends_with_its_curves(tmp_path: Path) -> None:
    """The training, evaluation and picture of `make demo`, of fewer and smaller images."""
    make_dataset(tmp_path / "data" / "sample", train=4, val=6)
    dry = ["make", "-n", "-o", ".venv/.run", "demo", f"DEMO={tmp_path / 'demo'}"]
    said = subprocess.run(dry, cwd=KIT, capture_output=True, text=True, check=True).stdout
    train, evaluate, draw = re.findall(r"^\.venv/bin/(?:.*\\\n)*.*", said, re.MULTILINE)
    for command in (train, evaluate):
        words = shlex.split(command.replace("\\\n", " "))
        small = ["--epochs", "2", "-b", "8"] * (command is train)
        result = run(*words[words.index("resnet_main.py") :], *small, cwd=tmp_path)
        assert result.code == 0, result
    words = shlex.split(draw)
    assert words[1] == "-c"
    subprocess.run([sys.executable, *words[1:]], cwd=KIT, check=True)
    assert Image.open(tmp_path / "demo" / "curves.png").size == (900, 360)
    assert f"{tmp_path / 'demo'}/curves.png, or .venv/bin/tensorboard --logdir" in said


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 8), (3, 10, 12)])
def test_an_old_python_is_one_line_and_nothing_is_made(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    result = make_venv(tmp_path, version)
    assert result.code == 2
    said = [line for line in result.err.splitlines() if not line.startswith("make")]
    assert said == [
        f"python3 is Python {version[0]}.{version[1]}, and 3.11 or newer is needed: "
        "make venv PYTHON=python3.12"
    ]
    assert result.out == ""
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("left", "is_cleared"),
    [(None, False), ((3, 9, 2), True), ((3, 12, 1), False), ((0, 0, 0), True)],
)
def test_what_an_earlier_attempt_left_is_no_obstacle(
    tmp_path: Path, left: tuple[int, int, int] | None, is_cleared: bool
) -> None:
    """PyTorch's CPU packages, installed by the same Python, stay; those of another one go."""
    venv = tmp_path / "venv"
    if left:
        put_stub(venv / "bin" / "python", left, tmp_path / "calls")
        (venv / "pyvenv.cfg").touch()
    if left == (0, 0, 0):
        (venv / "bin" / "python").unlink()  # a link to a Python that has gone
    result = make_venv(tmp_path, (3, 12, 4))
    assert result.code == 0, result
    made, installed = (tmp_path / "calls").read_text().splitlines()
    clear = "--clear " if is_cleared else ""
    assert made == f"{tmp_path}/path/python3 -m venv {clear}{venv}"
    assert installed.startswith(f"{venv}/bin/python -m pip install ")
    assert (venv / ".run").exists()


@pytest.mark.parametrize("has_torch", [False, True])
def test_a_torch_that_is_there_stays(has_torch: bool, tmp_path: Path) -> None:
    """One for CPUs or an older driver is of another version and needs other CUDA libraries."""
    stub = "" if has_torch else "raise ImportError"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(stub)
    result = make_venv(tmp_path, (3, 12, 4), PYTHONPATH=str(tmp_path / "path"))
    assert result.code == 0, result
    pinned = (tmp_path / "venv" / "constraints.txt").read_text().splitlines()
    left_out = {*(KIT / "constraints.txt").read_text().splitlines()} - {*pinned}
    names = {line.split("==")[0] for line in left_out}
    assert ({"torch", "torchvision", "triton", "nvidia-nccl-cu13", "cuda-toolkit"} <= names) == (
        has_torch
    )
    assert not names & {"torchviz", "torchsummary", "accelerate"}
