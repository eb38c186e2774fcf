"""What a report says: sentences that their figures flip, and pages of figures made up here."""

import math
import re
import subprocess
from pathlib import Path

import pytest
from kit import KIT, make_dataset
from matplotlib.figure import Figure
from PIL import Image

import lm_main
import reproduce
import resnet_main
from engine.curves import Curve, draw_curves, draw_panel, usual_limits
from engine.intervals import paired_difference
from image_classification.folders import find_images, readable_names
from report import figures, plan, sentences
from report.figures import Answers, Gap
from report.page import Page, figure, folded, quoted, table
from report.steps import Forecast, Steps
from word_language_model.model import build_model
from word_language_model.settings import ModelSpec


@pytest.mark.parametrize(
    ("gap", "basis", "control", "verdict"),
    [
        (Gap(-0.8, -2.1, 0.5), "images", 1.0, "no more than other images can make."),
        (Gap(-0.04, -2.1, 2.0), "images", None, "no more than other images can make."),
        (Gap(-4.0, -6.1, -1.9), "images", 4.5, "images make, but another seed makes 4.5 points."),
        (Gap(4.0, 1.9, 6.1), "images", 2.5, "images make, but another seed makes 2.5 points."),
        (Gap(4.0, 1.9, 6.1), "images", 1.2, "and over twice what another seed makes (1.2)"),
        (Gap(4.0, 1.9, 6.1), "images", None, "what another seed makes was not measured."),
        (Gap(4.0, 1.9, 6.1), "seeds", None, "from the seeds) against one process, more than other"),
        (Gap(-0.04, -0.5, 0.4), "seeds", None, "no more than other seeds can make."),
    ],
)
def test_a_gap_is_held_against_images_and_seeds(
    gap: Gap, basis: str, control: float | None, verdict: str
) -> None:
    said = sentences.accuracy_gap("bf16", "one process", gap, basis, control)
    assert verdict in said
    assert said.startswith(f"bf16: {round(gap.value, 1) + 0.0:+.1f} points of Acc@1 (95 % ")
    is_beyond = sentences.is_beyond(gap, control)
    assert is_beyond == (abs(gap.value) == 4 and control not in (2.5, 4.5))


def test_several_seeds_give_the_interval_of_their_means() -> None:
    gap = figures.seeds_gap([30.0, 31.0, 32.0], [33.0, 34.0, 35.0])
    # Two-sample t test: standard error sqrt(2/3), 4 degrees of freedom, t 2.776.
    assert gap == pytest.approx((-3, -3 - 2.2666, -3 + 2.2666), abs=1e-3)
    assert figures.seeds_gap([30.0], [31.0]) is None
    uneven = figures.seeds_gap([30.0], [31.0, 32.0])
    assert uneven == pytest.approx((-1.5, -12.50, 9.50), abs=0.01)
    assert figures.seeds_gap([5.0, 5.0], [5.0, 5.0]) == Gap(0, 0, 0)


def test_the_conclusion_on_accuracy_names_what_is_beyond_chance() -> None:
    def said(
        beyond: dict[str, Gap],
        within: dict[str, Gap],
        several: bool = False,
        control: float | None = None,
    ) -> str:
        return sentences.accuracy(beyond, within, "one process", several, control)

    gaps = {"bf16": Gap(-0.8, -2.5, 0.9), "four parts": Gap(0.1, -1.5, 1.7)}
    far, near = {"four processes": Gap(-4.0, -6.0, -2.0)}, {"bf16": Gap(0.1, -1.9, 2.1)}
    none = said({}, gaps)
    assert "(one seed each): no training is further from one process than other images" in none
    assert "(several seeds): no training is further from one" in said({}, gaps, True)
    assert "process both than other images make, and than twice" in said({}, gaps, control=2.0)
    assert none.endswith(
        "largest gap is -0.8 points of Acc@1, of bf16. Gaps below 1.7 points may not show."
    )
    assert said({}, gaps, control=2.0).endswith("Gaps below 4.0 points may not show.")
    both = said(far, near, control=1.0)
    assert "than other images make, and than twice the gap of one other seed, in points" in both
    assert "four processes (-4.0). The others: bf16 (+0.1)." in both
    alone = said(far, {})
    assert "with seeds not measured" in alone and alone.endswith("The others: none.")
    assert "than other seeds make (95 %)" in said(far, {}, True)


