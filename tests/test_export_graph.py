"""The graphs of the models, with and without Graphviz's program on the machine."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kit import error_line, run
from torchvision import models

from image_classification import model as image_model
from image_classification.settings import ModelSpec
from word_language_model import model as lm_model
from word_language_model import settings as lm_settings

DOT = pytest.mark.skipif(not shutil.which("dot"), reason="needs Graphviz's dot")
SMALL = lm_settings.ModelSpec("GRU", words=9, emsize=4, nhid=4, nlayers=1, nhead=2, tied=False)


@pytest.mark.graphviz
@DOT
def test_the_default_is_a_pdf_of_the_transformer(tmp_path: Path) -> None:
    result = run("export_graph.py", cwd=tmp_path)
    assert result == (0, "=> transformer_arch.pdf\n", "")
    pdf = tmp_path / "transformer_arch.pdf"
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert len(re.findall(rb"/Type */Page\b", pdf.read_bytes())) == 1
    if not shutil.which("pdftotext"):
        pytest.skip("needs pdftotext (poppler-utils) to look for the names in the PDF")
    text = subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True)
    model = lm_model.build_model(SMALL._replace(model="Transformer", nlayers=2), dropout=0.0)
    assert not [n for n, _ in model.named_parameters() if n not in text.stdout]
    assert "(33278, 200)" in text.stdout


@pytest.mark.graphviz
@DOT
@pytest.mark.parametrize("file_format", ["svg", "png"])
def test_other_formats(file_format: str, tmp_path: Path) -> None:
    run("export_graph.py", "--model", "LSTM", "--format", file_format, cwd=tmp_path)
    content = (tmp_path / f"lstm_arch.{file_format}").read_bytes()
    if file_format == "svg":
        assert b"rnn.weight_hh_l1" in content and b"decoder.bias" in content
    else:
        assert content.startswith(b"\x89PNG")


def test_a_graph_is_what_dot_draws(tmp_path: Path) -> None:
    """A dot that tells its flags and repeats the graph."""
    dot = tmp_path / "bin" / "dot"
    dot.parent.mkdir()
    dot.write_text('#!/bin/sh\necho "$@"\ncat\n')
    dot.chmod(0o755)
    path = {"PATH": f"{dot.parent}:{os.environ['PATH']}"}
    result = run("export_graph.py", "--model", "GRU", "--format", "svg", cwd=tmp_path, env=path)
    assert result == (0, "=> gru_arch.svg\n", "")
    flags, graph = (tmp_path / "gru_arch.svg").read_text().split("\n", 1)
    assert flags == "-Kdot -Tsvg"
    assert graph.startswith("digraph {") and "rnn.weight_hh_l1" in graph
    assert not [*tmp_path.glob("*.gv")]
    result = run("export_graph.py", "-a", "densenet121", "--format", "svg", cwd=tmp_path, env=path)
    first, last = result.out.splitlines()
    assert re.fullmatch(r"=> 1,\d{3} nodes and 1,\d{3} edges: dot takes .* minutes .*", first)
    assert last == "=> densenet121_arch.svg"


def test_without_dot_the_source_is_written(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dot").touch()  # and may not be run, as what another user's folder holds
    no_dot = {"PATH": "/nowhere"}
    result = run(
        "export_graph.py", "--model", "GRU", "--output", "a b.png", cwd=tmp_path, env=no_dot
    )
    how = "to be drawn by Graphviz (apt, brew or conda install it)"
    assert result == (0, f"=> a b.gv, {how}: dot -Tpng 'a b.gv' -o 'a b.png'\n", "")
    assert not (tmp_path / "a b.png").exists()
    no_dot = {"PATH": str(tmp_path / "bin")}
    result = run("export_graph.py", "--resnet", cwd=tmp_path, env=no_dot)
    assert result.code == 0, result
    assert "dot -Tpdf resnet18_arch.gv -o resnet18_arch.pdf" in result.out
    source = (tmp_path / "resnet18_arch.gv").read_text()
    model = image_model.build_model(ModelSpec("resnet18", "stride1", 200, 64))
    assert not [name for name, _ in model.named_parameters() if name not in source]
    assert [p.name for p in tmp_path.glob("resnet*")] == ["resnet18_arch.gv"]


def test_checkpoints_and_shapes(tmp_path: Path) -> None:
    spec = ModelSpec("resnet152", "cifar", 5, 32)  # deep enough for Python's recursion limit
    state = image_model.build_model(spec).state_dict()
    torch.save({**spec._asdict(), "state_dict": state}, tmp_path / "image.pth")
    content = {**SMALL._asdict(), "vocabulary": [f"word{i}" for i in range(9)]}
    content["state_dict"] = lm_model.build_model(SMALL, dropout=0.0).state_dict()
    torch.save(content, tmp_path / "model.pt")
    for checkpoint, name in (("image.pth", "resnet152"), ("model.pt", "gru")):
        flags = ("--checkpoint", checkpoint, "--format", "gv", "--output", f"{name}.gv")
        assert run("export_graph.py", *flags, cwd=tmp_path).code == 0
    torch.save(models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "bare.pth")
    bare = ("--checkpoint", "bare.pth", "-a", "squeezenet1_1", "--format", "gv")
    assert run("export_graph.py", *bare, cwd=tmp_path).code == 0
    assert "features.3.squeeze.weight" in (tmp_path / "squeezenet1_1_arch.gv").read_text()
    sized = ("-a", "inception_v3", "--image-size", 96, "--output", "inception.gv")
    assert run("export_graph.py", *sized, cwd=tmp_path).code == 0
    assert "layer3.35.conv3.weight" in (tmp_path / "resnet152.gv").read_text()
    plain = (tmp_path / "gru.gv").read_text()
    assert "rnn.weight_ih_l0\n (12, 4)" in plain
    more = ("--output", "shapes.gv", "--show-shapes")
    assert run("export_graph.py", "--checkpoint", "model.pt", *more, cwd=tmp_path).code == 0
    shapes = (tmp_path / "shapes.gv").read_text()
    assert "sym_sizes" in shapes and "sym_sizes" not in plain


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    spec = ModelSpec("resnet18", "cifar", 5, 32)
    state = image_model.build_model(spec).state_dict()
    torch.save({**spec._asdict(), "state_dict": state}, tmp_path / "image.pth")
    content = {**SMALL._asdict(), "vocabulary": [f"word{i}" for i in range(9)]}
    content["state_dict"] = lm_model.build_model(SMALL, dropout=0.0).state_dict()
    torch.save(content, tmp_path / "gru.pt")
    for flags, message in {
        ("--arch", "resnet19"): "did you mean",
        ("--model", "BERT"): "invalid choice: 'BERT'",
        ("--checkpoint", "text.pt"): "no checkpoint",
        ("--model", "GRU", "--resnet"): "not allowed with argument",
        ("--model", "GRU", "--checkpoint", "text.pt"): "not allowed with argument --model",
        ("--output", "text.pt/x.pdf"): "cannot write to",
        ("--output", "x.pdf", "--format", "svg"): "--output x.pdf would be a file of --format svg",
        ("--output", "x.jpg"): "--output x.jpg: give --format, or a name in .pdf, .svg, .png, .gv",
        ("--resnet", "--image-size", "0"): "must be at least 1",
        ("--image-size", "64"): "--image-size is for classifiers, and a Transformer takes words",
        ("--arch", "maxvit_t", "--image-size", "64"): "use --image-size 224",
        ("--arch", "resnet50", "--checkpoint", "image.pth"): "has arch resnet18, not resnet50",
        ("--resnet", "--checkpoint", "gru.pt"): "gru.pt: holds the language model GRU, not a resn",
    }.items():
        assert message in error_line(run("export_graph.py", *flags, cwd=tmp_path))
