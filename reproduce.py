"""Reproduce the whole report: train, compare and describe, by the kit's own commands.

    python reproduce.py                                  # built-in data: output/report/report.html
    python reproduce.py --data data/tiny-imagenet-200 --text data/wikitext-2 --epochs 30 \\
        --text-epochs 6 --image-flags "-b 256 --lr 0.1" --output-dir output/full

Image classifiers are trained in each way that the machine allows (a CPU with one process, with
four and in bf16, one GPU, four), language models of three kinds once each. The commands and what
they printed are in logs/. Interrupted, the same command goes on: what is done is not done again.
A command that fails is named with its log, and the rest of the report still appears.
"""

from __future__ import annotations

from engine.stop import (  # before what is slow: see there
    EXIT_STOPPED,
    STOP_SIGNALS,
    Stopped,
    check_flags,
    leave,
    run_script,
)

# isort: split

import argparse
import base64
import contextlib
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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from engine.cli import ArgumentParser, UserError, nonempty, pathname, positive_int


def words_of_a_shell(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:  # a quotation mark that is not closed
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", type=nonempty, default="sample", metavar="DIR", help="images for resnet_main.py")
    add("--text", type=nonempty, default="sample", metavar="DIR", help="corpus for lm_main.py")
    add("--epochs", type=positive_int, default=4, metavar="N", help="of the image classifiers")
    add("--text-epochs", type=positive_int, default=4, metavar="N", help="of the language models")
    add("--image-flags", type=words_of_a_shell,
        default="--stem stock -b 32 --lr 0.02 --lr-schedule cosine --seed 1",
        metavar="FLAGS", help="more flags of resnet_main.py")
    add("--text-flags", type=words_of_a_shell, default="--seed 1111", metavar="FLAGS",
        help="more flags of lm_main.py")
    add("--output-dir", type=pathname, default=Path("output/report"), metavar="DIR",
        help="for report.md, report.html and all that the commands write")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser(), alone=True)


import markdown
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from diff_eval import SHEET
from engine.files import check_writable, writing
from engine.launch import emulates_bf16
from lm_context import PICTURE as CONTEXT_PICTURE

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
METRICS = {"Loss": 3, "Acc@1": 1, "Acc@5": 1}  # and their decimals
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 90% }
td, th { border: 1px solid #bbb; padding: 3px 8px }
pre { background: #f4f4f4; padding: 8px; white-space: pre-wrap } img { max-width: 100% }
p:has(img) { max-height: 48em; overflow: auto }
"""

Curve = dict[int, float]  # by epoch


class Report:
    """The commands that were run so far, kept in state.json, and the pages that they make."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.output_dir
        self.pictures = self.folder / "report"
        self.sections: list[str] = []
        self.failures: list[str] = []  # of this call
        check_writable(self.folder, "--output-dir")
        settings = {key: value for key, value in vars(args).items() if key != "output_dir"}
        self.state: dict[str, Any] = {"settings": settings, "steps": {}}
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
            before, _ = self.state["settings"], self.state["steps"]
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

    def keep_state(self) -> None:
        with writing(self.state_path) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1))

    def add(self, *parts: str) -> None:
        self.sections += parts

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
        except Stopped:
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