@pytest.mark.parametrize(
    ("distances", "verdict"),
    [
        ([0.0, 0.0], "the same to the last digit"),
        ([0.0001, 0.0012], "coincide: their validation losses are at most 0.0012 apart; those of "),
        ([0.05, 0.08], "after the first epoch and 0.080 at most; those of two seeds 0.100. Both"),
        ([0.05, 1.2e12], "are 0.05 apart after the first epoch and 1.2e+12 at most; those of two"),
    ],
)
def test_curves_that_coincide_are_said_to(distances: list[float], verdict: str) -> None:
    assert verdict in sentences.coincidence("four processes", "four parts", distances, 0.1)


@pytest.mark.parametrize(
    ("share", "seeds", "is_more"),
    [(0.19, 0.21, False), (0.22, 0.21, False), (0.4, 0.21, True), (0.0, 0.0, False)],
)
def test_hardware_is_compared_with_seeds(share: float, seeds: float, is_more: bool) -> None:
    line = sentences.disagreements({"bf16": share, "four parts": 0.0}, "it", seeds, 1000)
    assert f"with it: bf16 on {100 * share:.1f} % and four parts on 0.0 % of the images" in line
    assert f"two seeds of it on {100 * seeds:.1f} %" in line
    assert line.endswith(f"Clearly more than two seeds: {'bf16' if is_more else 'none'}.")


def losses(train: list[float], val: list[float]) -> dict[str, Curve]:
    return {"Loss/train": dict(enumerate(train)), "Loss/val": dict(enumerate(val))}


@pytest.mark.parametrize(
    ("train", "val", "verdict"),
    [
        ([3, 2, 1], [3, 2, 1], "No sign of over-fitting"),
        ([1, 2, 3], [2.5, 2, 2.4], "No sign of over-fitting"),
        ([3, 2, 1.99], [2.5, 2, 2.01], "No sign of over-fitting"),
        (
            [3, 2, 1],
            [2.5, 2, 2.4],
            ": **over-fitting**; after epoch 1 its validation loss rises from 2.000 to 2.400 while "
            "its training loss falls from 2.000 to 1.000.",
        ),
        (
            [6.5, 5.17],
            [6.6, 5.87],
            "**first signs of over-fitting**; training loss ends at 5.170 and validation loss at "
            "5.870. This gap has grown from 0.100 after the first epoch to 0.700.",
        ),
        ([5.0, 4.0], [6.0, 4.9], "4.900. This gap has not grown since the first epoch"),
        ([4.0], [6.0], "It: **over-fitting not known after one epoch**; training loss ends at 4.0"),
        ([4.0], [4.0], "No sign of over-fitting"),
        ([4.0, math.nan], [4.0, math.nan], "It: **divergence**"),
        ([4.0, 3.0], [4.0, math.inf], "It: **divergence**"),
    ],
)
def test_over_fitting_is_judged_by_the_gap_and_by_a_rising_loss(
    train: list[float], val: list[float], verdict: str
) -> None:
    (said,) = sentences.over_fitting({"It": losses(train, val)})
    assert verdict in said
    conclusion = sentences.fitting({"It": losses(train, val)})
    assert ("No sign of over-fitting in It" in conclusion) == ("**" not in said)


def test_the_conclusion_on_over_fitting_names_all_that_show_it() -> None:
    rising, level = losses([3, 2, 1], [2.5, 2, 2.4]), losses([3, 2, 1], [3, 2, 1])
    said = sentences.fitting({"one": rising, "two": level, "three": rising})
    assert said == "Over-fitting in one and three."


