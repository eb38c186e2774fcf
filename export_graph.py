"""Draw a model's autograd graph, with the parameters under their names.

python export_graph.py                          # the Transformer: transformer_arch.pdf
python export_graph.py --model LSTM --format svg
python export_graph.py --arch resnet50          # any classifier; --resnet is resnet18
python export_graph.py --checkpoint model.pt --show-shapes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import graphviz
import torch
import torchviz
from torch import nn

import checkpoint as checkpoints
import image_checkpoint
import image_model
import lm_checkpoint
import lm_model
import runtime
from files import whole_or_absent
from image_model import DEFAULT_ARCH, DEFAULT_SIZE, DEFAULT_STEM
from runtime import UserError

# lm_main.py's defaults, and the words of WikiText-2.
LM_SPEC = lm_model.ModelSpec(
    "Transformer", words=33_278, emsize=200, nhid=200, nlayers=2, nhead=2, tied=False
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = runtime.ArgumentParser(description="Draw a model's autograd graph with Graphviz")
    add = parser.add_argument
    # fmt: off
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=lm_model.MODELS, default="Transformer",
                       help="language model (default: %(default)s)")
    which.add_argument("--resnet", action="store_const", dest="arch", const=DEFAULT_ARCH,
                       help=f"the classifier {DEFAULT_ARCH}")
    which.add_argument("-a", "--arch", metavar="ARCH", help="any classifier")
    which.add_argument("--checkpoint", type=Path, metavar="PATH",
                       help="the model that it holds, of resnet_main.py or lm_main.py")
    add("--format", choices=("pdf", "svg", "png", "gv"), help="(default: the output's, or pdf)")
    add("--output", type=Path, metavar="PATH", help="(default: MODEL_arch.FORMAT)")
    add("--show-shapes", action="store_true",
        help="sizes and saved tensors of every operation, beside those of the parameters")
    # fmt: on
    args = parser.parse_args(argv)

    suffix = args.output.suffix[1:] if args.output else ""
    file_format = args.format or (suffix if suffix in ("pdf", "svg", "png", "gv") else "pdf")
    name, model, output = trace(args.model, args.arch, args.checkpoint)
    path = args.output or Path(f"{name.lower()}_arch.{file_format}")
    runtime.check_writable(path.absolute().parent, "--output")

    # torchviz walks the graph by recursion, a few frames an operation.
    sys.setrecursionlimit(100_000)
    graph = torchviz.make_dot(
        output,
        params=dict(model.named_parameters()),
        show_attrs=args.show_shapes,
        show_saved=args.show_shapes,
    )
    graph.attr(label=f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    write(graph, path, file_format)
    print(f"=> {path}")


def trace(
    kind: str, arch: str | None, checkpoint: Path | None
) -> tuple[str, nn.Module, torch.Tensor]:
    """Name, model and output: of one word for a language model, of one image for a classifier."""
    model: nn.Module
    if checkpoint is not None:
        content = checkpoints.load(checkpoint)
        if "vocabulary" in content:
            kind = str(content.get("model"))
            model, _ = lm_checkpoint.restore_model(content, checkpoint)
        else:
            spec = image_checkpoint.read_spec(content, checkpoint, None, None)
            model, arch = image_model.build_model(spec), spec.arch
            image_checkpoint.load_weights(model, content, checkpoint, arch)
    elif arch is not None:
        image_model.check_architecture(arch)
        stem = DEFAULT_STEM if image_model.has_stem(arch) else None
        spec = image_model.ModelSpec(arch, stem, 200, DEFAULT_SIZE)
        model = image_model.build_model(spec)
    else:
        model = lm_model.build_model(LM_SPEC._replace(model=kind), dropout=0.0)
    model.eval()  # dropout is no part of the architecture
    if arch is not None:
        return arch, model, model(torch.zeros(1, 3, spec.image_size, spec.image_size))
    assert isinstance(model, lm_model.LanguageModel)
    word = torch.zeros(1, 1, dtype=torch.long)
    features, _ = model.features(word, model.initial_hidden(1))
    return kind, model, model.decoder(features)


def write(graph: graphviz.Digraph, path: Path, file_format: str) -> None:
    """Render `graph`, or write its source alone when the system has no Graphviz.

    Raises:
        UserError: no `dot`; names the source that was written and how to go on. A full disk.
    """
    failure = None
    try:
        content = graph.source.encode() if file_format == "gv" else graph.pipe(file_format)
    except graphviz.ExecutableNotFound:
        source = path.with_suffix(".gv")
        failure = UserError(
            f"Graphviz's program dot is not installed, so only {source} was written: install it "
            f"(apt install graphviz, brew install graphviz), then dot -T{file_format} {source} "
            f"-o {path}"
        )
        path, content = source, graph.source.encode()
    try:
        with whole_or_absent(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if failure is not None:
        raise failure


if __name__ == "__main__":
    runtime.run_script(main)
