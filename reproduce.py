"""Reproduce the whole report: train, compare and describe, by the kit's own commands.

    python reproduce.py                                  # built-in data: output/report/report.html
    python reproduce.py --data data/tiny-imagenet-200 --text data/wikitext-2 --epochs 30 \\
        --seeds 1 2 3 --image-flags "-b 256 --lr 0.1" --output-dir output/full

Image classifiers are trained in each way that the machine allows (a CPU with one process, with
four, with four parts of each batch and in bf16, one GPU, four), and once with another seed, to
tell a difference from chance; language models of three kinds with two seeds. The commands and
what they printed are in logs/. Interrupted, the same command goes on: what is done is not done
again. What fails is named, a command with its log, and the rest of the report still appears.
"""

from __future__ import annotations

from engine import stop  # before slow imports: see engine/stop.py

# isort: split

import argparse
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from engine.cli import ArgumentParser, non_negative_int, nonempty, pathname, positive_int

SECTIONS = ("sizes", "images", "text")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", type=nonempty, default="sample", metavar="DIR", help="images for resnet_main.py")
    add("--text", type=nonempty, default="sample", metavar="DIR", help="corpus for lm_main.py")
    add("--epochs", type=positive_int, default=10, metavar="N", help="of the image classifiers")
    add("--text-epochs", type=positive_int, default=12, metavar="N",
        help="of the language models: enough for validation to stop getting better")
    add("--seeds", type=non_negative_int, nargs="+", default=[1], metavar="N",
        help="every training is repeated with each; with one alone, one CPU training and the "
        "language models with the next as well")
    add("--image-flags", metavar="FLAGS", help="more flags of resnet_main.py",
        default="--stem stock --image-size 32 -b 128 --lr 0.024 --lr-schedule cosine "
        "--warmup-epochs 1")
    add("--text-flags", default="", metavar="FLAGS", help="more flags of lm_main.py")
    add("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS],
        help="parts to run; what the others have made stays for the next report")
    add("--output-dir", type=pathname, default=Path("output/report"), metavar="DIR",
        help="for report.md, report.html and all that the commands write")
    # fmt: on
    return parser


if __name__ == "__main__":
    stop.check_flags(make_parser(), alone=True)


import torch
from PIL import Image

import lm_main
import resnet_main
from diff_eval import HEAD, LABEL, SHEET, THUMBNAIL
from engine.curves import Curve, draw_curves, read_curves
from engine.files import writing
from engine.intervals import wilson
from image_classification.folders import find_images
from image_classification.settings import has_stem
from image_classification.sources import SAMPLE_CLASSES, resolve
from lm_context import CSV as CONTEXT_CSV
from lm_context import PICTURE as CONTEXT_PICTURE
from report import figures, sentences
from report.figures import Answers, Curves
from report.page import Page, fenced, figure, folded, quoted, table
from report.plan import CONTROL, WAYS, Groups, check_flags, grouped, image_trainings, text_trainings
from report.sentences import spread
from report.steps import Steps, script
from word_language_model.checkpoint import load, read_spec, restore_model
from word_language_model.data import corpus_files

METRICS = ("Loss", "Acc@1", "Acc@5")
SHEET_LINES = 4  # of a contact sheet, that the page shows


def identities(args: argparse.Namespace) -> dict[str, str]:
    """Tells the files of --data and --text that are there from others, by names and sizes."""
    paths = {"data": [], "text": [path for _, path in corpus_files(args.text) if path.is_file()]}
    if Path(args.data).exists():
        found = find_images(Path(args.data))
        paths["data"] = [Path(path) for path in found.train.paths + found.val.paths]
    sizes = {key: [(str(path), path.stat().st_size) for path in paths[key]] for key in paths}
    return {key: hashlib.sha256(repr(s).encode()).hexdigest()[:24] for key, s in sizes.items() if s}


def first(runs: Mapping[int, str]) -> str:
    """The training of the first seed."""
    return next(iter(runs.values()))


