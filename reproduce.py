"""Reproduce the whole report: train, compare and describe, by the kit's own commands.

    python reproduce.py                                  # built-in data: output/report/report.html
    python reproduce.py --data data/tiny-imagenet-200 --text data/wikitext-2 --epochs 30 \\
        --seeds 1 2 3 --image-flags "-b 256 --lr 0.1" --output-dir output/full

An image classifier is trained in each way that the machine allows (on a CPU with one process,
with four, in four parts of each batch and in bf16; on one GPU, on four), and once more with another
seed, to tell a difference from chance. Three language models are trained with two seeds each. What
the commands print is in logs/. An interrupted report goes on with the same command. What fails is
named, a command with its log, and the rest of the report still appears.
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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
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
        help="train everything with each; one alone is joined by the next, for the first "
        "classifier and the language models")
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
from diff_eval import COMPARISON, HEAD, LABEL, SHEET, THUMBNAIL
from engine.curves import draw_curves, read_curves
from engine.files import writing
from engine.intervals import wilson
from image_classification.folders import find_images
from image_classification.settings import has_stem
from image_classification.sources import SAMPLE_CLASSES, resolve
from lm_context import CSV as CONTEXT_CSV
from lm_context import PICTURE as CONTEXT_PICTURE
from report import figures, sentences
from report.figures import Answers, Curves, Gap
from report.page import Page, fenced, figure, folded, quoted, table
from report.plan import CONTROL, WAYS, Groups, check_flags, grouped, image_trainings, text_trainings
from report.sentences import short, spread
from report.steps import Steps, script
from word_language_model.checkpoint import load, restore_model
from word_language_model.data import corpus_files

SHEET_LINES = 4  # of a contact sheet, that the page shows
BANDS = " Bands reach from the least to the greatest seed."
BEYOND = " A number with an arrow is a value beyond the upper edge."


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


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


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
    page.add("## 2. One classifier, trained in several ways")
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
    answers = page.attempt(ask, groups, args.data)
    page.attempt(add_trainings, groups, answers)
    page.add("## 3. Is it the hardware, or would another seed do the same?")
    if answers:
        page.attempt(add_disagreements, answers)
    add_sheets(page, groups, args.data)


def ask(page: Page, groups: Groups, data: str) -> Answers:
    """The answers of each last epoch's model: the best one was chosen by these very images."""
    root = resolve(data, download=False)
    found = find_images(root)
    folder = page.folder / "answers"
    folder.mkdir(exist_ok=True)
    commands = {}
    for name in itertools.chain.from_iterable(runs.values() for runs in groups.values()):
        flags = [page.folder / name / "checkpoint.pth", root / "val", "--top", 1]
        commands[f"{name} answers"] = script("predict.py", *flags, "--csv", folder / f"{name}.csv")
    done = page.run(commands)
    of: dict[str, dict[int, list[str]]] = {}
    for title, runs in groups.items():
        for seed, name in runs.items():
            if f"{name} answers" in done:
                answers = figures.read_answers(folder / f"{name}.csv", found.val.paths)
                of.setdefault(title, {})[seed] = answers
    return Answers([found.classes[target] for target in found.val.targets], of)


def add_curves(page: Page, groups: Groups) -> dict[str, list[Curves]]:
    """The three panels; returns the curves of each title."""
    runs: dict[str, list[Curves]] = {
        title: [read_curves(page.folder / name / "logs") for name in names.values()]
        for title, names in groups.items()
    }
    files = {"Loss": "loss.png", "Acc@1": "acc1.png", "Acc@5": "acc5.png"}
    for metric, file in files.items():
        draw_curves(runs, [metric], page.pictures / file)
    repeated = any(len(several) > 1 for several in runs.values())
    page.add(
        figure(
            "Solid: validation images. Dashed: training images, harder by their crops and flips "
            "(and by label smoothing, CutMix and MixUp, if given), and averaged over an epoch in "
            "which the model improves. Where solid lines cross again and again, their order at the "
            f"end means little.{BANDS * repeated}{BEYOND}",
            {f"{metric} by epoch": file for metric, file in files.items()},
        )
    )
    return runs


