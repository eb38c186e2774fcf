"""That the benchmarks run and report; never how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import KIT, PATIENCE, make_dataset

FLAGS = {
    "lm_throughput.py": "--model CNN --only training --precision bf16 --words 50 --emsize 8 "
    "--nhid 8 --steps 2",
    "resnet_throughput.py": "--data images --image-size 32 --stem stock -b 4 --steps 1 "
    "--precision no --only training loading --decode-once 40",
    "generate_latency.py": "--model CNN --words 50 --emsize 8 --nhid 8 --lengths 3 40",
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of each benchmark's --json, every one of which is in its tables, too.

    Run side by side: their time is that of importing torch in many processes.
    """
    folder = tmp_path_factory.mktemp("benchmarks")
    make_dataset(folder / "images", "plain", val=4, side=160)
    running = {}
    for script, flags in FLAGS.items():
        command = [sys.executable, str(KIT / "benchmarks" / script), *flags.split()]
        running[script] = subprocess.Popen(
            [*command, "--rounds", "1", "--json", f"{script}.json"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = {}
    for script, process in running.items():
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        found[script] = json.loads(Path(folder / f"{script}.json").read_text())["rows"]
        for row in found[script]:
            assert f"\n{row['title']} " in out
            assert f"\n{row['name']} " in out
            assert row["median"] > 0
    return found


Reports = dict[str, list[dict[str, Any]]]


def test_language_models(reports: Reports) -> None:
    rows = reports["lm_throughput.py"]
    assert [row["name"] for row in rows] == ["reference float32", "kit bfloat16", "floor bfloat16"]
    assert all(row["peak_bytes"] > 0 and row["gflops"] > 0 for row in rows)
    assert rows[1]["of_floor"] > 0


def test_image_classifiers(reports: Reports) -> None:
    rows = reports["resnet_throughput.py"]
    assert [(row["title"], row["name"]) for row in rows] == [
        ("training", "reference float32"),
        ("training", "kit float32"),
        ("training", "floor float32"),
        ("loading", "PIL workers"),
        ("loading", "kit"),
        ("loading", "kit, --decode-once"),
        ("loading", "kit, building its cache"),
    ]
    assert rows[0]["ratio"] == 1
    assert rows[0]["of_floor"] > 0 and rows[1]["of_floor"] > 0


def test_generation(reports: Reports) -> None:
    rows = reports["generate_latency.py"]
    titles = ["CNN, 3 words", "CNN, 40 words"]
    assert [row["title"] for row in rows] == [title for title in titles for _ in range(3)]
    assert [row["name"] for row in rows] == ["reference", "kit", "floor"] * 2
