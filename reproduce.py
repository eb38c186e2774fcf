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
import csv
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
from collections.abc import Iterator, Mapping, Sequence
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

from diff_eval import CSV as IMAGE_TABLE
from diff_eval import HEAD, LABEL, SHEET, THUMBNAIL
from engine.files import check_writable, writing
from engine.launch import emulates_bf16
from lm_context import CSV as CONTEXT_TABLE
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
# Variables of a launcher that has started this script, which its commands must not take for theirs.
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
METRICS = ("Loss", "Acc@1", "Acc@5")
SHEET_ROWS = 4  # of a contact sheet in the report
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 90% }
td, th { border: 1px solid #bbb; padding: 3px 8px }
pre { background: #f4f4f4; padding: 8px; white-space: pre-wrap } img { max-width: 100% }
p:has(img) { max-height: 48em; overflow: auto }
"""

Curve = dict[int, float]  # by epoch


class Reproduction:
    """What was run so far, kept in state.json, and the report that it makes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.output_dir
        self.pictures = self.folder / "report"
        check_writable(self.folder, "--output-dir")
        settings = {key: value for key, value in vars(args).items() if key != "output_dir"}
        self.sections: list[str] = []
        self.called: list[str] = []  # steps of this call
        self.state_path = self.folder / "state.json"
        self.state: dict[str, Any] = {"settings": settings, "steps": {}}
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

    def log(self, name: str) -> Path:
        path: Path = self.folder / "logs" / f"{name}.log"
        return path

    def is_done(self, name: str) -> bool:
        code: int | None = self.state["steps"].get(name, {}).get("code")
        return code == 0

    def run(self, name: str, command: list[str]) -> bool:
        """Run a command unless it is done; returns whether it was successful."""
        shown = shlex.join(command)
        found = self.state["steps"].get(name, {})
        self.called.append(name)
        if found.get("command") != shown:  # from another folder, perhaps
            found = {"seconds": found.get("seconds", 0.0)}
        print(f"=> {shown}")
        if found.get("code") == 0:
            print("   done before")
            return True
        started, code = time.time(), -1
        try:
            code = execute(command, self.log(name))
        finally:  # a training that is stopped goes on later, and its time counts
            found["seconds"] += time.time() - started
            self.state["steps"][name] = {**found, "command": shown, "code": code}
            self.keep_state()
        print(f"   {found['seconds']:.0f} s" if code == 0 else f"   {self.failure(name)}")
        return code == 0

    def failure(self, name: str) -> str:
        return f"failed with exit code {self.state['steps'][name]['code']}: see {self.log(name)}"

    def add(self, *parts: str) -> None:
        self.sections += parts

    def add_command(self, *names: str) -> None:
        """Show the commands, and for one that failed its log's last lines."""
        steps = self.state["steps"]
        self.add(fenced("\n".join(steps[name]["command"] for name in names if name in steps)))
        for name in names:
            if name in steps and not self.is_done(name):
                last = self.log(name).read_text("utf-8", "replace").splitlines()[-5:]
                self.add(f"**{name} {self.failure(name)}.** It ends with:", fenced("\n".join(last)))

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
        path: Path = self.folder / "report.html"
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
                    lines = log.read_text("utf-8", "replace").split("\n")
                    progress.set_description_str(
                        " ".join(lines[-2].split())[:90] if lines[1:] else ""
                    )
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
            return process.returncode
        except Stopped:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            # A launcher goes at once, and its training once a checkpoint is on the disk.
            for _ in range(300):
                try:
                    os.killpg(process.pid, 0)
                except ProcessLookupError:
                    break
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


def listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def read_curves(folder: Path) -> dict[str, Curve]:
    """TensorBoard's curves, as it shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def draw_curves(runs: Mapping[str, dict[str, Curve]], metrics: Sequence[str], path: Path) -> str:
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


def overfitting(name: str, train: Curve, val: Curve) -> str:
    """Whether validation loss rises from its least by over 1 % while training loss falls."""
    least, last = min(val, key=lambda epoch: val[epoch]), max(val)
    if val[last] <= 1.01 * val[least] or train[last] >= train[least]:
        return ""
    return (
        f"{name} **over-fits** after epoch {least}: its validation loss rises from "
        f"{val[least]:.3f} to {val[last]:.3f} while its training loss falls from "
        f"{train[least]:.3f} to {train[last]:.3f}."
    )


def add_sizes(report: Reproduction) -> None:
    report.add("## 1. The sizes inside a ResNet-18")
    ok = report.run("sizes", script("model_summary.py", "--json"))
    report.add_command("sizes")
    if ok:
        log = report.log("sizes").read_text()
        found, _ = json.JSONDecoder().raw_decode(log, f"\n{log}".rindex("\n{"))
        sizes = [["×".join(map(str, s[k])) for k in ("input", "output")] for s in found["stages"]]
        names = [stage["name"] for stage in found["stages"]]
        rows = [[name, *pair] for name, pair in zip(names, sizes, strict=True)]
        report.add(
            table(["stage", "input", "output"], rows),
            f"{found['parameters']:,} parameters; an image takes {found['multiply_adds']:,} "
            f"multiply-adds, and training keeps {found['activation_bytes'] / 2**20:.2f} MiB of "
            "activations for its backward pass.",
        )


def add_trainings(report: Reproduction) -> list[str]:
    """Train in every way that the machine allows; returns the folders of the successful ones."""
    args = report.args
    bf16 = not emulates_bf16(torch.device("cpu"))
    gpus = torch.cuda.device_count()
    allowed = ["cpu", "cpu4", *["cpu_bf16"] * bf16, *["gpu1"] * (gpus > 0), *["gpu4"] * (gpus > 3)]
    for name in allowed:
        flags = [args.data, "--epochs", args.epochs, *shlex.split(args.image_flags)]
        flags += ["--resume", "auto", "--output-dir", report.folder / name]
        report.run(name, launched(name, "resnet_main.py", *flags))
    report.add("## 2. Trainings over each other")
    report.add_command(*allowed)
    missing = [title for name, title in TRAININGS.items() if name not in allowed]
    if missing:
        report.add(f"Not on this machine: {', '.join(missing)}.")
    done = [name for name in allowed if report.is_done(name)]
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
    for name, curves in zip(done, runs.values(), strict=True):
        acc1, last = curves["Acc@1/val"], max(curves["Acc@1/val"])
        best = max(acc1, key=lambda epoch: acc1[epoch])
        pair = [[curves[f"{m}/{s}"][last] for s in ("train", "val")] for m in METRICS]
        rate = curves["Throughput/train"]
        rows.append(
            [
                TRAININGS[name],
                f"{best} ({acc1[best]:.1f})",
                *(
                    f"{train:.{d}f} / {val:.{d}f}"
                    for (train, val), d in zip(pair, (3, 1, 1), strict=True)
                ),
                f"{pair[1][0] - pair[1][1]:+.1f}",
                f"{report.state['steps'][name]['seconds']:.0f} s",
                f"{sum(rate.values()) / len(rate):.0f}",
            ]
        )
    head = ["training", "best epoch (Acc@1)", *METRICS, "gap of Acc@1", "time", "images/s"]
    losses = [overfitting(n, c["Loss/train"], c["Loss/val"]) for n, c in runs.items()]
    report.add(table(head, rows), "\n".join(filter(None, losses)) or "None of them over-fits.")
    return done


def add_disagreements(report: Reproduction, trained: list[str]) -> None:
    report.add("## 3. The images on which two of them disagree")
    if not trained:
        report.add("No training was successful, so there is nothing to compare.")
        return
    folder, data = report.folder, ("--data", report.args.data)
    paths = [folder / name / "model_best.pth" for name in (trained[0], trained[-1])]
    names = [TRAININGS[name] for name in (trained[0], trained[-1])]
    if len(trained) > 1:
        flags = [*paths, *data, "--output-dir", folder / "disagreements"]
        ok = report.run("disagreements", script("diff_eval.py", *flags))
        report.add(f"a: {names[0]}; b: {names[1]}; each at its best epoch, on classes 0 and 1.")
        report.add_command("disagreements")
        if ok:
            found = report.log("disagreements").read_text()
            counts = re.findall(r"^(a \w+) +(\d+) +(\d+)$", found, re.MULTILINE)[-2:]
            agreement = re.findall(r"^agreement (\S+)$", found, re.MULTILINE)[-1]
            report.add(table(["", "b right", "b wrong"], counts))
            report.add(f"They agree on {float(agreement):.1f} % of the images.")
            add_sheet(report, "disagreements", "Images with both models' predictions")
    flags = ["--misclassified", paths[-1], *data, "--output-dir", folder / "misclassified"]
    ok = report.run("misclassified", script("diff_eval.py", *flags))
    report.add(f"What {names[-1]}, gets wrong:")
    report.add_command("misclassified")
    if ok:
        add_sheet(report, "misclassified", "Misclassified images")


def add_sheet(report: Reproduction, name: str, title: str) -> None:
    """The first rows of a contact sheet, with the surest mistakes, as a small JPEG."""
    folder = report.folder / name
    count = len((folder / IMAGE_TABLE).read_text("utf-8", "replace").splitlines()) - 1
    path = report.pictures / f"{name}.jpg"
    with Image.open(folder / SHEET) as sheet, writing(path) as temporary:
        height = min(sheet.height, HEAD + SHEET_ROWS * (THUMBNAIL + 8 + LABEL))
        sheet.crop((0, 0, sheet.width, height)).save(temporary, "JPEG", quality=80)
    report.add(f"![{title}](report/{path.name})")
    report.add(f"{title}: {count}, the surest first; all of them are in `{folder}`.")


def add_language_models(report: Reproduction) -> list[str]:
    """Train and sample the language models; returns the checkpoints of the successful ones."""
    args, folder = report.args, report.folder
    best = "gpu1" if torch.cuda.is_available() else "cpu_bf16"
    config = "cpu" if best == "cpu_bf16" and emulates_bf16(torch.device("cpu")) else best
    report.add("## 4. Language models")
    done = []
    for model, lr in LANGUAGE_MODELS.items():
        save = folder / f"{model.lower()}.pt"
        flags = ["--data", args.text, "--model", model, "--lr", lr, "--epochs", args.text_epochs]
        flags += [*shlex.split(args.text_flags), "--resume", "auto", "--save", save]
        if report.run(model, launched(config, "lm_main.py", *flags)):
            flags = ["--checkpoint", save, "--words", 60, "--outf", save.with_suffix(".txt")]
            report.run(f"{model} sample", script("lm_generate.py", *flags))
            done.append(model)
    report.add_command(*LANGUAGE_MODELS)
    if not done:
        return done
    rows, runs = [], {}
    for model in done:
        curves = runs[model] = read_curves(folder / f"{model.lower()}.logs")
        valid, log = curves["Perplexity/val"], report.log(model).read_text()
        test = re.findall(r"End of training \| test loss +\S+ \| test ppl +(\S+)", log)[-1]
        least = min(valid, key=lambda epoch: valid[epoch])
        seconds = report.state["steps"][model]["seconds"]
        rows.append([model, least, f"{valid[least]:.2f}", test, f"{seconds:.0f} s"])
    head = ["model", "best epoch", "validation perplexity", "test perplexity", "time"]
    losses = [overfitting(f"The {n}", c["Loss/train"], c["Loss/val"]) for n, c in runs.items()]
    report.add(
        table(head, rows),
        draw_curves(runs, ["Loss"], report.pictures / "text_curves.png"),
        "\n".join(filter(None, losses)) or "None of them over-fits.",
        "A text of each, drawn word by word:",
    )
    report.add_command(*(f"{model} sample" for model in done))
    for model in done:
        if report.is_done(f"{model} sample"):
            text = (folder / f"{model.lower()}.txt").read_text("utf-8")
            report.add(f"{model}:", fenced(text.replace("<eos>", "\n").strip()))
    return done


def add_graph(report: Reproduction, trained: list[str]) -> None:
    report.add("## 5. The Transformer's graph")
    if "Transformer" not in trained:
        report.add("Its training was not successful.")
        return
    path = report.pictures / "transformer.svg"
    flags = ["--checkpoint", report.folder / "transformer.pt", "--output", path]
    ok = report.run("graph", script("export_graph.py", *flags))
    report.add_command("graph")
    if ok:
        report.add(f"![The Transformer's autograd graph](report/{path.name})")


def add_context(report: Reproduction, trained: list[str]) -> None:
    report.add("## 6. How do they differ in capturing context?")
    if not trained:
        report.add("No training was successful, so there is nothing to compare.")
        return
    paths = [report.folder / f"{model.lower()}.pt" for model in trained]
    flags = [*paths, "--data", report.args.text, "--output-dir", report.pictures]
    ok = report.run("context", script("lm_context.py", *flags))
    report.add_command("context")
    if ok:
        with (report.pictures / CONTEXT_TABLE).open(newline="") as file:
            values = {(m, what, int(n or 0)): float(v) for m, what, n, v in [*csv.reader(file)][1:]}
        report.add(f"![Loss by context, influence by distance](report/{CONTEXT_PICTURE})")
        report.add(*context_findings(trained, values))


def context_findings(
    models: list[str], values: Mapping[tuple[str, str, int], float]
) -> Iterator[str]:
    """The table of the losses, and three sentences that say what the figures say.

    Args:
        values: by model, measure and number of words, 0 where the measure has none.
    """
    losses = {
        m: {n: v for (model, what, n), v in values.items() if (model, what) == (m, "loss")}
        for m in models
    }
    lengths = sorted({n for curve in losses.values() for n in curve})
    effective = {m: int(values[m, "effective context", 0]) for m in models}
    rows = [
        [m, *(f"{losses[m][n]:.3f}" if n in losses[m] else "" for n in lengths), effective[m]]
        for m in models
    ]
    yield table(["loss with the last … words", *map(str, lengths), "effective context"], rows)

    fields = {
        m: int(values[m, "receptive field", 0])
        for m in models
        if (m, "receptive field", 0) in values
    }
    most = {m: fields.get(m, max(losses[m])) for m in models}
    needs = [f"the {m} needs the last {effective[m]} of {most[m]}" for m in models]
    yield f"To come within 1 % of its loss with all words visible, {listed(needs)}."

    gains = {m: losses[m][1] - losses[m][max(losses[m])] for m in models}
    falls = [f"{gains[m]:.3f} nats for the {m}" for m in models]
    lowest = min(models, key=lambda m: losses[m][max(losses[m])])
    yield (
        f"From one visible word to all of them the loss falls by {listed(falls)}; it ends lowest "
        f"for the {lowest}, at {losses[lowest][max(losses[lowest])]:.3f}."
    )

    far = next(iter(fields.values()), 7)
    shares = {
        m: sum(
            v
            for (model, what, n), v in values.items()
            if (model, what) == (m, "influence") and n > far
        )
        for m in models
    }
    parts = [f"{100 * shares[m]:.1f} % in the {m}" for m in models]
    why = ", whose receptive field ends there" if fields else ""
    yield (
        f"Of all influence on a prediction, words more than {far} places back have "
        f"{listed(parts)}{why}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    report = Reproduction(args)

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
        add_disagreements(report, add_trainings(report))
        trained = add_language_models(report)
        add_graph(report, trained)
        add_context(report, trained)
    except Stopped as stopped:
        print(f"=> {stopped}: the same command goes on from here")
        leave(EXIT_STOPPED)
    path = report.write()
    failed = [name for name in report.called if not report.is_done(name)]
    for name in failed:
        print(f"=> {name} {report.failure(name)}")
    print(f"=> open {path}")
    if failed:
        leave(1)


if __name__ == "__main__":
    run_script(main)