def add_trainings(page: Page, groups: Groups, answers: Answers | None) -> None:
    runs = add_curves(page, groups)
    means = {title: figures.mean_curves(several) for title, several in runs.items()}
    count = len(answers.targets) if answers else 0
    rows = []
    for title, mean in means.items():
        end = {tag: figures.last(curve) for tag, curve in mean.items()}
        acc1 = [figures.last(run["Acc@1/val"]) for run in runs[title]]
        best = max(mean["Acc@1/val"], key=mean["Acc@1/val"].__getitem__)
        hits = round(end["Acc@1/val"] / 100 * count)
        interval = [f"{100 * limit:.1f}" for limit in wilson(hits, count)] if count else []
        seconds = fmean(map(page.steps.seconds, groups[title].values()))
        rows.append(
            [
                *(title, spread(acc1), " to ".join(interval), f"{end['Acc@1/train']:.1f}"),
                *(
                    f"{end['Acc@5/val']:.1f}",
                    f"{short(end['Loss/train'])} / {short(end['Loss/val'])}",
                ),
                *(best, f"{seconds:.0f} s", f"{fmean(mean['Throughput/train'].values()):.0f}"),
            ]
        )
    head = ["training", "Acc@1", "95 % interval", "Acc@1 in training", "Acc@5"]
    page.add(table([*head, "loss: training / validation", "best epoch", "time", "images/s"], rows))
    page.add(
        "Figures are of the last epoch (epochs count from 0), and means where there are several "
        "seeds. The interval is Wilson's: it covers the choice of the images, not the seed."
    )
    add_gaps(page, runs, answers)
    add_coincidences(page, groups, runs)
    page.add(bullets(sentences.over_fitting(means)))
    page.conclude("**Losses:**", sentences.fitting(means))


def add_gaps(page: Page, runs: Mapping[str, list[Curves]], answers: Answers | None) -> None:
    """Which gaps of Acc@1 are larger than images and seeds explain."""
    reference, *others = runs
    two_seeds = answers.gap(CONTROL, reference) if answers else None
    control = abs(two_seeds.value) if two_seeds else None
    several = any(len(of) > 1 for of in runs.values())
    gaps: dict[bool, dict[str, Gap]] = {True: {}, False: {}}  # beyond chance, within
    said: list[str] = []
    for title in (title for title in others if title != CONTROL):
        ours, theirs = (
            [figures.last(run["Acc@1/val"]) for run in runs[t]] for t in (title, reference)
        )
        gap, basis = figures.seeds_gap(ours, theirs), "seeds"
        if gap is None and answers:
            gap, basis = answers.gap(title, reference), "images"
        if gap:
            gaps[sentences.is_beyond(gap, control)][title] = gap
            said.append(sentences.accuracy_gap(title, reference, gap, basis, control))
    beyond, within = gaps[True], gaps[False]
    if two_seeds:
        said.append(sentences.two_seeds(two_seeds))
    page.add(bullets(said))
    if beyond or within:
        page.conclude(sentences.accuracy(beyond, within, reference, several, control))


def add_coincidences(page: Page, groups: Groups, runs: Mapping[str, list[Curves]]) -> None:
    """Which curves are the same; of four processes and four parts it is said in any case."""
    reference, *_ = runs
    pairs = itertools.combinations([*runs[reference], *runs.get(CONTROL, [])], 2)
    seeds = max((max(figures.apart(*pair)) for pair in pairs), default=None)
    if seeds is None:
        return
    expected = {WAYS["cpu4"].title, WAYS["parts4"].title}
    of = {title: dict(zip(groups[title], runs[title], strict=True)) for title in runs}
    for one, other in itertools.combinations(of, 2):
        both = of[one].keys() & of[other].keys()  # none with the control
        after = zip(*(figures.apart(of[one][s], of[other][s]) for s in both), strict=True)
        distances = [*map(max, after)]
        if both and (sentences.is_near(max(distances), seeds) or {one, other} == expected):
            page.add(sentences.coincidence(one, other, distances, seeds))