def test_language_models_are_ranked_as_far_as_their_seeds_agree() -> None:
    clear = sentences.ranking({"LSTM": [389.0, 391.0], "CNN": [371.0, 373.0]})
    assert clear.startswith("Test perplexity: CNN 372.0 (371.0 to 373.0) and LSTM 390.0 (389.0 to")
    assert clear.endswith("Each step of this order is more than other seeds make (95 %).")
    near = sentences.ranking({"LSTM": [376.0, 392.0], "CNN": [370.0, 374.0]})  # yet apart
    assert near.endswith("Other seeds may change this order: CNN before LSTM may be chance.")
    assert "LSTM before CNN may be chance" in sentences.ranking(
        {"LSTM": [389.0, 391.0], "CNN": [math.inf, 373.0]}
    )
    assert "of one seed" in sentences.ranking({"LSTM": [388.0], "CNN": [370.0]})
    assert sentences.ranking({"LSTM": [388.0]}) == "Test perplexity: LSTM 388.0."
    assert "differ by 2.0 % at most." in sentences.sizes([1000, 1020])
    assert "10.0 % at most: a part of" in sentences.sizes([1000, 1100])
    level = {1: 500.0, 2: 400.0, 3: 398.0}
    for flat in (level, {1: 400.0, 2: 500.0}):
        assert "lowers no validation perplexity by over 1 %" in sentences.improving({"LSTM": flat})
    falling = sentences.improving({"LSTM": level, "CNN": {1: 500.0, 2: 400.0, 3: 380.0}})
    assert "of CNN (5.0 %): more epochs may change the order." in falling
    assert "After one epoch" in sentences.improving({"LSTM": {1: 500.0}})


def test_the_answer_on_context_follows_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "context.csv"
    path.write_text(
        "model,measure,words,value,standard_error\n"
        "LSTM,loss,1,6.34,0.1\nLSTM,loss,128,5.99,0.1\nLSTM,loss above lowest,1,0.3,0.1\n"
        "LSTM,loss above best,,0.06,0.02\nCNN,loss above best,,0.0,0.0\n"
        "LSTM,effective context,,16,\nLSTM,effective context low,,8,\n"
        "LSTM,effective context high,,32,\nCNN,loss,7,5.93,0.1\nCNN,rise when shuffled,2,0.1,0\n"
        "CNN,effective context,,4,\nCNN,effective context low,,4,\n"
        "CNN,effective context high,,7,\nCNN,receptive field,,7,\n"
    )
    found = figures.read_contexts(path)
    assert found["CNN"] == {
        **{"loss": 5.93, "most": 7, "effective context": 4, "effective context low": 4},
        **{"effective context high": 7, "receptive field": 7},
        **{"loss above best": 0, "loss above best error": 0},
    }
    assert sentences.context(found).startswith(
        "Words needed to come within 1 % of a model's lowest loss (tried: 1, 2, 4, … and the most "
        "that it was shown): the LSTM 16 (95 % interval 8 to 32) and the CNN 4 (95 % interval 4 to "
        "7). The CNN has the lowest loss (5.93), although the longest context is that of the LSTM:"
    )
    chance = sentences.context(found | {"LSTM": found["LSTM"] | {"loss above best error": 0.04}})
    assert chance.endswith(
        "The CNN has the lowest loss (5.93), by no more than chance beside the LSTM, and the "
        "longest context is that of the LSTM."
    )
    behind = found["CNN"] | {"loss above best": 0.9}
    best = sentences.context({"LSTM": found["LSTM"] | {"loss": 5.0}, "CNN": behind})
    assert best.endswith(
        "The LSTM has the lowest loss (5.00), and the longest context is that of the LSTM."
    )
    equal = sentences.context(found | {"CNN": found["CNN"] | {"effective context high": 8}})
    assert equal.endswith("none clearly needs more words than the others.")
    assert sentences.context({"CNN": found["CNN"]}).endswith("the CNN 4 (95 % interval 4 to 7).")
    assert sentences.allowed(["CNN"]).startswith("A CNN has its nearest words a few steps")


def test_the_costs_of_language_models_are_those_of_their_weights() -> None:
    spec = ModelSpec("LSTM", 1000, 200, 200, 2, 2, False)
    lstm = figures.cost(build_model(spec, 0.2), 35)
    assert lstm == (643_200, 200 * 1000 + 640_000)
    wide = build_model(spec._replace(model="Transformer", nhid=400), 0.2)
    layers, multiply_adds = figures.cost(wide, 35)
    assert layers == pytest.approx(lstm[0], rel=0.01)  # as plan.text_trainings wants it
    # Of each layer: attention's four and the second half's two products, and keys and values.
    weights = 4 * 200 * 200 + 2 * 200 * 400
    assert multiply_adds == 2 * (weights + 200 * 36) + 200 * 1000
    tied = figures.cost(build_model(ModelSpec("CNN", 1000, 20, 20, 1, 2, True), 0.2), 35)
    assert tied == (20 * 40 * 4 + 40, 20 * 1000 + 20 * 40 * 4)


