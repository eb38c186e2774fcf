"""The README's story is run from top to bottom, smaller; the commands of all pages are parsed."""

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from kit import KIT, image, make_corpus, make_dataset, run

PAGES = [KIT / "README.md", *sorted((KIT / "docs").glob("*.md"))]

# What each script gets beside its flags, so that it takes a second.
SMALLER = {
    "resnet_main.py": "--epochs 1 -b 8 -j 1 --image-size 32 --stem stock --lr 0.001",
    "predict.py": "",
    "diff_eval.py": "-j 1",
    "model_summary.py": "",
    "export_graph.py": "--format gv",
    "lm_main.py": "--epochs 1 --emsize 8 --nhid 8 --nlayers 1",
    "lm_generate.py": "",
    "lm_context.py": "--words 20 --max-context 4",
}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a page's ```bash blocks, or after $ or ! in its others."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash" or line.startswith(("$ ", "!")):
                yield shlex.split(line.removeprefix("$ ").removeprefix("!"), comments=True)


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The kit's script that a command starts and its flags, once what starts it is checked."""
    while "=" in words[0]:  # of the environment
        words = words[1:]
    first, *rest = words
    if first == "python":
        return rest[0], rest[1:]
    if first == "accelerate":
        assert rest.pop(0) == "launch"
        args = launch_command_parser().parse_known_args(rest)[0]
        assert (KIT / args.config_file).is_file()
        return args.training_script, args.training_script_args
    if first in ("torchrun", "sbatch", "bash"):
        i = next(i for i, word in enumerate(rest) if word.endswith("_main.py"))
        if first != "torchrun":
            batch = rest[i - 1].removeprefix("/code/")  # where a container has the kit
            assert subprocess.run(["bash", "-n", KIT / batch]).returncode == 0
        return rest[i], rest[i + 1 :]
    if first == "make":
        dry = subprocess.run(["make", "-n", *rest], cwd=KIT, capture_output=True, text=True)
        assert dry.returncode == 0, dry
    else:
        others = (
            "git clone URL kit",
            "cd kit",
            ". .venv/bin/activate",
            "tensorboard --logdir output",
            "pip install -q -r requirements.txt",
        )
        assert shlex.join(words) in others
    return None


class Parsed(Exception):
    """Flags are what their script takes."""


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts end once they know their flags."""
    whole = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: object) -> None:
        whole(self, *args)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parse(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(Parsed):
        if Path(script).parent == Path():
            importlib.import_module(Path(script).stem).main(flags)
        else:
            runpy.run_path(str(KIT / script))["main"]()


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """In a folder that has the downloads, small, each with what the commands before it made."""
    make_dataset(tmp_path / "data" / "tiny-imagenet-200", train=4, val=6)
    make_dataset(tmp_path / "data" / "sample", train=4, val=6)
    make_dataset(tmp_path / "path" / "to" / "images", "plain", train=4, val=6)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/another.jpg"):
        image(name, 80).save(tmp_path / name)
    make_corpus(tmp_path / "data" / "wikitext-2")
    make_corpus(tmp_path / "data" / "sample-text")
    text = PAGES[0].read_text()
    shown = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    started = set()
    for words in filter(None, commands(text)):
        found = script_of(words)
        # What SLURM and a container start is parsed below; --help ends a script at once.
        if found is None or words[0] in ("sbatch", "bash") or words[-1] == "--help":
            continue
        script, flags = found
        started.add(script)
        if place := re.search(r"gpu(\d)\.yaml (?:--num_processes (\d) )?resnet", " ".join(words)):
            # As on such a machine.
            flags += ["--output-dir", f"output/resnet18-gpu{place[2] or place[1]}"]
        result = run(script, *flags, *SMALLER[script].split(), cwd=tmp_path)
        assert (result.code, result.err.count("error")) == (0, 0), (script, flags, result)
        if script == "model_summary.py":
            assert any(block in result.out for block in shown), result.out
    assert started == {*SMALLER}
    assert len([*(tmp_path / "output").rglob("events.out.tfevents.*")]) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_commands_are_parsed(
    page: Path, parsing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text().replace("%a", "1")  # as the first task of an array gets it
    for words in filter(None, commands(text)):
        if (found := script_of(words)) and "--help" not in words:
            parse(*found, monkeypatch)


def test_a_renamed_flag_is_found(parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "```bash\npython lm_main.py --model CNN  # text\npython lm_main.py --modl CNN\n```\n"
    right, wrong = filter(None, (script_of(words) for words in commands(page)))
    parse(*right, monkeypatch)
    with pytest.raises(Exception, match="unrecognized arguments: --modl CNN"):
        parse(*wrong, monkeypatch)


def test_pages_hold_together() -> None:
    """Links lead somewhere, pictures are small, and the README is short."""
    assert len(PAGES[0].read_text().splitlines()) <= 200
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.is_file(), (page, target)
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
                assert anchor in {
                    re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
                }
    for picture in (KIT / "docs").iterdir():
        assert picture.stat().st_size < 300_000, picture
