"""What is printed, and to whom, neither ends a run nor changes it."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import KIT, PATIENCE, Result, Running, differences, make_corpus, read, run

FLAGS = ["--data", "textö", "--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5"]
FLAGS += ["--log-interval", "1", "--epochs", "1"]
LAST = "| End of training | test loss "
FULL, CLOSED = Path("/dev/full"), None


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


def train(folder: Path, out: Path | None, err: Path | None, **env: str) -> Running:
    for path in folder.glob("model*"):  # of the test's first run
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return Running("lm_main.py", *FLAGS, cwd=folder, env=env, streams=(out, err))


def test_a_disk_that_is_full_and_a_stream_that_is_closed(folder: Path) -> None:
    err = folder / ".stderr"
    full = "lm_main.py: what is printed gets lost (No space left on device)\n"
    assert train(folder, FULL, err).finish() == Result(0, "", full)
    assert train(folder, FULL, FULL).finish().code == 0
    assert train(folder, CLOSED, err).finish() == Result(0, "", "")
    assert train(folder, CLOSED, CLOSED).finish().code == 0
    # Each file has its own number: what libraries print on 1 and 2 has reached none of them.
    names = {".model.checkpoint.pt.lock", "model.checkpoint.pt", "model.pt", ".stdout", ".stderr"}
    assert {path.name for path in folder.iterdir() if path.is_file()} == names


def test_a_reader_that_goes(folder: Path) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    process = train(folder, pipe, folder / ".stderr")
    with pipe.open() as reader:
        assert reader.readline().startswith("=> 1 process on CPU")
    assert process.finish() == Result(0, "", "")
    process = train(folder, folder / ".stdout", pipe)
    pipe.open().close()
    result = process.finish()
    assert result.code == 0
    assert LAST in result.out


def test_a_terminal_that_is_closed(folder: Path) -> None:
    """With a progress bar on it, and lines between."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))  # else the bar has no room for its words
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
    process = train(folder, folder / ".out", folder / ".stderr", PYTHONIOENCODING=encoding)
    assert process.finish() == Result(0, "", "")
    text = (folder / ".out").read_text(encoding)
    assert ("text\\xf6" if encoding == "ascii" else "textö") in text
    assert LAST in text


def test_a_pipe_that_does_not_block_loses_no_line() -> None:
    """Another process may leave it so; its reader is slow."""
    code = "import os\nfrom engine.cli import make_unfailing\nmake_unfailing()\n"
    code += "os.set_blocking(1, False)\nfor i in range(50_000): print('line', i)\n"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=KIT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        time.sleep(1)  # so that the pipe is full
        assert process.stdout.read() == "".join(f"line {i}\n" for i in range(50_000))
    assert process.returncode == 0


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
    commands: list[list[object]] = [["lm_generate.py", "--outf", "-", "--words", 50]]
    commands += [["model_summary.py"], ["model_summary.py", "--json"]]
    for script, *flags in commands:
        for out, why in ((FULL, "No space left on device"), (CLOSED, "Bad file descriptor")):
            into = (out, undisturbed / ".stderr")
            result = Running(str(script), *flags, cwd=undisturbed, env={}, streams=into).finish()
            assert result.code == 2, result
            last = result.err.splitlines()[-1]
            assert last == f"{script}: error: cannot write to standard output: {why}"
    # `| head` has seen enough, long before a million words.
    flags = ["--outf", "-", "--words", 1_000_000]
    pipe = undisturbed / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: pipe.open().readline())
    reader.start()
    into = (pipe, undisturbed / ".stderr")
    result = Running("lm_generate.py", *flags, cwd=undisturbed, env={}, streams=into).finish()
    assert result.code == 0 and "error" not in result.err, result


NOTEBOOK = """
import io, runpy, signal, sys

class Cell(io.TextIOBase):
    text = ""
    def write(self, text):
        self.text += text
        return len(text)

cell, python, sys.ps1 = Cell(), sys.stdout, "In : "
script, *argv = sys.argv[1:]
for save in "again.pt", "model.pt", "again.pt":
    sys.argv, sys.stdout = [script, *argv, "--save", save], cell
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        sys.stdout = python
        assert end.__suppress_context__  # IPython fails to show an error with a context
        print(end.code, cell.text.splitlines()[-2], signal.getsignal(signal.SIGINT).__name__)
"""


def test_a_notebook_goes_on_after_its_cell(folder: Path) -> None:
    """Also after a mistake: the third cell trains where the first one did."""
    (folder / "notebook.py").write_text(NOTEBOOK)
    result = run(str(folder / "notebook.py"), KIT / "lm_main.py", *FLAGS, cwd=folder)
    lines = result.out.splitlines()
    assert len(lines) == 3, result
    assert "again.checkpoint.pt is of an earlier run" in result.err
    for code, line in zip((0, 0, 2), lines, strict=True):
        assert line.startswith(f"{code} ") and line.endswith("default_int_handler")
        assert code or line.startswith(f"0 {LAST}")
