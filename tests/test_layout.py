"""The house: arrows between modules run down only, and nothing grows too long."""

import ast
from collections.abc import Iterator

import pytest
from kit import KIT

# What a folder's modules may import beside their own folder.
BELOW = {"engine": (), "image_classification": ("engine",), "word_language_model": ("engine",)}
BELOW |= {"report": ("engine", "image_classification", "word_language_model")}
COMMANDS = sorted(path.stem for path in KIT.glob("*.py"))
PRODUCT = sorted([*KIT.glob("*.py"), *(path for f in BELOW for path in KIT.glob(f"{f}/**/*.py"))])
LONGEST_COMMAND = 530  # lines
LONGEST_FUNCTION = 80  # lines


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and first name of every import in a module of `package`, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            yield node.lineno, package
        elif isinstance(node, ast.ImportFrom):  # from above the package
            for alias in node.names:
                yield node.lineno, (node.module or alias.name).split(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value).split(".")[0]


def arrows_up(source: str, folder: str) -> list[str]:
    """Imports by which a module of `folder` knows of what is beside or above it."""
    ours = {*BELOW, *COMMANDS}
    allowed = {folder, *BELOW[folder]}
    found = sorted(imported(ast.parse(source), folder))
    return [f"line {line}: {name}" for line, name in found if name in ours - allowed]


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{node.name}: {length} lines")
    return found


def test_the_house_is_what_these_tests_look_at() -> None:
    names = [path.relative_to(KIT).as_posix() for path in PRODUCT]
    assert {"resnet_main.py", "engine/run.py", "image_classification/data.py"} < {*names}
    assert "word_language_model/data.py" in names
    assert {"resnet_main", "predict", "lm_main", "lm_generate", "diff_eval"} < {*COMMANDS}


@pytest.mark.parametrize("folder", BELOW)
def test_arrows_run_down_only(folder: str) -> None:
    found = {
        path.name: up
        for path in PRODUCT
        if path.parent.name == folder and (up := arrows_up(path.read_text(), folder))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("folder", "source", "found"),
    [
        ("engine", "import torch\nfrom engine import cli\nimport engine.files", []),
        ("engine", "from image_classification.data import ImageData", ["image_classification"]),
        ("engine", "def f():\n    import word_language_model.data", ["word_language_model"]),
        ("engine", "def f():\n    from resnet_main import main", ["resnet_main"]),
        ("engine", "if TYPE_CHECKING:\n    import torch, lm_main as x", ["lm_main"]),
        ("engine", "importlib.import_module('lm_generate')", ["lm_generate"]),
        ("engine", "from ..image_classification import data", ["image_classification"]),
        ("image_classification", "from engine import run\nfrom . import data", []),
        ("image_classification", "from word_language_model import data", ["word_language_model"]),
        ("image_classification", "import diff_eval", ["diff_eval"]),
        ("word_language_model", "from word_language_model import data\nimport engine.cli", []),
        ("word_language_model", "class A: import image_classification", ["image_classification"]),
        ("word_language_model", "async def f():\n    __import__('lm_main')", ["lm_main"]),
        ("word_language_model", "from .. import model_summary", ["model_summary"]),
        ("report", "from word_language_model.model import model_class", []),
        ("report", "import reproduce", ["reproduce"]),
        ("image_classification", "import report.page", ["report"]),
    ],
)
def test_an_arrow_that_runs_up_is_found(folder: str, source: str, found: list[str]) -> None:
    assert [line.split(": ")[1] for line in arrows_up(source, folder)] == found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_read_in_one_sitting(command: str) -> None:
    assert len((KIT / f"{command}.py").read_text().splitlines()) <= LONGEST_COMMAND


@pytest.mark.parametrize("command", ["resnet_main", "lm_main"])
def test_a_training_tells_its_story_in_order(command: str) -> None:
    source = (KIT / f"{command}.py").read_text()
    build = source[source.index("def build(") :]
    story = ("build_model(", "= torch.optim.", "run.prepare(", "run.resume(", "run.epochs(")
    places = [build.index(call) for call in story]
    assert places == sorted(places)


def test_a_function_fits_a_screen() -> None:
    found = {path.name: long for path in PRODUCT if (long := long_functions(path.read_text()))}
    assert found == {}
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions(f"class A:\n  def f(self):\n{body}") == ["f: 81 lines"]
