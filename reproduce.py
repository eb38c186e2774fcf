"""Reproduce the whole report: train, compare and describe, by the kit's own commands.

    python reproduce.py                                  # built-in data: output/report/report.html
    python reproduce.py --data data/tiny-imagenet-200 --text data/wikitext-2 --epochs 30 \\
        --text-epochs 6 --image-flags "-b 256 --lr 0.1" --output-dir output/full

Image classifiers are trained in each way that the machine allows (a CPU with one process, with
four and in bf16, one GPU, four), language models of three kinds once each. The commands and what
they printed are in logs/. Interrupted, the same command goes on: what is done is not done again.
What fails is named, a command with its log, and the rest of the report still appears.
"""

from __future__ import annotations

from engine import stop  # before slow imports: see engine/stop.py

# isort: split

import argparse
import base64
import contextlib
import hashlib
import json
import mimetypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from engine.cli import ArgumentParser, UserError, nonempty, pathname, positive_int

SECTIONS = ("sizes", "images", "text")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", type=nonempty, default="sample", metavar="DIR", help="images for resnet_main.py")
    add("--text", type=nonempty, default="sample", metavar="DIR", help="corpus for lm_main.py")
    add("--epochs", type=positive_int, default=4, metavar="N", help="of the image classifiers")
    add("--text-epochs", type=positive_int, default=4, metavar="N", help="of the language models")
    add("--image-flags", default="--stem stock -b 32 --lr 0.02 --lr-schedule cosine --seed 1",
        metavar="FLAGS", help="more flags of resnet_main.py")
    add("--text-flags", default="--seed 1111", metavar="FLAGS", help="more flags of lm_main.py")
    add("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS],
        help="parts to run; what the others have made stays for the next report")
    add("--output-dir", type=pathname, default=Path("output/report"), metavar="DIR",
        help="for report.md, report.html and all that the commands write")
    # fmt: on
    return parser


if __name__ == "__main__":
    stop.check_flags(make_parser(), alone=True)


import markdown
import torch
from PIL import Image
from tqdm import tqdm

import lm_main
import resnet_main
from diff_eval import SHEET
from engine.curves import Curve, draw_curves, read_curves
from engine.files import check_writable, writing
from engine.launch import emulates_bf16
from image_classification.folders import find_images
from lm_context import PICTURE as CONTEXT_PICTURE
from word_language_model.data import corpus_files

