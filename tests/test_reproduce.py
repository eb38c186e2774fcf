"""The report: its commands run once, its pages are whole, and what fails is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest
from kit import error_line, make_corpus, make_dataset, run

import reproduce
from engine.checkpoints import load
from engine.cli import UserError
from engine.curves import read_curves
from engine.stop import Stopped
from report import plan, steps
from report.figures import read_answers

CHROMIUM = next(filter(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome")), "")
IMAGE = "images/train/n00000001/images/n00000001_0.JPEG"
IMAGES = [f"images/val/images/val_{i}.JPEG" for i in range(10)]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200"/>'
FLAGS = ["--data", "images", "--text", "text", "--epochs", "2", "--text-epochs", "1"]
FLAGS += ["--image-flags=--image-size 32 --stem stock -b 8 --lr 0.01"]
FLAGS += ["--text-flags=--emsize 8 --nhid 8 --batch_size 4 --bptt 5 --dropout 0.1"]


def make_execute(executed: list[list[str]], broken: set[str]) -> Callable[..., int]:
    """Runs a command as a process of the tests, which need not import torch; `broken` ones fail.

    There is no dot.
    """

    def execute(command: list[str], log: Path, watch: Callable[[str], None]) -> int:
        executed.append(command)
        log.parent.mkdir(exist_ok=True)
        if broken & {*command}:
            log.write_text("line 1\nline 2\nsomething is wrong\n")
            return 7
        if command[-1].endswith("cpu4-seed1"):  # without a launcher it is cpu-seed1 once more
            shutil.copytree(command[-1].replace("cpu4", "cpu"), command[-1])
            return 0
        start = next(i for i, word in enumerate(command) if word.endswith(".py"))
        path = str(Path(command[start]).resolve())
        done = run(path, *command[start + 1 :], cwd=Path(), env={"PATH": "/nowhere"})
        with log.open("a") as file:
            file.write(done.out + done.err)
        return done.code

    return execute


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What was executed and reported where the CNN fails and dot is missing, once both work, and
    where no curve can be drawn and a sample has gone."""
    folder = tmp_path_factory.mktemp("report")
    make_dataset(folder / "images", train=4)
    make_corpus(folder / "text", test=250)
    found: dict[str, str] = {"folder": str(folder)}

    def leave(code: int) -> None:
        raise SystemExit(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plan, "emulates_bf16", lambda _device: True)
        patch.setattr("engine.stop.leave", leave)
        patch.setattr(plan, "LANGUAGE_MODELS", {"Transformer": 5, "CNN": 20})
        for name, broken in (("first", {"CNN"}), ("again", set()), ("third", set())):
            if name == "third":
                shutil.copytree("output", "good")
                patch.setattr(reproduce, "draw_curves", lambda *_: os.environ["NO CURVE\nAT ALL"])
                Path("output/report/transformer-seed1.txt").unlink()
                Path("output/report/report/context.png").unlink()
            executed: list[list[str]] = []
            patch.setattr(steps, "execute", make_execute(executed, broken))
            try:
                reproduce.main(FLAGS)
                found[f"{name} code"] = "0"
            except SystemExit as left:
                found[f"{name} code"] = str(left.code)
            found[f"{name} executed"] = "\n".join(map(" ".join, executed))
            found[name] = Path("output/report/report.md").read_text()
            # What dot would draw, between the two reports.
            Path("output/report/report/transformer.svg").write_text(SVG)
        shutil.rmtree("output")
        Path("good").rename("output")
        with pytest.raises(UserError, match="holds a report made with --epochs 2: repeat that"):
            reproduce.main([*FLAGS, "--epochs", "3"])
        for flag, path in (("text", "text/test.txt"), ("data", IMAGE)):
            before = Path(path).read_bytes()
            Path(path).write_bytes(before + b" ")
            with pytest.raises(
                UserError, match=f"output/report is of other files in --{flag}: choose"
            ):
                reproduce.main(FLAGS)
            Path(path).write_bytes(before)
        with pytest.raises(
            UserError, match=r"text holds what this script did not write \(test.txt"
        ):
            reproduce.main([*FLAGS, "--output-dir", "text"])
    return found