def add_disagreements(page: Page, answers: Answers) -> None:
    of, count = answers.of, len(answers.targets)
    if len(of) < 2:
        return
    shares = {(one, other): figures.disagreement(of[one], of[other]) for one in of for other in of}
    page.add("Per cent of the validation images on which two trainings give different answers:")
    rows = []
    for one in of:
        cells = ["" if (s := shares[one, other]) is None else f"{100 * s:.1f}" for other in of]
        rows.append([f"**{one}**", *cells])
    page.add(table(["", *of], rows))
    page.add(
        "Two trainings are compared with the same seed where they share one, and averaged over all "
        "such seeds. The diagonal compares the seeds of one training. The answers are those of the "
        "last epoch's models, computed in float32."
    )
    reference, *others = of
    seeds = shares[reference, CONTROL if CONTROL in of else reference]
    found = {t: s for t in others if t != CONTROL and (s := shares[t, reference]) is not None}
    if found and seeds is not None:
        said = sentences.disagreements(found, reference, seeds, count)
        page.add(said)
        page.conclude(said)


def add_sheets(page: Page, groups: Groups, data: str) -> None:
    """What two of the models see differently, and what the last of them gets wrong."""
    named = {title: first(runs) for title, runs in groups.items() if title != CONTROL}
    (one, *_), (*_, other) = named, named
    a, b = (page.folder / named[title] / "checkpoint.pth" for title in (one, other))
    if one != other:
        caption = f"Images on which {one} (a) and {other} (b) disagree"
        look = "Green answers are right. Look for images that are hard for you as well."
        page.attempt(add_sheet, "disagreements", caption, look, data, a, b)
    caption, look = f"What {other} gets wrong", "Look for what these images have in common."
    page.attempt(add_sheet, "misclassified", caption, look, data, "--misclassified", b)


def add_sheet(page: Page, name: str, title: str, look: str, data: str, *flags: object) -> None:
    """Compare models; the first lines of the contact sheet become a small JPEG."""
    folder = page.folder / name
    flags = (*flags, "--data", data, "--output-dir", folder)
    if not page.run({name: script("diff_eval.py", *flags)}):
        return
    path = page.pictures / f"{name}.jpg"
    with Image.open(folder / SHEET) as sheet, writing(path) as temporary:
        height = min(sheet.height, HEAD + SHEET_LINES * (THUMBNAIL + 8 + LABEL))
        sheet.crop((0, 0, sheet.width, height)).save(temporary, "JPEG", quality=80)
    classes, *_ = page.steps.output(name, "=> classes").splitlines()
    page.add(
        figure(
            f"{title}, of {classes.removeprefix('=> ')}. The surest answers come first; {folder} "
            f"has all of them. {look}",
            {title: path.name},
        )
    )
    if (comparison := folder / COMPARISON).exists():  # of two models
        found = json.loads(comparison.read_text("utf-8"))
        page.add(f"Of these two classes' {found['count']} validation images: {found['sentence']}.")


