"""That the benchmarks run and report; never how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kit import KIT


def rows(script: str, *flags: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Run a benchmark as a user does; the rows of its --json, each of which is in its tables."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(KIT / "benchmarks" / script), "--rounds", "1", *flags]
    result = subprocess.run(
        [*command, "--json", str(report)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    for row in found:
        assert row["title"] in result.stdout
        assert f"\n{row['name']} " in result.stdout
        assert row["median"] > 0
    return found


def test_language_models(tmp_path: Path) -> None:
    flags = "--model LSTM --only training --precision bf16 --words 50 --emsize 8 --nhid 8 --steps 2"
    found = rows("lm_throughput.py", *flags.split(), tmp_path=tmp_path)
    assert [row["name"] for row in found] == ["reference float32", "kit bfloat16", "floor bfloat16"]
    assert all(row["peak_bytes"] > 0 and row["gflops"] > 0 for row in found)
    assert found[1]["of_floor"] > 0