def test_answers_are_compared_image_by_image(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text(
        "file,rank,class,name,likelihood\n./x/b.png,1,n2,two,0.9\nx/a.png,1,n1,one,0.8\n"
    )
    assert figures.read_answers(path, ["x/a.png", "./x/b.png"]) == ["n1", "n2"]
    with pytest.raises(KeyError):
        figures.read_answers(path, ["x/c.png"])
    answers = Answers([*"aaabb"], {"it": {1: [*"aabbc"]}, "other": {1: [*"abbaa"]}})
    low, high = paired_difference(2, 0, 5)
    assert answers.gap("it", "other") == Gap(40, 100 * low, 100 * high)
    assert answers.gap("it", "a third") is None
    one, other = {1: [*"aabb"], 2: [*"aaaa"]}, {1: [*"aabb"], 3: [*"bbbb"]}
    assert figures.disagreement(one, other) == 0.0  # of the seed that both have
    assert figures.disagreement(one, {3: [*"bbbb"]}) == 0.75  # without one, of all
    assert figures.disagreement(one, one) == 0.5  # of two seeds
    single = {1: [*"aabb"]}
    assert figures.disagreement(single, single) is None


def test_a_panel_is_not_squeezed_by_one_value(tmp_path: Path) -> None:
    assert usual_limits([2.0, 1.8, 1.6, 1.5, 9.3]) == pytest.approx((1.475, 2.025))
    for usual in ([2.0, 1.8, 1.6, 1.5, 2.2], [1.0, 9.0], [2.0, 2.0, 2.0, 2.0, 9.0], []):
        assert usual_limits(usual) is None
    # Of two seeds one is far off: neither its band nor the mean squeezes the rest.
    train = [2.1, 1.9, 1.8, 1.7]
    runs = [losses(train, [first, 1.6, 1.5, 1.5]) for first in (2.0, 30.0)]
    axes = Figure().subplots()
    draw_panel(axes, {"one": runs}, "Loss")
    assert axes.get_ylim() == pytest.approx((1.47, 2.13))
    assert [text.get_text() for text in axes.texts] == [" 30 ↑ "]
    runs = [losses([9.3, 1.9, 1.8, 1.7], [2.0 + s, 1.6, 1.5, 1.5]) for s in (0.0, 0.1)]
    draw_curves({"one": runs, "other": [{}]}, ["Loss"], tmp_path / "p" / "loss.png")
    assert Image.open(tmp_path / "p" / "loss.png").size == (450, 360)


def test_a_page_folds_commands_and_shows_figures_with_captions(tmp_path: Path) -> None:
    page = Page(Steps(tmp_path / "out", {}, {}))
    page.pictures.mkdir()
    for name, width in (("small.png", 450), ("wide.png", 1200)):
        Image.new("RGB", (width, 40)).save(page.pictures / name)
    page.add("# Report", "Text.", folded("the command", "```text\npython x.py --a <b>\n```"))
    page.add(figure("What to *see*.".replace("*", ""), {"one": "small.png", "two": "wide.png"}))
    page.add(table(["a", "b"], [["1", "2"]]), quoted("so <unk> *is* it\n <eos> and  on"))
    page.conclude("First.", "More.")
    page.conclude("Second.")
    page.write()
    text, html = ((tmp_path / "out" / f"report.{end}").read_text() for end in ("md", "html"))
    assert text.startswith("# Report\n\n- First. More.\n- Second.\n\nText.")
    assert "<summary>the command</summary>" in html and "--a &lt;b&gt;" in html
    assert '<code class="language-text">python' in html and "```" not in html
    assert html.count("<figure>") == 1 and "<figcaption>What to see.</figcaption>" in html
    assert html.count("<div class='scroll'>") == 2  # the wide picture and the table
    assert "<blockquote>so &lt;unk&gt; *is* it <br> and on</blockquote>" in html


def test_a_machine_trains_what_it_can_with_the_seeds_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*flags: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        args = reproduce.make_parser().parse(flags)
        settings = plan.check_flags("--text-flags", args.text_flags, lm_main)
        return plan.image_trainings(args), plan.text_trainings(args, settings)

    monkeypatch.setattr(plan, "emulates_bf16", lambda _device: True)
    images, texts = planned()
    assert [*images] == ["cpu-seed1", "cpu-seed2", "cpu4-seed1", "parts4-seed1"]
    assert [*texts] == [f"{m}-seed{n}" for m in ("Transformer", "LSTM", "CNN") for n in (1, 2)]
    pairs = zip(images["cpu-seed1"], images["cpu-seed2"], strict=True)
    folders = ("output/report/cpu-seed1", "output/report/cpu-seed2")
    assert [pair for pair in pairs if len({*pair}) > 1] == [("1", "2"), folders]
    assert {"--gradient-accumulation-steps", "4"} == {*images["parts4-seed1"]} & {
        *("--gradient-accumulation-steps", "4", "--main_process_port")
    }
    assert " --seed 1 --nhid 400 " in " ".join(texts["Transformer-seed1"])
    assert "accelerate_configs/cpu.yaml" in " ".join(texts["CNN-seed2"])

    monkeypatch.setattr(plan, "emulates_bf16", lambda _device: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    images, texts = planned("--seeds", "7", "8", "--text-flags=--tied")
    assert [*images][-4:] == ["gpu1-seed7", "gpu1-seed8", "gpu4-seed7", "gpu4-seed8"]
    assert len(images) == 12 and "cpu_bf16-seed8" in images
    assert "gpu1.yaml" in " ".join(texts["LSTM-seed8"])
    assert "--nhid" not in texts["Transformer-seed7"]
    groups = plan.grouped([*images], reproduce.make_parser().parse(["--seeds", "7", "8"]))
    assert groups["one process"] == {7: "cpu-seed7", 8: "cpu-seed8"} and len(groups) == 6


def test_costs_are_said_after_the_second_epoch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", iter([0.0, 70.0, 130.0]).__next__)
    forecast = Forecast(3, epochs=10)
    for said in ("", "x\n * Acc@1 1.0\n", "x\n * Acc@1 1.0\n", "\n * Acc@1 1.0\n * Acc@1 2.0\n"):
        assert not capsys.readouterr().out
        forecast(said)
    # The first with the start, nine more of a minute, three times.
    assert capsys.readouterr().out == "   3 trainings as fast as this one: 30 minutes\n"


def test_the_example_s_data_are_cut_out_as_its_page_says(tmp_path: Path) -> None:
    """The block of docs/report.md, but for its downloads."""
    page = (KIT / "docs" / "report.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block.count("python -c") == 2
    full, part = (tmp_path / "data" / f"tiny-imagenet-{n}" for n in (200, 20))
    make_dataset(full, classes=22, train=1, val=44)
    (full / "words.txt").write_text("".join(f"n0000000{c}\tname {c}\n" for c in range(30)))
    text = tmp_path / "data" / "wikitext-2"
    text.mkdir()
    for name in ("test", "valid"):
        (text / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(3760)))
    script = "set -e; python() { :; }\n" + block
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    whole, found = find_images(full), find_images(part)
    assert found.classes == whole.classes[:20] and len(found.train.paths) == 20
    assert len(found.val.paths) == 40
    names = readable_names(part, found.classes)
    assert names == [f"name {c[8:]}" for c in found.classes]
    lines = [
        (text.with_name("wikitext-2-small") / f"{n}.txt").read_text() for n in ("valid", "test")
    ]
    assert "".join(lines) == (text / "valid.txt").read_text()
    assert [len(part.splitlines()) for part in lines] == [1880, 1880]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """A page of trainings whose curves are: the last two figures of the step's name are Acc@1."""

    def read(logs: Path) -> dict[str, Curve]:
        acc1 = float(logs.parent.name[-2:])
        curves = losses([2.5, 2.0], [2.4, 2 - acc1 / 1000])
        for tag in ("Acc@1/train", "Acc@1/val", "Acc@5/train", "Acc@5/val", "Throughput/train"):
            curves[tag] = {0: 10.0, 1: acc1}
        return curves

    monkeypatch.setattr(reproduce, "read_curves", read)
    page = Page(Steps(tmp_path / "out", {}, {}))
    page.add("# Report")
    monkeypatch.setattr(page.steps, "seconds", lambda name: 10.0)
    return page


def answering(right: dict[str, dict[int, int]], count: int) -> Answers:
    """Answers to `count` images of which a training's first ones are right, by title and seed."""
    of = {
        title: {seed: ["a"] * n + ["b"] * (count - n) for seed, n in seeds.items()}
        for title, seeds in right.items()
    }
    return Answers(["a"] * count, of)


def test_one_seed_is_judged_by_images_and_a_control(page: Page) -> None:
    names = {"one process": 40, "another seed": 42, "four processes": 30, "four parts": 30}
    groups = {title: {1 + (n == 42): f"x{n}"} for title, n in names.items()}
    right = {
        title: {seed: int(n[1:]) * 10 for seed, n in of.items()} for title, of in groups.items()
    }
    answers = answering(right, 1000)
    reproduce.add_trainings(page, groups, answers)
    reproduce.add_disagreements(page, answers)
    text = "\n".join(page.sections)
    assert "| one process | 40.0 | 37.0 to 43.1 | 40.0 |" in text
    assert "- four processes: -10.0 points of Acc@1 (95 % interval" in text
    assert "and over twice what another seed makes (2.0)" in text
    assert "The control, the same training with another seed: +2.0 points" in text
    assert "The curves of four processes and four parts are the same to the last digit." in text
    assert "| **one process** |  | 2.0 | 10.0 | 10.0 |" in text
    assert "two seeds of it on 2.0 %. Clearly more than two seeds: four processes and four" in text
    assert page.conclusions[0].endswith(
        "four processes (-10.0) and four parts (-10.0). The others: none."
    )


def test_several_seeds_are_judged_by_their_spread(page: Page) -> None:
    of = {"one process": (40, 42, 44), "bf16": (41, 42, 43), "four parts": (30, 32, 34)}
    groups = {t: {seed: f"x{n}" for seed, n in enumerate(ns, 1)} for t, ns in of.items()}
    right = {t: {seed: 10 * n for seed, n in enumerate(ns, 1)} for t, ns in of.items()}
    reproduce.add_trainings(page, groups, answering(right, 1000))
    reproduce.add_disagreements(page, answering(right, 1000))
    text = "\n".join(page.sections)
    assert "| one process | 42.0 (40.0 to 44.0) | 39.0 to 45.1 |" in text
    assert (
        "bf16: +0.0 points of Acc@1 (95 % interval -3.6 to +3.6, from the seeds) against one"
        in text
    )
    assert "Bands reach from the least to the greatest seed." in text
    assert "control" not in text
    # The diagonal: the mean of 2, 2 and 4 points.
    assert "| **one process** | 2.7 | 0.7 | 10.0 |" in text
    assert page.conclusions[0].endswith("four parts (-10.0). The others: bf16 (+0.0).")


def test_one_training_alone_is_reported(page: Page) -> None:
    groups = {"one process": {1: "x40"}}
    answers = answering({"one process": {1: 40}}, 100)
    reproduce.add_trainings(page, groups, answers)
    reproduce.add_disagreements(page, answers)
    text = "\n".join(page.sections)
    assert "| one process | 40.0 | 30.9 to 49.8 |" in text and "against" not in text
    assert len(page.conclusions) == 1  # of over-fitting


def test_without_answers_the_figures_stay(page: Page) -> None:
    groups = {"one process": {1: "x40"}, "another seed": {2: "x42"}, "bf16": {1: "x41"}}
    reproduce.add_trainings(page, groups, None)
    assert "| one process | 40.0 |  | 40.0 |" in "\n".join(page.sections)
    reproduce.add_disagreements(page, answering({}, 100))


def test_the_sizes_are_those_of_the_flags_before_a_training(
    page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(page, "run", lambda commands: ran.extend(commands.values()))
    data = make_dataset(tmp_path / "images", train=1, val=3)
    args = reproduce.make_parser().parse(["--data", str(data), "--seeds", "5"])
    settings = plan.check_flags("--image-flags", "--image-size 32 --stem stock", resnet_main)
    reproduce.add_sizes(page, args, settings)
    reproduce.add_sizes(page, args, settings | {"arch": "vgg11"})
    (page.folder / "cpu-seed5").mkdir()
    (page.folder / "cpu-seed5" / "checkpoint.pth").touch()
    reproduce.add_sizes(page, args, settings)
    size = ["--num-classes", "3", "--arch", "resnet18", "--image-size", "32"]
    assert ran[0][2:] == [*size, "--stem", "stock"]
    assert ran[1][2:] == [word.replace("resnet18", "vgg11") for word in size]
    assert ran[2][2:] == ["--checkpoint", str(page.folder / "cpu-seed5" / "checkpoint.pth")]
