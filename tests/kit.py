"""Running the kit's scripts, making datasets for them, and comparing what they leave."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KIT = Path(__file__).resolve().parent.parent
REAL_DATA = KIT.parent / "shared" / "data"
PROBE = {"PYTHONPATH": str(KIT)}  # the environment of a script in tests/
PATIENCE = 240.0  # seconds that a process may take, on a busy machine as well
STOPPED = 75  # the exit code of a run that a signal has stopped
MEASURED = "Throughput/train"  # the only thing of a run that is no function of its arguments

# A server that has imported torch and forks: each script below is a process of its own, with its
# own exit code and streams, without the seconds that the import takes.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["resnet_main", "lm_main", "lm_generate", "torch.utils.tensorboard"]
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Running:
    """A script of the kit as a process, in the folder `cwd`.

    Args:
        streams: instead of files for stdout and stderr, other paths, or None for a closed one.
    """

    def __init__(
        self,
        script: str,
        *args: object,
        cwd: Path,
        env: dict[str, str],
        streams: tuple[Path | None, Path | None] | None = None,
    ) -> None:
        self.out, self.err = cwd / ".stdout", cwd / ".stderr"
        self.argv = [str(KIT / script), *map(str, args)]
        for path in (self.out, self.err):
            path.write_text("")
        arguments = (self.argv, cwd, env, streams or (self.out, self.err))
        self.process = _context.Process(target=_enter, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds, which has to come before the process ends."""
        wait_for(lambda: condition() or self.process.exitcode is not None)
        assert condition(), self.finish()

    def finish(self) -> Result:
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            raise TimeoutError(f"{self.argv} hangs: {self.out.read_text()}{self.err.read_text()}")
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


def run(script: str, *args: object, cwd: Path, env: dict[str, str] | None = None) -> Result:
    """Run a script of the kit as a process, in the folder `cwd`."""
    return Running(script, *args, cwd=cwd, env=env or {}).finish()


def _enter(
    argv: list[str], cwd: Path, env: dict[str, str], streams: tuple[Path | None, Path | None]
) -> None:
    for number, path in enumerate(streams, 1):
        if path is None:
            os.close(number)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY)
            os.dup2(descriptor, number)
            os.close(descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    multiprocessing.set_start_method(None, force=True)  # of a script's own workers: the default
    sys.argv = argv
    # As Python itself does, which has None for a closed stream.
    encoding = env.get("PYTHONIOENCODING")
    for number, (name, path) in enumerate(zip(("stdout", "stderr"), streams, strict=True), 1):
        setattr(sys, name, path and open(number, "w", encoding=encoding))  # noqa: PTH123, SIM115
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()


class Launched:
    """A script and its flags, as a user types it: with a YAML of the kit, or plainly for None."""

    def __init__(
        self, config: str | None, *args: object, cwd: Path, env: dict[str, str] | None = None
    ) -> None:
        script, *flags = map(str, args)
        command = [sys.executable]
        if config is not None:
            command += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
            command += ["--config_file", str(KIT / "accelerate_configs" / config)]
        command += [str(KIT / script), *flags]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def finish(self) -> Result:
        """Wait for the launcher and for its processes, which share its streams."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return Result(self.process.returncode, out, err)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The pids of a process's own: what a launcher launched, a DataLoader's workers."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def launch(config: str, *args: object, cwd: Path, env: dict[str, str] | None = None) -> Result:
    return Launched(config, *args, cwd=cwd, env=env).finish()


def error_line(result: Result) -> str:
    """The one line on stderr of a process that met a mistake of the user's."""
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1, result
    assert ": error: " in lines[0]
    return lines[0]


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every TensorBoard curve of a folder, as TensorBoard shows it."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def differences(one: object, other: object, where: str = "") -> Iterator[str]:
    """The places where two checkpoints, or parts of them, do not have the same bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield where
        for number, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}/{number}")
    elif type(one) is not type(other) or one != other:
        yield where


def differing(one: Path, other: Path) -> list[str]:
    """Where two runs differ: their latest checkpoints, which are named, and the curves beside."""
    logs = [path.with_name(path.stem.replace("checkpoint", "logs")) for path in (one, other)]
    curves = [scalars(folder) for folder in logs]
    for curve in curves:
        curve.pop(MEASURED, None)
    contents = [{**read(path), "best_file": ""} for path in (one, other)]  # a name, and no bits
    return [*differences(contents[0], contents[1]), *differences(curves[0], curves[1], "curve ")]


def same_bits(one: Path, other: Path) -> None:
    assert differing(one, other) == []


def image(seed: object, side: int = 64, mode: str = "RGB") -> Image.Image:
    rng = random.Random(str(seed))
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
    return small.resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def make_dataset(
    root: Path,
    layout: str = "tiny",
    classes: int = 3,
    train: int = 8,
    val: int = 10,
    side: int = 64,
) -> Path:
    """A small dataset: `tiny` (Tiny-ImageNet's own layout), `sorted` or `plain`.

    The images and their classes are the same in every layout; validation image i belongs to
    class i % classes.
    """
    names = [f"n0000000{c}" for c in range(classes)]
    lines = []
    for c, name in enumerate(names):
        folder = root / "train" / name / ("" if layout == "plain" else "images")
        folder.mkdir(parents=True)
        for i in range(train):
            mode = "L" if i == 1 else "RGB"
            image((c, i), side, mode).save(folder / f"{name}_{i}.JPEG")
    for i in range(val):
        name = names[i % classes]
        folder = {
            "tiny": root / "val" / "images",
            "sorted": root / "val" / name / "images",
            "plain": root / "val" / name,
        }[layout]
        folder.mkdir(parents=True, exist_ok=True)
        image(("val", i), side).save(folder / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
    if layout == "tiny":
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def make_corpus(root: Path, train: int = 2000, valid: int = 700, test: int = 500) -> Path:
    """Text of so many words, in which a word hints at the next; test/ has some of its own."""
    root.mkdir(parents=True)
    rng = random.Random("corpus")
    for part, count in (("train", train), ("valid", valid), ("test", test)):
        word, words = 0, []
        for _ in range(count):
            word = (word * 3 + rng.choice([1, 1, 1, 2, 5])) % 37
            words.append(f"{part}{word}" if word == 36 else f"word{word}")
        lines = [" ".join(words[i : i + 19]) for i in range(0, count, 19)]
        (root / f"{part}.txt").write_text("".join(f" {line} \n" for line in lines))
    return root
