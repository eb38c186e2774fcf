"""Draw a model's autograd graph, with the parameters under their names.

    python export_graph.py                          # the Transformer: transformer_arch.pdf
    python export_graph.py --model LSTM --format svg
    python export_graph.py --arch resnet50          # any classifier; --resnet is resnet18
    python export_graph.py --checkpoint model.pt --show-shapes

The default is the forward pass of one word: 145 nodes, and 13,828,878 parameters.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import ArgumentParser, UserError, filename, pathname, positive_int
from image_classification.settings import DEFAULT
from word_language_model.settings import MODELS

FORMATS = ("pdf", "svg", "png", "gv")  # gv is the graph's source


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=MODELS, help="language model, else Transformer")
    which.add_argument("--resnet", action="store_const", dest="arch", const=DEFAULT.arch,
                       help=f"the classifier {DEFAULT.arch}")
    which.add_argument("-a", "--arch", metavar="ARCH", help="any classifier")
    add("--checkpoint", type=pathname, metavar="PATH",
        help="the model that it holds, of resnet_main.py or lm_main.py; -a for a bare state dict")
    add("--image-size", type=positive_int, metavar="PX",
        help=f"that a classifier takes, else its checkpoint's, else {DEFAULT.image_size}")
    add("--format", choices=FORMATS, help="else the output's, else pdf")
    add("--output", type=filename, metavar="PATH", help="else MODEL_arch.FORMAT")
    add("--show-shapes", action="store_true",
        help="sizes and saved tensors of every operation, beside those of the parameters")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser(), alone=True)


import graphviz
import torch
import torchviz
from torch import nn

from engine import checkpoints
from engine.files import check_outputs, writing
from image_classification.checkpoint import as_classifier
from image_classification.checkpoint import restore_model as restore_classifier
from image_classification.model import build_model as build_classifier
from image_classification.settings import default_spec
from word_language_model.checkpoint import restore_model as restore_language_model
from word_language_model.model import LanguageModel
from word_language_model.model import build_model as build_language_model
from word_language_model.settings import ModelSpec

MANY_NODES = 1000  # resnet50 has 499
# lm_main.py's defaults, and the words of WikiText-2.
LM_SPEC = ModelSpec(
    "Transformer", words=33_278, emsize=200, nhid=200, nlayers=2, nhead=2, tied=False
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse(argv)
    if args.checkpoint and args.model:
        parser.error("argument --checkpoint: not allowed with argument --model")

    suffix = args.output.suffix[1:].lower() if args.output else ""
    if suffix and not args.format and suffix not in FORMATS:
        parser.error(f"--output {args.output}: give --format, or a name in .{', .'.join(FORMATS)}")
    if suffix in FORMATS and args.format not in (None, suffix):
        parser.error(f"--output {args.output} would be a file of --format {args.format}")
    file_format = args.format or suffix or "pdf"
    kind = args.model or "Transformer"
    name, model, output = trace(kind, args.arch, args.checkpoint, args.image_size)
    path = args.output or Path(f"{name.lower()}_arch.{file_format}")
    outputs = [("--output", output) for output in {path, path.with_suffix(".gv")}]
    check_outputs(outputs, inputs=[("--checkpoint", args.checkpoint)] if args.checkpoint else [])

    # torchviz walks the graph recursively, a few frames for each operation.
    sys.setrecursionlimit(100_000)
    graph = torchviz.make_dot(
        output,
        params=dict(model.named_parameters()),
        show_attrs=args.show_shapes,
        show_saved=args.show_shapes,
    )
    graph.attr(label=f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    edges = sum("->" in line for line in graph.body)
    nodes = len(graph.body) - edges
    if nodes > MANY_NODES and file_format != "gv":
        print(
            f"=> {nodes:,} nodes and {edges:,} edges: dot takes seconds to arrange so many, and "
            "minutes for a DenseNet's; --format gv writes them as they are"
        )
    written, message = path, f"=> {path}"
    try:
        content = graph.source.encode() if file_format == "gv" else graph.pipe(file_format)
    except (graphviz.ExecutableNotFound, PermissionError):  # the latter of a folder in PATH
        written, content = path.with_suffix(".gv"), graph.source.encode()
        draw = shlex.join(["dot", f"-T{file_format}", str(written), "-o", str(path)])
        message = f"=> {written}, to be drawn by Graphviz (apt, brew or conda install it): {draw}"
    with writing(written) as temporary:
        temporary.write_bytes(content)
    print(message)


def trace(
    kind: str, arch: str | None, checkpoint: Path | None, image_size: int | None
) -> tuple[str, nn.Module, torch.Tensor]:
    """Name, model and output: of one word for a language model, of one image for a classifier.

    Raises:
        UserError: a checkpoint of something else than is asked for.
    """
    model: nn.Module
    if checkpoint is not None:
        content = checkpoints.load(checkpoint)
        if "vocabulary" in content:
            kind = str(content.get("model"))
            if arch is not None:
                raise content.error(f"holds the language model {kind}, not a {arch}")
            model, _ = restore_language_model(content)
        else:
            model, spec = restore_classifier(as_classifier(content), arch, image_size=image_size)
            arch = spec.arch
    elif arch is not None:
        spec = default_spec(arch)
        spec = spec._replace(image_size=image_size or spec.image_size)
        model = build_classifier(spec)
    else:
        model = build_language_model(LM_SPEC._replace(model=kind), dropout=0.0)
    if image_size is not None and arch is None:
        raise UserError(f"--image-size is for classifiers, and a {kind} takes words")
    model.eval()  # dropout is no part of the architecture
    if arch is not None:
        return arch, model, model(torch.zeros(1, 3, spec.image_size, spec.image_size))
    assert isinstance(model, LanguageModel)
    word = torch.zeros(1, 1, dtype=torch.long)
    features, _ = model.features(word, model.initial_hidden(1))
    return kind, model, model.decoder(features)


if __name__ == "__main__":
    run_script(main)
