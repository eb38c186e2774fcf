"""What a benchmark prints, and its --json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import rounds
import torch
from rounds import LESS_IS_BETTER, Row

# Head and width of the columns after a row's name; the first has the unit as its head.
COLUMNS = (
    *(("", 12), ("min", 12), ("max", 12)),
    *(("× first", 10), ("min", 9), ("max", 9)),
    *(("MB", 8), ("GFLOP/s", 9), ("of floor", 10)),
)


def spread(figures: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(figures), min(figures), max(figures)


def report(rows: Sequence[Row], notes: Sequence[str], args: argparse.Namespace) -> None:
    """Print tables, one a title, and write --json."""
    machine = describe_machine()
    print(", ".join(machine.values()))
    for title in dict.fromkeys(row.title for row in rows):
        table = [row for row in rows if row.title == title]
        heads = "".join(f"{head or table[0].unit:>{width}}" for head, width in COLUMNS)
        print(f"\n{title:24}{heads}")
        for row in table:
            digits = 2 if row.unit in LESS_IS_BETTER else 0
            cells = [f"{figure:,.{digits}f}" for figure in spread(row.rounds)]
            cells += [f"{ratio:.2f}" for ratio in spread(row.ratios)] if row.ratios else [""] * 3
            cells.append(f"{row.peak_bytes / 1e6:,.0f}" if row.peak_bytes else "")
            cells.append(f"{row.gflops:,.0f}" if row.gflops is not None else "")
            cells.append(f"{row.of_floor:.0%}" if row.of_floor is not None else "")
            padded = [f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
            print(f"{row.name:24}{''.join(padded)}".rstrip())
    print("\n" + "\n".join(notes))
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        found = [
            {
                **row._asdict(),
                "median": statistics.median(row.rounds),
                "ratio": statistics.median(row.ratios) if row.ratios else None,
            }
            for row in rows
        ]
        content = {"machine": machine, "arguments": settings, "notes": list(notes), "rows": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def describe_machine() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    if not rounds.on_cpu():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
        name = names[0].split(":")[1].strip() if names else name
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return {"device": name, "threads": threads, "torch": f"torch {torch.__version__}"}