def test_a_failure_is_named_with_its_log_and_the_rest_appears(reports: dict[str, str]) -> None:
    report = reports["first"]
    assert reports["first code"] == "1"
    assert "**CNN-seed1 failed with exit code 7: see output/report/logs/CNN-seed1.log.**" in report
    assert "line 2\nsomething is wrong" in report
    for text in ("block 4        256×2×2 → 512×1×1", "Parameters: 11,178,051", "a - b = "):
        assert text in report
    for file in ("loss.png", "acc1.png", "disagreements.jpg", "transformer.gv", "context.png"):
        assert f"](report/{file})" in report
    folder = "output/report/report"
    assert f"dot -Tsvg {folder}/transformer.gv -o {folder}/transformer.svg" in report
    assert "the Transformer needs the last " in report
    assert "the CNN" not in report


def test_what_cannot_be_shown_is_named_and_the_rest_appears(reports: dict[str, str]) -> None:
    report = reports["third"]
    assert reports["third executed"] == ""
    assert reports["third code"] == "1"
    assert report.count("**What belongs here failed: KeyError: ") == 2  # of images, of text
    assert "**What belongs here failed: FileNotFoundError: " in report  # the Transformer's text
    for text in ("Parameters: 11,178,051", "a - b = ", "the Transformer needs the last "):
        assert text in report
    assert "loss.png" not in report and "](report/context.png)" in report


def test_the_same_command_does_what_is_missing_and_nothing_else(reports: dict[str, str]) -> None:
    first, again = (reports[f"{n} executed"].splitlines() for n in ("first", "again"))
    assert len(first) == 18
    assert [re.findall(r"(\w+)\.py", line)[0] for line in again] == [
        *("lm_main", "lm_main", "lm_generate", "lm_context")
    ]
    assert again[0] in first
    assert reports["again code"] == "0"
    report = reports["again"]
    assert "failed" not in report
    assert "](report/transformer.svg)" in report and "transformer.gv" not in report
    for command in (*first[:-1], *again):
        assert command in report.replace("'", "")


def test_the_tables_hold_the_runs_figures(reports: dict[str, str]) -> None:
    folder, report = Path(reports["folder"]) / "output" / "report", reports["again"]
    titles = {"cpu-seed1": "one process", "cpu-seed2": "another seed"}
    titles |= {"cpu4-seed1": "four processes", "parts4-seed1": "four parts"}
    for name, title in titles.items():
        acc1 = read_curves(folder / name / "logs")["Acc@1/val"][1]
        assert f"| {title} | {acc1:.1f} | " in report
        answers = read_answers(folder / "answers" / f"{name}.csv", IMAGES)
        right = sum(a == f"n0000000{i % 3}" for i, a in enumerate(answers))
        assert 100 * right / len(IMAGES) == pytest.approx(acc1)
    for model in ("Transformer", "CNN"):
        row = next(line for line in report.splitlines() if line.startswith(f"| {model} | "))
        logs = [(folder / "logs" / f"{model}-seed{seed}.log").read_text() for seed in (1, 2)]
        least, most = sorted(float(re.findall(r"test ppl +(\S+)", log)[-1]) for log in logs)
        assert f" ({least:.1f} to {most:.1f}) |" in row
    assert "of 7, its receptive field (95 % interval " in report


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium-headless-shell")
def test_a_browser_shows_every_picture_and_table_on_a_phone(
    reports: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(reports["folder"]) / "output" / "report"
    page = tmp_path / "alone.html"  # away from the pictures' folder
    probe = """<script>parent.document.title = JSON.stringify({
        pictures: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
        tables: [...document.querySelectorAll("table")].map(t => [t.rows.length,
            new Set([...t.rows].map(r => r.cells.length)).size, t.offsetWidth]),
        headings: [...document.querySelectorAll("h1, h2")].length,
        width: document.documentElement.scrollWidth,
        left: document.body.innerText.includes("| --- |") })</script>"""
    html = (folder / "report.html").read_text().replace("</body>", f"{probe}</body>")
    # A phone's width. Some versions of Chromium have no window below 500 pixels, but frames.
    page.write_text(f'<title></title><iframe width="400" height="800" srcdoc="{escape(html)}">')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    match = re.search(r"<title>(.*?)</title>", dom)
    assert match is not None
    seen = json.loads(match[1])
    assert len(seen["pictures"]) == 9 and min(seen["pictures"]) > 100
    assert seen["headings"] == 7 and seen["width"] <= 400
    assert len(seen["tables"]) == 4 and not seen["left"]
    for rows, widths, pixels in seen["tables"]:
        assert rows > 2 and widths == 1 and pixels > 100
    for picture in (folder / "report").glob("*.[jps]*g"):
        assert picture.stat().st_size < 300_000


def test_a_signal_stops_a_launched_training_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_corpus(tmp_path / "text", train=9000)
    flags = ["--data", "text", *FLAGS[-1].removeprefix("--text-flags=").split()]
    command = steps.launched("cpu", "lm_main.py", *flags, "--checkpoint-every", "5")
    latest = Path("model.checkpoint.pt")

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum)

    def send() -> None:
        while not latest.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, stop)
    threading.Thread(target=send, daemon=True).start()
    try:
        with pytest.raises(Stopped):
            steps.execute(command, tmp_path / "logs" / "log", lambda _said: None)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert "saved to model.checkpoint.pt" in (tmp_path / "logs" / "log").read_text()
    assert load(latest)["epoch"] == 0