KIT = Path(__file__).resolve().parent
TRAININGS = {
    "cpu": "CPU, one process",
    "cpu4": "CPU, four processes",
    "cpu_bf16": "CPU, bf16",
    "gpu1": "one GPU",
    "gpu4": "four GPUs",
}
LANGUAGE_MODELS = {"Transformer": 5, "LSTM": 20, "CNN": 20}  # and their learning rates
# Variables of a launcher, which may have started this script. Its commands must not see them.
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
# Flags of the trainings that are this script's to set, or whose files it would not find.
OWN_FLAGS = {"data", "dummy", "model", "epochs", "evaluate", "dry_run", "resume", "overwrite"}
OWN_FLAGS |= {"output_dir", "save", "log_dir", "onnx_export"}
METRICS = {"Loss": 3, "Acc@1": 1, "Acc@5": 1}  # and their decimals
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 90% }
td, th { border: 1px solid #bbb; padding: 3px 8px }
pre { background: #f4f4f4; padding: 8px; white-space: pre-wrap } img { max-width: 100% }
p:has(img) { max-height: 48em; overflow: auto }
"""


class Report:
    """The commands that were run so far, kept in state.json, and the pages that they make."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.output_dir
        self.pictures = self.folder / "report"
        self.sections: list[str] = []
        self.failures: list[str] = []  # of this call
        check_writable(self.folder, "--output-dir")
        own = ("output_dir", "only")  # may differ from call to call
        settings = {key: value for key, value in vars(args).items() if key not in own}
        self.state: dict[str, Any] = {"settings": settings, "files": {}, "steps": {}}
        self.state_path = self.folder / "state.json"
        if not self.state_path.exists():
            if foreign := sorted(path.name for path in self.folder.iterdir()):
                raise UserError(
                    f"{self.folder} holds what this script did not write ({foreign[0]}): choose "
                    "another --output-dir"
                )
            self.keep_state()
        try:
            self.state = json.loads(self.state_path.read_text())
            before, known, _ = (self.state[key] for key in ("settings", "files", "steps"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.state_path} is damaged or another program's: move it away"
            ) from error
        for key, value in settings.items():
            if (found := before.get(key)) != value:
                raise UserError(
                    f"{self.folder} holds a report made with --{key.replace('_', '-')} "
                    f"{shlex.quote(str(found))}: repeat that, or choose another --output-dir"
                )
        for key, identity in identities(args).items():
            if known.setdefault(key, identity) != identity:
                raise UserError(
                    f"{self.folder} is of other files in --{key}: choose another --output-dir"
                )

    def keep_state(self) -> None:
        with writing(self.state_path) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1))

    def add(self, *parts: str) -> None:
        self.sections += parts

    def attempt(self, part: Callable[..., None], *args: object) -> None:
        """Let `part` add to the page; what fails there is named, and the page goes on after it."""
        try:
            part(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            title = next(text for text in reversed(self.sections) if text.startswith("#"))
            self.failures.append(f"{title.strip('# ')}: {reason}")
            self.add(f"**What belongs here failed: {reason}.**")

    def run(self, commands: Mapping[str, list[str]]) -> list[str]:
        """Run the commands that are not done, and show all; returns the successful ones' names.

        The page names a command that fails, and shows the last lines of its log.
        """
        self.add(fenced("\n".join(map(shlex.join, commands.values()))))
        steps = self.state["steps"]
        for name, command in commands.items():
            shown, step = shlex.join(command), steps.setdefault(name, {"seconds": 0.0})
            print(f"=> {shown}")
            if (step.get("command"), step.get("code")) == (shown, 0):
                print("   done before")
                continue
            started = time.time()
            step |= {"command": shown, "code": -1}
            try:
                step["code"] = execute(command, self.log(name))
            finally:  # a training that is stopped goes on later, and its time counts
                step["seconds"] += time.time() - started
                self.keep_state()
            failure = f"failed with exit code {step['code']}: see {self.log(name)}"
            print(f"   {failure}" if step["code"] else f"   {step['seconds']:.0f} s")
            if step["code"]:
                self.failures.append(f"{name} {failure}")
                last = self.log(name).read_text("utf-8", "replace").splitlines()[-5:]
                self.add(f"**{name} {failure}.** It ends with:", fenced("\n".join(last)))
        return [name for name in commands if steps[name]["code"] == 0]

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def saved(self, model: str) -> Path:
        return self.folder / f"{model.lower()}.pt"

    def output(self, name: str, start: str) -> str:
        """What a command said last, from the line that begins with `start`, without its files."""
        text = "\n" + self.log(name).read_text("utf-8", "replace")
        return text[text.rindex(f"\n{start}") :].strip("\n").partition("\n=> ")[0]

    def write(self) -> Path:
        """Write report.md, and with all pictures in it report.html."""
        text = "\n\n".join(self.sections) + "\n"
        with writing(self.folder / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        body = markdown.markdown(text, extensions=["tables", "fenced_code"])

        def embed(match: re.Match[str]) -> str:
            path = self.folder / match[1]
            if not path.is_file():
                return match[0]
            kind = mimetypes.guess_type(path)[0]
            return f'src="data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"'

        body = re.sub('src="([^"]+)"', embed, body)
        path = self.folder / "report.html"
        with writing(path) as temporary:
            temporary.write_text(
                "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
                f"<title>Report</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n",
                encoding="utf-8",
            )
        return path


def identities(args: argparse.Namespace) -> dict[str, str]:
    """Tells the files of --data and --text that are there from others, by names and sizes."""
    paths = {"data": [], "text": [path for _, path in corpus_files(args.text) if path.is_file()]}
    if Path(args.data).exists():
        found = find_images(Path(args.data))
        paths["data"] = [Path(path) for path in found.train.paths + found.val.paths]
    sizes = {key: [(str(path), path.stat().st_size) for path in paths[key]] for key in paths}
    return {key: hashlib.sha256(repr(s).encode()).hexdigest()[:24] for key, s in sizes.items() if s}


def refuse_own_flags(flag: str, text: str, training: ModuleType) -> None:
    """Raise `UserError` unless `text`, which is of `flag`, is flags of `training` and not OWN."""
    parser: ArgumentParser = training.make_parser()
    parser.prog = f"{training.__name__}.py"
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that what is parsed is what is given
    try:
        given = vars(parser.parse_args(shlex.split(text), argparse.Namespace()))
        for name in sorted(OWN_FLAGS & given.keys()):
            raise ValueError(f"reproduce.py sets --{name.replace('_', '-')} itself: leave it out")
    except (UserError, ValueError) as error:  # the latter also of a quotation mark not closed
        raise UserError(f"{flag} {shlex.quote(text)}: {error}") from error


def execute(command: list[str], log: Path) -> int:
    """Run a command of the kit, its output added to `log`; returns its exit code.

    Raises:
        Stopped: when a signal came; the command has been stopped as well, in order.
    """
    program, *rest = command
    launcher = ["-m", "accelerate.commands.launch"] if program == "accelerate" else []
    argv = [sys.executable, *launcher, *rest[1 if launcher else 0 :]]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    with log.open("a") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            # On a terminal: for how long it has run, and what it says.
            with tqdm(bar_format="   {elapsed} {desc}", leave=False, disable=None) as progress:
                while process.poll() is None:
                    *_, last = ["", *log.read_text("utf-8", "replace").splitlines()]
                    progress.set_description_str(last[:90])
                    time.sleep(0.2)
            return process.returncode
        except stop.Stopped:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            # A launcher ends at once, its training only after it has saved a checkpoint.
            with contextlib.suppress(ProcessLookupError):
                for _ in range(300):
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            raise


def script(name: str, *flags: object) -> list[str]:
    return ["python", os.path.relpath(KIT / name), *map(str, flags)]


def launched(config: str, name: str, *flags: object) -> list[str]:
    # Any free port: several runs can share a machine.
    port = ["--main_process_port", "0"] if "4" in config else []
    yaml = os.path.relpath(KIT / "accelerate_configs" / f"{config}.yaml")
    return ["accelerate", "launch", "--config_file", yaml, *port, *script(name, *flags)[1:]]


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def over_fitting(runs: Mapping[str, dict[str, Curve]]) -> str:
    """Whose validation loss rises from its least by over 1 % while the training loss falls."""
    found = []
    for name, curves in runs.items():
        train, val = curves["Loss/train"], curves["Loss/val"]
        least, last = min(val, key=lambda epoch: val[epoch]), max(val)
        if val[last] > 1.01 * val[least] and train[last] < train[least]:
            found.append(
                f"{name} **over-fits** after epoch {least}: its validation loss rises from "
                f"{val[least]:.3f} to {val[last]:.3f} while its training loss falls from "
                f"{train[least]:.3f} to {train[last]:.3f}."
            )
    return "\n".join(found) or "None of them over-fits."


def last_figures(curves: dict[str, Curve]) -> list[str]:
    """A row of the table: the best epoch, each metric's figures at the last, the gap of Acc@1."""
    acc1 = curves["Acc@1/val"]
    best, last = max(acc1, key=lambda epoch: acc1[epoch]), max(acc1)
    train, val = ({m: curves[f"{m}/{split}"][last] for m in METRICS} for split in ("train", "val"))
    return [
        f"{best} ({acc1[best]:.1f})",
        *(f"{train[m]:.{digits}f} / {val[m]:.{digits}f}" for m, digits in METRICS.items()),
        f"{train['Acc@1'] - val['Acc@1']:+.1f}",
    ]


def add_sizes(report: Report) -> None:
    report.add("## 1. The sizes inside a ResNet-18")
    if report.run({"sizes": script("model_summary.py")}):
        report.add(fenced(report.output("sizes", "resnet18, ")))


def add_trainings(report: Report) -> list[str]:
    """Train in every way that the machine allows; returns the names of the successful ones."""
    args = report.args
    bf16 = not emulates_bf16(torch.device("cpu"))
    gpus = torch.cuda.device_count()
    allowed = ["cpu", "cpu4", *["cpu_bf16"] * bf16, *["gpu1"] * (gpus > 0), *["gpu4"] * (gpus > 3)]
    flags = [args.data, "--epochs", args.epochs, *shlex.split(args.image_flags)]
    flags += ["--resume", "auto", "--output-dir"]
    report.add("## 2. Trainings over each other")
    done = report.run(
        {name: launched(name, "resnet_main.py", *flags, report.folder / name) for name in allowed}
    )
    if missing := [title for name, title in TRAININGS.items() if name not in allowed]:
        report.add(f"Not on this machine: {', '.join(missing)}.")
    return done


def add_curves(report: Report, done: list[str]) -> None:
    runs = {TRAININGS[name]: read_curves(report.folder / name / "logs") for name in done}
    draw_curves(runs, METRICS, report.pictures / "curves.png")
    report.add(
        f"![{', '.join(METRICS)} by epoch](report/curves.png)",
        "Dashed lines are the training images, whose crops and flips make them harder, solid ones "
        "the validation images. Epochs count from 0. The table has the last epoch's figures, "
        "training / validation. Of four processes each normalises its own quarter of a batch by "
        "that quarter's mean and variance (on GPUs `--sync-bn` shares them).",
    )
    rows = []
    for name, (title, curves) in zip(done, runs.items(), strict=True):
        rates = curves["Throughput/train"].values()
        seconds = report.state["steps"][name]["seconds"]
        cost = [f"{seconds:.0f} s", f"{sum(rates) / len(rates):.0f}"]
        rows.append([title, *last_figures(curves), *cost])
    head = ["training", "best epoch (Acc@1)", *METRICS, "gap of Acc@1", "time", "images/s"]
    report.add(table(head, rows), over_fitting(runs))


def add_disagreements(report: Report, trained: list[str]) -> None:
    report.add("## 3. The images on which two of them disagree")
    first, last = (report.folder / name / "model_best.pth" for name in (trained[0], trained[-1]))
    both, wrong = "Images with both models' predictions", "What the last of them gets wrong"
    if len(trained) > 1:
        report.attempt(add_sheet, "disagreements", both, first, last)
    report.attempt(add_sheet, "misclassified", wrong, "--misclassified", last)


def add_sheet(report: Report, name: str, title: str, *flags: object) -> None:
    """Compare models; the contact sheet becomes a small JPEG."""
    folder = report.folder / name
    flags = (*flags, "--data", report.args.data, "--output-dir", folder)
    if report.run({name: script("diff_eval.py", *flags)}):
        path = report.pictures / f"{name}.jpg"
        with Image.open(folder / SHEET) as sheet, writing(path) as temporary:
            sheet.save(temporary, "JPEG", quality=80)
        report.add(fenced(report.output(name, "=> classes")))
        report.add(f"{title}, the surest first:", f"![{title}](report/{path.name})")


def add_language_models(report: Report) -> list[str]:
    """Train the language models; returns those whose training was successful."""
    args = report.args
    config = "cpu" if emulates_bf16(torch.device("cpu")) else "cpu_bf16"
    if torch.cuda.is_available():
        config = "gpu1"
    trainings = {}
    for model, lr in LANGUAGE_MODELS.items():
        flags = ["--data", args.text, "--model", model, "--lr", lr, "--epochs", args.text_epochs]
        flags += [*shlex.split(args.text_flags), "--resume", "auto", "--save", report.saved(model)]
        trainings[model] = launched(config, "lm_main.py", *flags)
    report.add("## 4. Language models")
    return report.run(trainings)


def add_text_curves(report: Report, done: list[str]) -> None:
    rows, runs = [], {}
    for model in done:
        curves = runs[model] = read_curves(report.saved(model).with_suffix(".logs"))
        valid, end = curves["Perplexity/val"], report.output(model, "| End of training")
        least = min(valid, key=lambda epoch: valid[epoch])
        test = re.findall(r"test ppl +(\S+)", end)[0]
        seconds = report.state["steps"][model]["seconds"]
        rows.append([model, least, f"{valid[least]:.2f}", test, f"{seconds:.0f} s"])
    head = ["model", "best epoch", "validation perplexity", "test perplexity", "time"]
    draw_curves(runs, ["Loss"], report.pictures / "text_curves.png")
    picture = "![Loss by epoch](report/text_curves.png)"
    report.add(table(head, rows), picture, over_fitting(runs))
    report.add("A text of each, drawn word by word:")


def add_text(report: Report, model: str) -> None:
    path = report.saved(model).with_suffix(".txt")
    flags = ["--checkpoint", report.saved(model), "--words", 60, "--outf", path]
    if report.run({f"{model} sample": script("lm_generate.py", *flags)}):
        report.add(fenced(path.read_text("utf-8").replace("<eos>", "\n").strip()))


def add_graph(report: Report) -> None:
    report.add("## 5. The Transformer's graph")
    path = report.pictures / "transformer.svg"
    flags = ["--checkpoint", report.saved("Transformer"), "--output", path]
    if report.run({"graph": script("export_graph.py", *flags)}):
        if path.exists():
            report.add(f"![The Transformer's autograd graph](report/{path.name})")
        else:  # for want of Graphviz, which the line tells how to install
            report.add(
                "[Its source](report/transformer.gv):", fenced(report.output("graph", "=> "))
            )


def add_context(report: Report, models: list[str]) -> None:
    report.add("## 6. How do they differ in capturing context?")
    flags = [*map(report.saved, models), "--data", report.args.text]
    flags += ["--output-dir", report.pictures]
    if report.run({"context": script("lm_context.py", *flags)}):
        figures, findings = report.output("context", "Loss of ").split("\n\n")
        report.add(f"![Loss by context, influence by distance](report/{CONTEXT_PICTURE})")
        report.add(fenced(figures), *findings.splitlines())


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    refuse_own_flags("--image-flags", args.image_flags, resnet_main)
    refuse_own_flags("--text-flags", args.text_flags, lm_main)
    report = Report(args)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise stop.Stopped(signum)

    for signum in stop.STOP_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup's
            signal.signal(signum, interrupt)
    gpus = torch.cuda.device_count()
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in report.state["settings"].items()
    ]
    flags += ["--only", *args.only] if args.only != [*SECTIONS] else []
    report.add(
        "# Report",
        f"Images: `{args.data}`; text: `{args.text}`. On {os.cpu_count()} CPU cores and "
        f"{gpus or 'no'} GPU{'s' * (gpus != 1)}, with torch {torch.__version__} and Python "
        f"{platform.python_version()}. This page and all that is in it was made by",
        fenced(shlex.join([*script("reproduce.py"), *flags])),
    )
    try:
        if "sizes" in args.only:
            report.attempt(add_sizes)
        if "images" in args.only and (trained := add_trainings(report)):
            report.attempt(add_curves, trained)
            report.attempt(add_disagreements, trained)
        if "text" in args.only and (models := add_language_models(report)):
            report.attempt(add_text_curves, models)
            for model in models:
                report.attempt(add_text, model)
            if "Transformer" in models:
                report.attempt(add_graph)
            report.attempt(add_context, models)
    except stop.Stopped as stopped:
        print(f"=> {stopped}: the same command goes on from here")
        stop.leave(stop.EXIT_STOPPED)
    path = report.write()
    for failure in report.failures:
        print(f"=> {failure}")
    print(f"=> open {path}")
    if report.failures:
        stop.leave(1)


if __name__ == "__main__":
    stop.run_script(main)
