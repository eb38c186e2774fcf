"""Contestants that take turns, each a process of its own.

A measurement names functions of this folder's modules. `function(**options)` prepares a
contestant and returns its `Round`, which does one round of work and returns its figures, one for
each title. One at a time, in turn: background load hits all contestants equally. A process of its
own gives each its environment and its peak of memory, and keeps the reference free of the kit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
Round = Callable[[], list[float]]
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}  # of accelerate, and torch's names
LESS_IS_BETTER = ("ms a word", "s")
# Prefixes of variables that a shell may have set, and that would change a contestant.
FOREIGN = ("ACCELERATE_", "THP_MEM_ALLOC_ENABLE")


class Contestant(NamedTuple):
    name: str
    target: str  # module:function
    options: dict[str, Any]  # of the function, plain values
    environment: dict[str, str]
    floor: str = ""  # the contestant that bounds this one


class Row(NamedTuple):
    """One contestant's figures; the ratio is how many times as fast as the reference it is.

    peak_bytes is memory above the imported libraries; of_floor a fraction of the floor's speed.
    """

    title: str
    name: str
    unit: str
    rounds: list[float]
    ratios: list[float]
    peak_bytes: int = 0
    gflops: float | None = None
    of_floor: float | None = None


def reference_environment() -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": "true"} if on_cpu() else {}


def kit_environment(precision: str) -> dict[str, str]:
    """What `accelerate launch` gives a process; the rest is the kit's own business."""
    return {"ACCELERATE_MIXED_PRECISION": precision, **reference_environment()}


def floor_environment() -> dict[str, str]:
    """With huge pages: page faults are no part of the arithmetic."""
    return {"THP_MEM_ALLOC_ENABLE": "1", **reference_environment()}


def on_cpu() -> bool:
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return wants_cpu or not torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cpu" if on_cpu() else "cuda")


def synchronise() -> None:
    if not on_cpu():
        torch.cuda.synchronize()


def rate_after_first(sizes: Iterable[int]) -> float:
    """Items a second, from the first batch on; `sizes` yields the size of each batch."""
    rest = iter(sizes)
    next(rest)
    counts: list[int] = []
    elapsed = seconds(lambda: counts.append(sum(rest)))
    return counts[0] / elapsed


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, with what it leaves to a GPU."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def line_up(
    precisions: Sequence[str],
    reference: tuple[str, dict[str, Any]],
    kit: tuple[str, dict[str, Any]],
    floor: tuple[str, dict[str, Any]],
    compiled: bool,
) -> list[Contestant]:
    """The reference, the kit in each precision, and what bounds them; target and options of each.

    The floor's function also gets `dtype`, and the kit's `compiled`: with it each precision has one
    more contestant.
    """
    names = {precision: PRECISIONS[precision] for precision in precisions}
    own = reference_environment()
    return [
        Contestant("reference float32", *reference, own, "floor float32" * ("no" in names)),
        *(
            Contestant(
                f"kit {dtype}{' compiled' * is_compiled}",
                kit[0],
                {**kit[1], "compiled": is_compiled},
                kit_environment(precision),
                f"floor {dtype}",
            )
            for precision, dtype in names.items()
            for is_compiled in (False, True)[: 1 + compiled]
        ),
        *(
            Contestant(f"floor {t}", floor[0], {**floor[1], "dtype": t}, floor_environment())
            for t in names.values()
        ),
    ]


def measure(
    titles: Sequence[str],
    unit: str,
    contestants: Sequence[Contestant],
    rounds: int,
    flops: float = 0.0,
) -> list[Row]:
    """Figures of all contestants; the first is the reference.

    Args:
        titles: of the figures that a round returns.
        flops: floating-point operations of one unit of a figure, e.g. of a token.
    """
    children: list[_Child] = []
    figures: dict[str, list[list[float]]] = {c.name: [] for c in contestants}
    peaks: dict[str, int] = {}
    try:
        for contestant in contestants:
            _say(f"{titles[0]}: preparing {contestant.name}")
            children.append(_Child(contestant))
        for number in range(rounds):
            for child in children:
                name = child.contestant.name
                _say(f"{titles[0]}: round {number + 1} of {rounds}, {name}")
                answer = child.ask({})
                figures[name].append(answer["figures"])
                peaks[name] = answer["peak"]
    finally:
        _say("")
        for child in children:
            child.process.kill()
            child.process.wait()

    rows = []
    for i, title in enumerate(titles):
        own = {name: [figure[i] for figure in history] for name, history in figures.items()}
        for name, _, _, _, floor in contestants:
            rate = statistics.median(own[name])
            rows.append(
                Row(
                    title,
                    name,
                    unit,
                    own[name],
                    speeds(own[name], own[contestants[0].name], unit),
                    peaks[name],
                    rate * flops / 1e9 if flops else None,
                    statistics.median(speeds(own[name], own[floor], unit)) if floor else None,
                )
            )
    return rows


def speeds(own: list[float], other: list[float], unit: str) -> list[float]:
    """How many times as fast `own` is as `other`, round by round."""
    pairs = zip(own, other, strict=True)
    return [b / a if unit in LESS_IS_BETTER else a / b for a, b in pairs]


class _Child:
    """A contestant's process, which works when asked and sleeps otherwise."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        base = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import rounds; rounds.serve()", contestant.target],
            env={**base, **contestant.environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
        )
        self.ask(contestant.options)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send its options at first, then an empty question for every round."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed: its complaints are read below
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.complaints.seek(0)
            code = self.process.wait()
            sys.exit(f"{self.contestant.name}: exit code {code}\n{self.complaints.read()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve() -> None:
    """The child's side: prepare, do a round to warm up, then one for every line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a training prints

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    module, function = sys.argv[1].split(":")
    prepare = getattr(importlib.import_module(module), function)
    importlib.import_module("torch._dynamo")  # which torch's optimizers import when they step
    libraries = _memory("VmRSS")
    work: Round = prepare(**json.loads(sys.stdin.readline()))
    work()
    answer({})
    for _ in sys.stdin:
        figures = work()
        peak = _memory("VmHWM") - libraries if on_cpu() else torch.cuda.max_memory_allocated()
        answer({"figures": figures, "peak": peak})


def _memory(field: str) -> int:
    """Bytes, of this process: VmRSS is what is resident, VmHWM the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def add_arguments(parser: argparse.ArgumentParser, number: Callable[[str], int]) -> None:
    """The flags that all benchmarks have."""
    parser.add_argument("--rounds", type=number, default=5, help="of each contestant")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")


def add_precision(parser: argparse.ArgumentParser, bf16: bool) -> None:
    """By default both precisions, or float32 alone on a device that takes hours in bf16."""
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS) if bf16 else ["no"],
        help="of the kit",
    )


def _say(text: str) -> None:
    """Show on a terminal what is being done; it takes minutes."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
