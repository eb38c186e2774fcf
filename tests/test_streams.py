"""What is printed, and to whom, neither ends a run nor changes it."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit import KIT, PATIENCE, Result, Running, differences, make_corpus, read, run

from engine import streams

FLAGS = ["--data", "textö", "--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5"]
FLAGS += ["--log-interval", "1", "--epochs", "1"]
LAST = "| End of training | test loss "


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    make_corpus(folder / "textö", train=1500, valid=100, test=100)
    assert run("lm_main.py", *FLAGS, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """Where a disturbed run has to end with the same weights."""
    (tmp_path / "textö").symlink_to(undisturbed / "textö")
    yield tmp_path
    expected, found = (read(f / "model.checkpoint.pt") for f in (undisturbed, tmp_path))
    assert list(differences(expected, found)) == []


def train(
    folder: Path, out: Path | None, err: Path | None = None, env: dict[str, str] | None = None
) -> Running:
    for path in folder.glob("model*"):  # of the test's first run
        path.unlink() if path.is_file() else shutil.rmtree(path)
    into = (out, err or folder / ".stderr")
    return Running("lm_main.py", *FLAGS, cwd=folder, env=env or {}, streams=into)


def test_a_stream_that_is_closed(folder: Path) -> None:
    process = Running("lm_main.py", *FLAGS, cwd=folder, env={}, streams=(None, None))
    assert process.finish().code == 0
    files = [path for path in folder.iterdir() if path.is_file()]
    # Each has its own number: what libraries print on 1 and 2 has reached none of them.
    names = sorted(path.name for path in files)
    assert names == [
        ".model.checkpoint.pt.lock",
        ".stderr",
        ".stdout",
        "model.checkpoint.pt",
        "model.pt",
    ]
    assert train(folder, None).finish() == Result(0, "", "")


def test_a_full_disk_is_one_line(folder: Path) -> None:
    result = train(folder, Path("/dev/full")).finish()
    assert result.code == 0
    assert result.err == "lm_main.py: what is printed gets lost (No space left on device)\n"
    both = train(folder, Path("/dev/full"), Path("/dev/full")).finish()
    assert both.code == 0


def test_a_reader_that_goes(folder: Path) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    process = train(folder, pipe)
    with pipe.open() as reader:
        assert reader.readline().startswith("=> 1 process on CPU")
    assert process.finish() == Result(0, "", "")
    process = train(folder, folder / ".stdout", pipe)
    pipe.open().close()
    result = process.finish()
    assert result.code == 0
    assert LAST in result.out


def test_a_pipe_that_does_not_block() -> None:
    """As another process may leave it: nothing is lost where its reader is slow."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "".join(f"line {i}\n" for i in range(50_000))  # several times a pipe's size
    with ThreadPoolExecutor(1) as pool, open(writer, "wb", buffering=0) as raw:  # noqa: PTH123
        printed = pool.submit(streams._Stream(raw).write, text.encode())
        found = b""
        while len(found) < len(text):
            time.sleep(0.01)
            found += os.read(reader, 1 << 16)
        assert printed.result() == len(text)
    os.close(reader)
    assert found.decode() == text


def test_a_terminal_that_is_closed(folder: Path) -> None:
    """With a progress bar on it, and lines between."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    terminal = Path(os.ttyname(theirs))
    process = train(folder, terminal, terminal)
    shown = b""
    while b"epoch 1:" not in shown:
        shown += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    assert process.finish().code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, folder: Path) -> None:
    process = train(folder, folder / ".stdout", env={"PYTHONIOENCODING": encoding})
    process.process.join(PATIENCE)
    assert process.process.exitcode == 0
    text = (folder / ".stdout").read_text(encoding)
    assert ("text\\xf6" if encoding == "ascii" else "textö") in text
    assert LAST in text


NOTEBOOK = """
import io, runpy, signal, sys

class Cell(io.TextIOBase):
    text = ""
    def write(self, text):
        self.text += text
        return len(text)

cell, python, sys.ps1 = Cell(), sys.stdout, "In : "
script, *argv = sys.argv[1:]
for save in "again.pt", "model.pt":
    sys.argv, sys.stdout = [script, *argv, "--save", save], cell
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        sys.stdout = python
        print(end.code, cell.text.splitlines()[-2], signal.getsignal(signal.SIGINT).__name__)
"""


def test_a_notebook_goes_on_after_its_cell(folder: Path) -> None:
    (folder / "notebook.py").write_text(NOTEBOOK)
    script = KIT / "lm_main.py"
    result = run(str(folder / "notebook.py"), script, *FLAGS, cwd=folder)
    lines = result.out.splitlines()
    assert len(lines) == 2, result
    for line in lines:
        assert line.startswith(f"0 {LAST}") and line.endswith("default_int_handler")


def test_ctrl_c_ends_the_reader_as_well(undisturbed: Path, tmp_path: Path) -> None:
    """`python lm_main.py | tee log`: the last evaluation goes to stderr, and the code is 75."""
    command = f"trap : INT; {sys.executable} {KIT / 'lm_main.py'} {' '.join(FLAGS)} "
    command += "--epochs 99 | tee log; echo ${PIPESTATUS[0]} > code"
    (tmp_path / "textö").symlink_to(undisturbed / "textö")
    with (tmp_path / "err").open("w") as err:
        shell = subprocess.Popen(
            ["bash", "-c", command],
            cwd=tmp_path,
            stderr=err,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            # The tests may run in the background, where Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not (tmp_path / "model.checkpoint.pt").exists():
            time.sleep(0.05)
        os.killpg(shell.pid, signal.SIGINT)
        assert shell.wait(PATIENCE) == 0
    assert (tmp_path / "code").read_text() == "75\n"
    found = (tmp_path / "err").read_text()
    assert LAST in found and "Traceback" not in found
    assert found.endswith("=> stopped by SIGINT, exit code 75: --resume auto goes on\n")


def test_where_the_text_is_what_the_command_is_for_its_loss_is_an_error(undisturbed: Path) -> None:
    for script, *flags in (
        ("lm_generate.py", "--outf", "-", "--words", 50),
        ("model_summary.py",),
        ("model_summary.py", "--json"),
    ):
        for out, why in ((Path("/dev/full"), "No space left on device"), (None, "it is closed")):
            into = (out, undisturbed / ".stderr")
            process = Running(script, *flags, cwd=undisturbed, env={}, streams=into)
            result = process.finish()
            assert result.code == 2, result
            last = result.err.splitlines()[-1]
            assert last == f"{script}: error: cannot write to standard output: {why}"
