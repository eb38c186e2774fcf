"""Nothing that a test starts outlives it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from kit import KIT, PATIENCE, make_corpus, make_dataset, wait_for
from processes import marked

FAILING = """
import os, signal, subprocess
from pathlib import Path
from kit import Launched, Running, children, wait_for
from processes import NAME, marked, servers

DATA = Path(__file__).parent
TEXT = ("lm_main.py", "--data", DATA / "text", "--emsize", 8, "--nhid", 8, "--epochs", 99999)
IMAGES = ("resnet_main.py", DATA / "images", "--image-size", 32, "-b", 2, "-j", 1)

def alive():
    return marked(os.environ[NAME]) - servers()

def test_fails(tmp_path):
    (DATA / "mark").write_text(os.environ[NAME])
    one = Running(*IMAGES, cwd=tmp_path, env={})
    wait_for(lambda: children(one.pid))
    assert len(alive()) < 2  # it is two, with a worker process

def test_kills_pytest(tmp_path):
    assert not alive()
    four = Launched("cpu4.yaml", *TEXT, cwd=tmp_path)
    subprocess.Popen("setsid sleep 999 & exec setsid sleep 999", shell=True)
    wait_for(lambda: len(alive()) == 7)  # a launcher, its four, and those
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_failing_test_started_ends_with_it_and_all_ends_with_pytest(tmp_path: Path) -> None:
    make_corpus(tmp_path / "text")
    make_dataset(tmp_path / "images", "plain", train=40, side=160)
    (tmp_path / "test_failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "conftest", "-p"]
    command += ["no:cacheprovider", "--basetemp", "base", "test_failing.py"]
    env = {**os.environ, "PYTHONPATH": f"{KIT}:{KIT / 'tests'}"}
    inner = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "test_failing.py F" in inner.stdout, inner  # and then the second test
    assert inner.returncode == -signal.SIGKILL, inner
    mark = (tmp_path / "mark").read_text()
    wait_for(lambda: not marked(mark))