def read_curves(folder: Path) -> dict[str, Curve]:
    """TensorBoard's curves, as it shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def draw_curves(runs: Mapping[str, dict[str, Curve]], metrics: Collection[str], path: Path) -> str:
    """Draw the curves of several runs over each other; returns the picture for report.md."""
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for number, (name, curves) in enumerate(runs.items()):
            for split, style in (("train", "--"), ("val", "-")):
                points = curves.get(f"{metric}/{split}", {})
                marks = {"c": f"C{number}", "ls": style, "marker": ".", "alpha": 0.8}
                axes.plot([*points], [*points.values()], label=f"{name}, {split}", **marks)
        axes.set(title=metric, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    return f"![{', '.join(metrics)} by epoch]({path.parent.name}/{path.name})"


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
    """Train in every way that the machine allows; returns the folders of the successful ones."""
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
    if not done:
        return done
    runs = {TRAININGS[name]: read_curves(report.folder / name / "logs") for name in done}
    report.add(
        draw_curves(runs, METRICS, report.pictures / "curves.png"),
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
    return done


def add_disagreements(report: Report, trained: list[str]) -> None:
    report.add("## 3. The images on which two of them disagree")
    first, last = (report.folder / name / "model_best.pth" for name in (trained[0], trained[-1]))
    if len(trained) > 1:
        add_sheet(report, "disagreements", "Images with both models' predictions", first, last)
    add_sheet(report, "misclassified", "What the last of them gets wrong", "--misclassified", last)


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
    """Train and sample the language models; returns those whose training was successful."""
    args, folder = report.args, report.folder
    config = "cpu" if emulates_bf16(torch.device("cpu")) else "cpu_bf16"
    if torch.cuda.is_available():
        config = "gpu1"
    saves = {model: folder / f"{model.lower()}.pt" for model in LANGUAGE_MODELS}
    trainings = {}
    for model, lr in LANGUAGE_MODELS.items():
        flags = ["--data", args.text, "--model", model, "--lr", lr, "--epochs", args.text_epochs]
        flags += [*shlex.split(args.text_flags), "--resume", "auto", "--save", saves[model]]
        trainings[model] = launched(config, "lm_main.py", *flags)
    report.add("## 4. Language models")
    done = report.run(trainings)
    if not done:
        return done
    rows, runs = [], {}
    for model in done:
        curves = runs[model] = read_curves(folder / f"{model.lower()}.logs")
        valid, end = curves["Perplexity/val"], report.output(model, "| End of training")
        least = min(valid, key=lambda epoch: valid[epoch])
        test = re.findall(r"test ppl +(\S+)", end)[0]
        seconds = report.state["steps"][model]["seconds"]
        rows.append([model, least, f"{valid[least]:.2f}", test, f"{seconds:.0f} s"])
    head = ["model", "best epoch", "validation perplexity", "test perplexity", "time"]
    picture = draw_curves(runs, ["Loss"], report.pictures / "text_curves.png")
    report.add(table(head, rows), picture, over_fitting(runs))
    report.add("A text of each, drawn word by word:")
    for model in done:
        path = saves[model].with_suffix(".txt")
        flags = ["--checkpoint", saves[model], "--words", 60, "--outf", path]
        if report.run({f"{model} sample": script("lm_generate.py", *flags)}):
            report.add(fenced(path.read_text("utf-8").replace("<eos>", "\n").strip()))
    return done


def add_graph(report: Report) -> None:
    report.add("## 5. The Transformer's graph")
    path = report.pictures / "transformer.svg"
    flags = ["--checkpoint", report.folder / "transformer.pt", "--output", path]
    if report.run({"graph": script("export_graph.py", *flags)}):
        if path.exists():
            report.add(f"![The Transformer's autograd graph](report/{path.name})")
        else:  # for want of Graphviz, which the line tells how to install
            report.add(
                "[Its source](report/transformer.gv):", fenced(report.output("graph", "=> "))
            )


def add_context(report: Report, models: list[str]) -> None:
    report.add("## 6. How do they differ in capturing context?")
    paths = [report.folder / f"{model.lower()}.pt" for model in models]
    flags = [*paths, "--data", report.args.text, "--output-dir", report.pictures]
    if report.run({"context": script("lm_context.py", *flags)}):
        figures, findings = report.output("context", "Loss of ").split("\n\n")
        report.add(f"![Loss by context, influence by distance](report/{CONTEXT_PICTURE})")
        report.add(fenced(figures), *findings.splitlines())


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    report = Report(args)

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup's
            signal.signal(signum, stop)
    gpus = torch.cuda.device_count()
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in report.state["settings"].items()
    ]
    report.add(
        "# Report",
        f"Images: `{args.data}`; text: `{args.text}`. On {os.cpu_count()} CPU cores and "
        f"{gpus or 'no'} GPU{'s' * (gpus != 1)}, with torch {torch.__version__} and Python "
        f"{platform.python_version()}. This page and all that is in it was made by",
        fenced(shlex.join([*script("reproduce.py"), *flags])),
    )
    try:
        add_sizes(report)
        if trained := add_trainings(report):
            add_disagreements(report, trained)
        models = add_language_models(report)
        if "Transformer" in models:
            add_graph(report)
        if models:
            add_context(report, models)
    except Stopped as stopped:
        print(f"=> {stopped}: the same command goes on from here")
        leave(EXIT_STOPPED)
    path = report.write()
    for failure in report.failures:
        print(f"=> {failure}")
    print(f"=> open {path}")
    if report.failures:
        leave(1)


if __name__ == "__main__":
    run_script(main)