def test_one_part_is_run_alone_and_kept_for_the_whole(tmp_path: Path) -> None:
    result = run("reproduce.py", "--only", "sizes", cwd=tmp_path)
    assert result.code == 0, result
    page = (tmp_path / "output" / "report" / "report.md").read_text()
    assert re.findall("^## (.)", page, re.MULTILINE) == ["1"]
    assert page.split("```")[1].rstrip().endswith(" --only sizes")
    assert "'nothing'" in error_line(run("reproduce.py", "--only", "nothing", cwd=tmp_path))


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text("[]")
    result = run("reproduce.py", "--output-dir", "out", cwd=tmp_path)
    assert "out/state.json is damaged or another program's" in error_line(result)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ('--image-flags=a "b', "--image-flags 'a \"b': No closing quotation"),
        ("--text-flags=--log-dir X", "'--log-dir X': reproduce.py sets --log-dir itself"),
        ("--image-flags=-a resnet19", "unknown architecture 'resnet19': did you mean resnet1"),
        ("--image-flags=-b 9", "9 cannot be cut into 4 equal parts"),
        ("--image-flags=--seed 3", "reproduce.py sets --seed, by --seeds: leave it out"),
        ("--text-flags=--nhead 3", "--emsize 200 cannot be divided by --nhead 3"),
        ("--text-flags=--tied --nhid 8", "--tied needs --nhid equal to --emsize"),
        ("--image-flags=--output-dir X", "reproduce.py sets --output-dir itself: leave it out"),
        ("--image-flags=-e", "sets --evaluate itself"),
        ("--image-flags=X -b 9", "sets --data itself"),
        ("--image-flags=--resume auto", "sets --resume itself"),
        ("--image-flags=-b 0", "--image-flags '-b 0': argument -b/--batch-size: must be at least"),
        ("--text-flags=--model GRU", "sets --model itself"),
        ("--text-flags=--save=x.pt", "sets --save itself"),
        ("--text-flags=--epochs 9", "sets --epochs itself"),
        (
            "--text-flags=--nhidden 9",
            r"unrecognized arguments: --nhidden 9 \(see lm_main.py --help",
        ),
        ("--data=empty", "dataset empty: has no folder train/"),
    ],
)
def test_flags_that_the_report_cannot_follow_are_refused_before_anything_is_run(
    flag: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        reproduce.main([flag])
    assert not [*tmp_path.glob("output/report/logs")]