def add_language_models(page: Page, groups: Groups) -> None:
    rows, runs, parameters, tests = [], {}, [], {}
    for model, names in groups.items():
        runs[model] = [read_curves(page.folder / f"{name.lower()}.logs") for name in names.values()]
        ends = [page.steps.output(name, "| End of training") for name in names.values()]
        tests[model] = [float(re.findall(r"test ppl +(\S+)", end)[0]) for end in ends]
        network, _ = restore_model(load(page.folder / f"{first(names).lower()}.pt"))
        parameters.append(sum(p.numel() for p in network.parameters()))
        valid = figures.mean_curves(runs[model])["Perplexity/val"]
        least = min(valid, key=valid.__getitem__)
        best = [min(run["Perplexity/val"].values()) for run in runs[model]]
        seconds = fmean(map(page.steps.seconds, names.values()))
        rows.append([model, f"{parameters[-1]:,}", least, spread(best), spread(tests[model])])
        rows[-1].append(f"{seconds:.0f} s")
    head = ["model", "parameters", "best epoch", "validation perplexity", "test perplexity", "time"]
    page.add(table(head, rows))
    page.add(
        "Means of the seeds, and from the least to the greatest. A training's perplexity is that "
        "of its own best epoch; the best epoch here is that of the seeds' mean, counted from 1."
    )
    means = {model: figures.mean_curves(curves) for model, curves in runs.items()}
    order = sentences.ranking(tests)
    better = sentences.improving({model: mean["Perplexity/val"] for model, mean in means.items()})
    page.add(sentences.sizes(parameters), order, better)
    draw_curves(runs, ["Loss"], page.pictures / "text_loss.png")
    draw_curves(runs, ["Perplexity"], page.pictures / "text_perplexity.png")
    page.add(
        figure(
            "Solid: validation text. Dashed: training text, with dropout, and averaged over an "
            "epoch in which the model improves. Where the solid line is flat, more epochs of this "
            "schedule bring nothing; if the dashed line still falls there, the model learns its "
            f"training text by heart.{BANDS}{BEYOND}",
            {"Loss by epoch": "text_loss.png", "Perplexity by epoch": "text_perplexity.png"},
        )
    )
    page.add(bullets(sentences.over_fitting(means)))
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
            caption = (
                "Every parameter under its name (blue), and what carries gradients back. Look for "
                "the layers, one after the other, and in each for the two additions by which "
                "gradients pass around attention and around the linear layers."
            )
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
    shown, _, findings = page.steps.output("context", "Loss of ").partition("\n\n")
    found = figures.read_contexts(page.pictures / CONTEXT_CSV)
    rows = []
    for model, path in models.items():
        checkpoint = load(path)
        network, window = restore_model(checkpoint)[0], checkpoint.value("bptt", int) or 35
        layers, multiply_adds = figures.cost(network, window)
        unlimited = f"no limit (gradients reach {window})"
        can = {
            "Transformer": [f"the {window} words of its window", "1", "from the words themselves"],
            "LSTM": [unlimited, "1 for each word between", "fixed, with gates"],
            "CNN": [f"{network.receptive_field} words", "at most 1 a layer", "fixed, with a gate"],
        }[model]
        needs = f"{found[model]['effective context']:.0f} of {found[model]['most']:.0f}"
        costs = [f"{layers:,}", f"{multiply_adds:,}"]
        rows.append([model, *can, *costs, needs, f"{found[model]['loss']:.3f}"])
    answer = sentences.context(found)
    page.add(f"{sentences.allowed([*models])} {answer}")
    head = ["model", "can see", "steps to a prediction", "weights of the words seen"]
    head += ["parameters in its layers", "multiply-adds a word", "words it needs", "loss (nats)"]
    page.add(table(head, rows))
    page.add(
        "The last two columns are measured, with the first seed's models: the words that a model "
        "needs to come within 1 % of its lowest loss, of those that it was shown, and its loss "
        "with all of them. The others follow from the architecture."
    )
    caption = (
        "Left: the loss of a word by how many words before it a model was shown. Where a line is "
        "flat, more words do not help. Its bands are of the distance from the model's own lowest "
        "loss, so they do not compare models. Right: how much the loss rises when only the nearest "
        "words stay in order. Where it is zero, the order of words further back does not matter. "
        "Bands are two standard errors to either side."
    )
    page.add(figure(caption, {"Loss by context, and by words in order": CONTEXT_PICTURE}))
    page.add(fenced(shown), bullets(findings.splitlines()))
    page.conclude("**Context** (the first seed's models):", answer)


def add_head(page: Page, args: argparse.Namespace, argv: Sequence[str]) -> None:
    gpus, cores = torch.cuda.device_count(), os.cpu_count()
    page.add(
        "# Report",
        f"Images: `{args.data}`; text: `{args.text}`. On {cores} CPU core{'s' * (cores != 1)} and "
        f"{gpus or 'no'} GPU{'s' * (gpus != 1)}, with torch {torch.__version__} and Python "
        f"{platform.python_version()}.",
        folded(
            "the command that made this page", fenced(shlex.join(script("reproduce.py", *argv)))
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
    add_head(page, args, sys.argv[1:] if argv is None else argv)

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
                f"language models of {args.text_epochs}; how long is said after two epochs of each"
            )
        trained = page.steps.run(images, args.epochs)  # before section 1, which looks into one
        if "sizes" in args.only:
            page.attempt(add_sizes, args, image_settings)
        if images:
            add_images(page, images, trained, args)
        models = page.steps.run(texts, args.text_epochs)
        if texts:
            page.add("## 4. Language models")
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