def best_epoch(curve: Curve, choose: Callable[..., int] = min) -> int:
    return choose(curve, key=lambda epoch: curve[epoch])


def add_sizes(page: Page, args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    page.add("## 1. The sizes inside the network that is trained")
    checkpoint = page.folder / f"cpu-seed{args.seeds[0]}" / "checkpoint.pth"
    if checkpoint.exists():
        flags = ["--checkpoint", checkpoint]
    else:
        classes = len(SAMPLE_CLASSES)
        if args.data != "sample":
            classes = len(find_images(resolve(args.data, download=False)).classes)
        flags = ["--num-classes", classes, "--arch", settings["arch"]]
        flags += ["--image-size", settings["image_size"]]
        flags += ["--stem", settings["stem"]] if has_stem(settings["arch"]) else []
    if page.run({"sizes": script("model_summary.py", *flags)}):
        page.add(fenced(page.steps.output("sizes", "=====").partition("\n")[2]))


def add_images(
    page: Page, commands: dict[str, list[str]], trained: list[str], args: argparse.Namespace
) -> None:
    page.add("## 2. Trainings over each other")
    page.show(commands)
    ways = {name.rpartition("-seed")[0] for name in commands}
    lines = [f"- **{way.title}**: {way.what}" for name, way in WAYS.items() if name in ways]
    if len(args.seeds) == 1:
        lines.insert(1, f"- **{CONTROL}**: differs from the reference in nothing but its seed")
    page.add("\n".join(lines))
    if missing := [way.title for name, way in WAYS.items() if name not in ways]:
        page.add(f"Not on this machine: {', '.join(missing)}.")
    if not trained:
        return
    groups = grouped(trained, args)
    answers: Answers | None = page.attempt(Answers, groups, args.data)
    page.attempt(add_trainings, groups, answers, len(args.seeds))
    page.add("## 3. Is it the hardware, or would another seed do the same?")
    if answers:
        page.attempt(add_disagreements, answers)
    add_sheets(page, groups, args.data)


def add_curves(page: Page, groups: Groups) -> dict[str, list[Curves]]:
    """The three panels; returns the curves of each title."""
    runs: dict[str, list[Curves]] = {
        title: [read_curves(page.folder / name / "logs") for name in names.values()]
        for title, names in groups.items()
    }
    pictures = {
        f"{metric} by epoch": f"{metric.replace('@', '')}.png".lower() for metric in METRICS
    }
    for metric, file in zip(METRICS, pictures.values(), strict=True):
        draw_curves(runs, [metric], page.pictures / file)
    band = " Bands reach from the least to the greatest seed." * any(
        len(r) > 1 for r in runs.values()
    )
    page.add(
        figure(
            "Solid: validation images; dashed: training images, whose crops and flips make them "
            f"harder, in the mean of an epoch in which the model gets better.{band} Where solid "
            "lines cross each other from epoch to epoch, their order at the end means little.",
            pictures,
        )
    )
    return runs


def add_trainings(page: Page, groups: Groups, answers: Answers | None, seeds: int) -> None:
    runs = add_curves(page, groups)
    count = len(answers.targets) if answers else 0
    rows = []
    for title, several in runs.items():
        mean = figures.mean_curves(several)
        acc1 = [figures.last(run["Acc@1/val"]) for run in several]
        loss, acc5 = figures.last(mean["Loss/val"]), figures.last(mean["Acc@5/val"])
        best = best_epoch(mean["Acc@1/val"], max)
        share = figures.last(mean["Acc@1/val"]) / 100
        interval = [100 * end for end in wilson(round(share * count), count)] if count else []
        rates = [rate for run in several for rate in run["Throughput/train"].values()]
        seconds = sum(map(page.steps.seconds, groups[title].values())) / len(several)
        rows.append(
            [
                *(title, spread(acc1, 1), " to ".join(f"{end:.1f}" for end in interval)),
                f"{figures.last(mean['Acc@1/train']):.1f}",
                *(f"{acc5:.1f}", f"{figures.last(mean['Loss/train']):.3f} / {loss:.3f}"),
                *(best, f"{seconds:.0f} s", f"{sum(rates) / len(rates):.0f}"),
            ]
        )
    head = ["training", "Acc@1", "95 % interval", "Acc@1 in training", "Acc@5"]
    page.add(table([*head, "loss: training / validation", "best epoch", "time", "images/s"], rows))
    page.add(
        "Figures of the last epoch (epochs count from 0), in the mean of the seeds where there are "
        "several. The interval is Wilson's: what other images of the same kind would give."
    )
    add_gaps(page, runs, answers, seeds)
    means = {title: figures.mean_curves(several) for title, several in runs.items()}
    add_coincidences(page, groups, runs)
    page.add("\n".join(f"- {line}" for line in sentences.over_fitting(means)))
    page.conclude("**Losses:**", sentences.fitting(means))


def add_gaps(
    page: Page, runs: Mapping[str, list[Curves]], answers: Answers | None, seeds: int
) -> None:
    """Which gaps of Acc@1 are larger than images and seeds explain."""
    reference, *others = runs
    has_control = CONTROL in runs and reference == WAYS["cpu"].title
    control = answers.gap(CONTROL, reference) if answers and has_control else None
    beyond: dict[str, float] = {}
    within: dict[str, float] = {}
    said: list[str] = []
    for title in (title for title in others if title != CONTROL):
        acc1 = [[figures.last(run["Acc@1/val"]) for run in runs[t]] for t in (title, reference)]
        if interval := sentences.seeds_interval(*acc1) if seeds > 1 else None:
            gap, chance = sum(acc1[0]) / len(acc1[0]) - sum(acc1[1]) / len(acc1[1]), None
            said.append(sentences.seeds_gap(title, reference, gap, interval, seeds))
        elif answers and (found := answers.gap(title, reference)):
            (gap, interval), chance = found, abs(control[0]) if control else None
            said.append(sentences.image_gap(title, reference, gap, interval, chance))
        else:
            continue
        (beyond if sentences.exceeds(gap, interval, chance) else within)[title] = gap
    processes, parts = (WAYS[way].title for way in ("cpu4", "parts4"))
    gaps = beyond | within
    if processes in beyond and parts in gaps:
        said.append(sentences.cause(gaps[processes], gaps[parts]))
    if control:
        said.append(sentences.two_seeds(*control))
    page.add("\n".join(f"- {line}" for line in said))
    if others:
        page.conclude(sentences.accuracy(beyond, within, reference, seeds))


def add_coincidences(page: Page, groups: Groups, runs: Mapping[str, list[Curves]]) -> None:
    """Which curves are the same; of four processes and four parts it is said in any case."""
    reference, *_ = runs
    seeds = figures.farthest([*runs[reference], *runs.get(CONTROL, [])], "Loss/val")
    expected = {WAYS["cpu4"].title, WAYS["parts4"].title}
    of = {title: dict(zip(groups[title], runs[title], strict=True)) for title in runs}
    for one, other in itertools.combinations(of, 2):
        both = of[one].keys() & of[other].keys()  # none with the control
        pairs = [figures.apart(of[one][s], of[other][s], "Loss/val") for s in both]
        distances = [max(after) for after in zip(*pairs, strict=True)]
        if not distances:
            continue
        level = figures.last(runs[one][0]["Loss/val"])
        if sentences.is_near(max(distances), seeds, level) or {one, other} == expected:
            page.add(sentences.coincidence(one, other, distances, seeds, level))


def add_disagreements(page: Page, answers: Answers) -> None:
    page.show(answers.commands)
    of = {title: found for title, found in answers.of.items() if found}
    titles = [*of]
    if len(titles) < 2:
        return
    shares = {(one, other): figures.disagreement(of[one], of[other]) for one in of for other in of}
    page.add("Per cent of the validation images on which two trainings give different answers:")
    rows = []
    for one in titles:
        cells = ["" if (s := shares[one, o]) is None else f"{100 * s:.1f}" for o in titles]
        rows.append([f"**{one}**", *cells])
    page.add(table(["", *titles], rows))
    page.add(
        "Trainings of the same seed are compared where they have one, in the mean of all seeds; "
        "the diagonal has two seeds of the same training, where there are two. Each answer is that "
        "of the last epoch's model, computed in float32."
    )
    reference, *others = titles
    seeds = shares[reference, CONTROL if CONTROL in of else reference]
    count, said = len(answers.targets), []
    compared = {t: s for t in others if t != CONTROL and (s := shares[t, reference]) is not None}
    for title, share in compared.items():
        said.append(sentences.disagreement(title, reference, share, seeds, count))
    page.add("\n".join(f"- {line}" for line in said))
    if compared:
        page.conclude(sentences.disagreements(compared, reference, seeds, count))


def add_sheets(page: Page, groups: Groups, data: str) -> None:
    """What two of the models see differently, and what the last of them gets wrong."""
    named = {title: first(runs) for title, runs in groups.items() if title != CONTROL}
    (one, *_), (*_, other) = named, named
    a, b = (page.folder / named[title] / "checkpoint.pth" for title in (one, other))
    if one != other:
        caption = f"Images on which {one} (a) and {other} (b) disagree"
        page.attempt(add_sheet, "disagreements", caption, data, a, b)
    page.attempt(add_sheet, "misclassified", f"What {other} gets wrong", data, "--misclassified", b)


def add_sheet(page: Page, name: str, title: str, data: str, *flags: object) -> None:
    """Compare models; the first lines of the contact sheet become a small JPEG."""
    folder = page.folder / name
    flags = (*flags, "--data", data, "--output-dir", folder)
    if not page.run({name: script("diff_eval.py", *flags)}):
        return
    path = page.pictures / f"{name}.jpg"
    with Image.open(folder / SHEET) as sheet, writing(path) as temporary:
        height = min(sheet.height, HEAD + SHEET_LINES * (THUMBNAIL + 8 + LABEL))
        sheet.crop((0, 0, sheet.width, height)).save(temporary, "JPEG", quality=80)
    said = page.steps.output(name, "=> classes").splitlines()
    classes = said[0].removeprefix("=> ")
    page.add(
        figure(
            f"{title}, of {classes}: the surest answers first, at most {SHEET_LINES} lines of "
            f"them; all images lie in {folder}. Green answers are right. Look for what the wrong "
            "ones have in common.",
            {title: path.name},
        )
    )
    comparison = folder / "comparison.json"
    if "--misclassified" not in flags and comparison.exists():
        page.add(json.loads(comparison.read_text("utf-8"))["sentence"])


def add_language_models(page: Page, groups: Groups) -> None:
    rows, runs, costs, tests, valid = [], {}, {}, {}, {}
    for model, names in groups.items():
        curves = [read_curves(page.folder / f"{name.lower()}.logs") for name in names.values()]
        mean = figures.mean_curves(curves)
        runs[model], valid[model] = curves, mean["Perplexity/val"]
        ends = [page.steps.output(name, "| End of training") for name in names.values()]
        tests[model] = [float(re.findall(r"test ppl +(\S+)", end)[0]) for end in ends]
        checkpoint = load(page.folder / f"{first(names).lower()}.pt")
        bptt = checkpoint.value("bptt", int) or 35
        cost = costs[model] = figures.cost(restore_model(checkpoint)[0], bptt)
        seconds = sum(map(page.steps.seconds, names.values())) / len(names)
        least = best_epoch(valid[model])
        sizes = [f"{n:,}" for n in (cost.parameters, cost.in_layers, cost.multiply_adds)]
        best = [min(run["Perplexity/val"].values()) for run in curves]
        rows.append([model, *sizes, least, spread(best, 1), spread(tests[model], 1)])
        rows[-1].append(f"{seconds:.0f} s")
    head = ["model", "parameters", "in the layers", "multiply-adds a word", "best epoch"]
    page.add(table([*head, "validation perplexity", "test perplexity", "time"], rows))
    page.add(
        "Means of the seeds, and from the least to the greatest. Parameters outside of the layers "
        "are the words' embeddings and the decoder's. Epochs count from 1; the test perplexity is "
        "the best epoch's model's."
    )
    order, better = sentences.ranking(tests), sentences.improving(valid)
    page.add(sentences.sizes([cost.parameters for cost in costs.values()]), order, better)
    draw_curves(runs, ["Loss"], page.pictures / "text_loss.png")
    draw_curves(runs, ["Perplexity"], page.pictures / "text_perplexity.png")
    page.add(
        figure(
            "Solid: validation text; dashed: training text, with dropout and in the mean of an "
            "epoch in which the model gets better. A flat solid line: more epochs bring nothing. "
            "Below it a dashed line that goes on falling: the model learns its training text by "
            "heart.",
            {"Loss by epoch": "text_loss.png", "Perplexity by epoch": "text_perplexity.png"},
        )
    )
    means = {model: figures.mean_curves(curves) for model, curves in runs.items()}
    page.add("\n".join(f"- {line}" for line in sentences.over_fitting(means)))
    page.conclude(f"**Language models:** {order}", better, sentences.fitting(means))


def add_texts(page: Page, groups: Groups) -> None:
    page.add("A text of each, drawn word by word:")
    paths = {m: page.folder / f"{first(names).lower()}.txt" for m, names in groups.items()}
    commands = {}
    for model, path in paths.items():
        flags = ["--checkpoint", path.with_suffix(".pt"), "--words", 60, "--outf", path]
        commands[f"{model} sample"] = script("lm_generate.py", *flags)
    for name in page.run(commands):
        model = name.removesuffix(" sample")
        page.attempt(add_text, model, paths[model])


def add_text(page: Page, model: str, path: Path) -> None:
    page.add(f"{model}:", quoted(path.read_text("utf-8")))


def add_graph(page: Page, name: str) -> None:
    page.add("## 5. The Transformer's graph")
    path = page.pictures / "transformer.svg"
    flags = ["--checkpoint", page.folder / f"{name.lower()}.pt", "--output", path]
    if page.run({"graph": script("export_graph.py", *flags)}):
        if path.exists():
            caption = "Every parameter under its name (blue), and what carries gradients back."
            page.add(figure(caption, {"The Transformer's autograd graph": path.name}))
        else:  # for want of Graphviz, which the line tells how to install
            said = fenced(page.steps.output("graph", "=> "))
            page.add("[Its source](report/transformer.gv):", said)


def add_context(page: Page, groups: Groups, text: str) -> None:
    page.add("## 6. How do they differ in capturing context?")
    models = {model: page.folder / f"{first(of).lower()}.pt" for model, of in groups.items()}
    flags = [*models.values(), "--data", text, "--output-dir", page.pictures]
    if not page.run({"context": script("lm_context.py", *flags)}):
        return
    said = page.steps.output("context", "Loss of ")
    shown, _, findings = said.partition("\n\n")
    found = figures.read_contexts(page.pictures / CONTEXT_CSV)
    rows = []
    for model, path in models.items():
        checkpoint = load(path)
        spec, window = read_spec(checkpoint), checkpoint.value("bptt", int) or 35
        cost = figures.cost(restore_model(checkpoint)[0], window)
        can = sentences.reach(model, spec.nlayers, window, spec.kernel_size)
        measured = f"{found[model]['effective context']:.0f} of {found[model]['most']:.0f}"
        costs = [f"{cost.in_layers:,}", f"{cost.multiply_adds:,}"]
        rows.append([model, *can, *costs, measured, f"{found[model]['loss']:.3f}"])
    answer = sentences.context(found)
    page.add(f"{sentences.allowed([*models])} {answer}")
    head = ["model", "can see", "steps to a prediction", "weights of the words seen"]
    head += ["parameters in its layers", "multiply-adds a word", "words it needs", "loss (nats)"]
    page.add(table(head, rows))
    page.add(
        "Measured are the words that a model needs to come within 1 % of its lowest loss, of those "
        "that it was shown, and its loss with all of them; the rest follows from its architecture."
    )
    caption = (
        "Left: the loss of a word by how many words before it a model was shown; where a line "
        "becomes flat, the model makes nothing of more. Right: the rise of its loss when only the "
        "nearest words are in order; where it is zero, the order of words further back is nothing "
        "to the model. Bands are 95 % intervals."
    )
    page.add(figure(caption, {"Loss by context, and by words in order": CONTEXT_PICTURE}))
    page.add(fenced(shown), "\n".join(f"- {line}" for line in findings.splitlines()))
    page.conclude("**Context:**", answer)


def add_head(page: Page, args: argparse.Namespace, shaping: Mapping[str, Any]) -> None:
    flags: list[object] = []
    for name, value in shaping.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
    flags += ["--only", *args.only] if args.only != [*SECTIONS] else []
    if args.output_dir != make_parser().get_default("output_dir"):
        flags += ["--output-dir", args.output_dir]
    gpus = torch.cuda.device_count()
    page.add(
        "# Report",
        f"Images: `{args.data}`; text: `{args.text}`. On {os.cpu_count()} CPU cores and "
        f"{gpus or 'no'} GPU{'s' * (gpus != 1)}, with torch {torch.__version__} and Python "
        f"{platform.python_version()}.",
        folded(
            "the command that made this page", fenced(shlex.join(script("reproduce.py", *flags)))
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse(argv)
    args.seeds = [*dict.fromkeys(args.seeds)]
    image_settings = check_flags("--image-flags", args.image_flags, resnet_main)
    text_settings = check_flags("--text-flags", args.text_flags, lm_main)
    own = ("output_dir", "only", "local_rank")  # may differ from call to call
    shaping = {key: value for key, value in vars(args).items() if key not in own}
    page = Page(Steps(args.output_dir, shaping, identities(args)))
    add_head(page, args, shaping)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise stop.Stopped(signum)

    for signum in stop.STOP_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup's
            signal.signal(signum, interrupt)
    try:
        images = image_trainings(args) if "images" in args.only else {}
        texts = text_trainings(args, text_settings) if "text" in args.only else {}
        if images or texts:
            print(
                f"=> {len(images)} image trainings of {args.epochs} epochs and {len(texts)} "
                f"language models of {args.text_epochs}; their first epochs tell how long"
            )
        trained = page.steps.run(images, args.epochs)  # before section 1, which looks into one
        if "sizes" in args.only:
            page.attempt(add_sizes, args, image_settings)
        if images:
            add_images(page, images, trained, args)
        models = page.steps.run(texts, args.text_epochs)
        if texts:
            page.add("## 4. Language models of the same size")
            page.show(texts)
        if models:
            groups = grouped(models, args)
            page.attempt(add_language_models, groups)
            page.attempt(add_texts, groups)
            if "Transformer" in groups:
                page.attempt(add_graph, first(groups["Transformer"]))
            page.attempt(add_context, groups, args.text)
    except stop.Stopped as stopped:
        print(f"=> {stopped}: the same command goes on from here")
        stop.leave(stop.EXIT_STOPPED)
    page.write()
    failures = [*page.steps.failures, *page.failures]
    for failure in failures:
        print(f"=> {failure}")
    print(f"=> open {page.folder / 'report.html'}")
    if failures:
        stop.leave(1)


if __name__ == "__main__":
    stop.run_script(main)
