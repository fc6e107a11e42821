"""Pages of every kind of study, drawn from files alone and opened in a browser: nothing is lost, nothing is loaded."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
from PIL import Image
from quick import cases

from heterokd.config.experiment import Experiment
from heterokd.report.caveats import caveats
from heterokd.report.chart import draw_chart
from heterokd.report.figures.svg import Vector
from heterokd.report.measured import Failure, Measured, MeasuredNetwork
from heterokd.report.page import write_report
from heterokd.report.study_data import read_study
from heterokd.report.tables import class_table
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.read_summary import read_summary
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
OUTSIDE = """drawn => { const box = drawn.getBoundingClientRect();
return [...drawn.querySelectorAll("text")].filter(one => { const own = one.getBoundingClientRect();
return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1; })
.map(one => one.textContent); }"""
WIDTHS = {390: 844, 820: 1180, 1440: 900}
Costs = Mapping[str, Mapping[str, float]]
TEACHER = {"network": "vit_tiny_patch16_224", "val_score": 0.9, "metric": "val/top1"}


PARAMETERS: Costs = {"test_resnet": {"params_m": 0.37}, "resnet18": {"params_m": 11.2}}


def searched(
    root: Workspace, question: Experiment, quality: Any, costs: Costs = PARAMETERS, **teacher: Any
) -> StudyFolder:
    """A study as a search leaves it: every decision by the real `Study`, every value made up instead of trained.

    Args:
        root: where it lies.
        question: the experiment.
        quality: from an assignment to the value that its training reaches; None: it fails.
        costs: of the students.
        teacher: of the summary, beside its network.
    """
    folder = fabricated.study(root, question)
    study, epochs = (
        Study.open(question, folder, StudyOptions(StudyFacts(costs=costs))),
        question.training.epochs,
    )
    while isinstance(assignment := study.next(), Assignment):
        number, value = assignment.number, quality(assignment)
        made = folder.trial(number)
        snapshot = TrialSnapshot(
            origin=assignment.origin, confirms=assignment.confirms, sample=assignment.sample, began=1000.0 + number
        )
        made.start(assignment.recipe, snapshot)
        if value is None:
            (made.path / "error.txt").write_text("Traceback\nRuntimeError: <out> of memory\n")
            study.finish(number, "failed", {}, "RuntimeError")
            made.save(replace(snapshot, status=TrialStatus.FAILED, ended=1001.0 + number))
            continue
        status = TrialStatus.COMPLETE
        for epoch in range(1, epochs + 1):
            metrics = {question.metric: float(value * (1 - 0.5 ** (3 * epoch / epochs))), "epoch": epoch}
            if not question.maximise:
                metrics[question.metric] = float(value * (1 + 2 ** (-epoch)))
            made.append(metrics)
            if epoch in assignment.rungs and not study.report(number, epoch, metrics):
                status = TrialStatus.PRUNED
                break
        study.finish(number, status, metrics)
        made.save(replace(snapshot, status=status, metrics=metrics, ended=1010.0 + number, reason=study.why(number)))
    replace(study.summary(), teacher=fabricated.card(**{**TEACHER, **teacher})).write(folder)
    return folder


def by_method(assignment: Assignment) -> float:
    """Methods differ, values of a method a little, seeds a little less; always the same for the same assignment."""
    noise = np.random.default_rng([assignment.number, assignment.recipe.training.seed]).normal(0, 0.01)
    rate = float(assignment.sample.get("training.learning_rate", 0.05))  # type: ignore[arg-type]
    base = {"scratch": 0.7, "kd": 0.78, "dkd": 0.8, "hcd": 0.82}.get(assignment.recipe.method, 0.75)
    return float(base - 0.02 * abs(np.log10(rate / 0.05)) + noise)


def ask(**sections: Any) -> Experiment:
    methods = ["scratch", "kd", "dkd", "hcd"]
    space = {"methods": methods, "shared": {"training.learning_rate": {"low": 0.005, "high": 0.5, "log": True}}}
    search = {"space": space, "trials": 30, "confirm_leaders": 2, "confirm_seeds": 2}
    return fabricated.experiment(**{"training": {"epochs": 10}, "search": search, **sections})


def changed(question: Experiment, **search: Any) -> Experiment:
    content = question.model_dump()
    return Experiment.model_validate({**content, "search": {**content["search"], **search}})


def summary_of(folder: StudyFolder) -> Any:
    summary = read_summary(folder)
    assert summary is not None
    return summary


def measure(folder: StudyFolder, winner: int, classes: int = 10) -> None:
    generator = np.random.default_rng(0)
    confusion = np.diag(np.full(classes, 30)) + generator.integers(0, 3, (classes, classes))
    made = Measured(winner, 0, int(confusion.sum()), tuple(f"class <{one}>" for one in range(classes)), confusion)
    made.scratch_confusion = confusion.T.copy()
    folder.pictures.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "white").save(folder.pictures / "failure-00.png")
    made.failures = (Failure("failure-00.png", 3, 1, 2, 0.93, 0.05), Failure("lost.png", 4, 1, 2, 0.9, 0.1))
    made.similarity = tuple(tuple(row) for row in generator.random((4, 4)).tolist())
    made.compared = 64
    made.networks = {
        "student": MeasuredNetwork("test_resnet", {"params_m": 0.37, "latency_ms": 0.6}),
        "teacher": MeasuredNetwork("vit_tiny_patch16_224", {"params_m": 2.7, "latency_ms": None}),
    }
    made.write(folder)


def page_of(folder: StudyFolder, question: Experiment) -> str:
    write_report(read_study(folder, question))
    return folder.report.read_text(encoding="utf-8")


def check(page: str) -> None:
    """What holds of every page: no address, no id twice, everything closed, each figure drawn or explained."""
    assert not re.findall(r"https?://", page), "the page names an address"
    assert "Content-Security-Policy" in page
    twice = [name for name, count in Counter(re.findall(r'\sid="([^"]+)"', page)).items() if count > 1]
    assert not twice
    ids = set(re.findall(r'\sid="([^"]+)"', page))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= ids
    for figure in re.findall(r"<figure.*?</figure>", page, re.DOTALL):
        assert "<svg" in figure or "<img" in figure or 'class="without"' in figure
        assert re.search(r"<figcaption>\s*\S+", figure)
    assert "could not be drawn" not in page
    assert page.count("<svg") == page.count("</svg>") == page.count("<desc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, Experiment]:
    """A search with everything: several methods, pruned and failed trials, confirmed leaders, measured numbers."""
    question = ask()
    folder = searched(
        Workspace(tmp_path_factory.mktemp("whole")), question, lambda one: None if one.number == 7 else by_method(one)
    )
    measure(folder, summary_of(folder).winner.number)
    write_report(read_study(folder, question))
    return folder, question


def test_a_whole_page_answers_at_a_glance(whole: tuple[StudyFolder, Experiment]) -> None:
    folder, question = whole
    page = folder.report.read_text(encoding="utf-8")
    check(page)
    summary = summary_of(folder)
    assert summary.progress.pruned > 0
    assert summary.winner.confirmed
    assert f"gives the best student:\n top-1 <strong>{summary.winner.mean:.4f}</strong>" in page
    for title in (
        "Gain over scratch",
        "Gain over kd&#39;s defaults",
        "Gain over hcd&#39;s defaults",
        "Difference to the teacher",
        "Duration of the search",
        "Student",
    ):
        assert f"<h2>{title}</h2>" in page
    for name in (
        "glance",
        "methods",
        "history",
        "curves",
        "importance-all-methods",
        "parallel-all-methods",
        "confusion",
        "cka",
    ):
        assert re.search(rf'<figure id="{name}">', page), f"{name} is not drawn"
    assert "importance-hcd" in page
    assert "<span>class &lt;2&gt; (0.93)</span>" in page, "a wrong image"
    assert "image 4 of val" not in page, "its file is missing"
    assert re.search(r"<h3>Classes</h3>.*<tr><td>class &lt;\d&gt;</td>", page, re.DOTALL)
    assert "&lt;out&gt; of memory" in page, "an error is shown, escaped"
    number = summary.winner.number
    assert folder.trial(number).recipe.to_yaml().splitlines()[0] in page
    for command in (f"heterokd promote {question.name} --root", f"heterokd export studies/{question.name}", "--resume"):
        assert command in page
    tips = re.findall(r"<title>(trial \d+, [^<]+)</title>", page)
    assert any(f"trial {number}, {summary.winner.method}" in tip for tip in tips)


@pytest.mark.thorough
def test_the_figures_of_the_cards_follow_from_the_summary(whole: tuple[StudyFolder, Experiment]) -> None:
    folder, question = whole
    page, summary = folder.report.read_text(encoding="utf-8"), summary_of(folder)
    gain = summary.winner.mean - summary.scratch.mean
    assert f'<p class="figure">{gain:+.4f}' in page
    assert f'<p class="figure">{summary.winner.mean - 0.9:+.4f}' in page
    assert "Parameters of test_resnet (14 % of the teacher&#39;s); latency 0.6 ms." in page
    default = next(one for one in folder.trials() if one.recipe.method == "kd" and one.snapshot.origin == "published")
    if default.status == "pruned":
        assert f"kd as published (trial {default.number}) fell behind and was stopped" in page
        return
    leader = next((one for one in summary.leaders if one.number == default.number), None)
    reached = leader.mean if leader is not None else default.snapshot.metrics[question.metric]
    assert f'<p class="figure">{summary.winner.mean - reached:+.4f}' in page


@pytest.mark.parametrize(
    ("name", "question", "quality", "said"),
    cases([
        ("all failed", changed(ask(), trials=8), lambda one: None, "No trial is complete."),
        ("one trial", changed(ask(), trials=1), by_method, "Distillation is not compared here"),
        (
            "one method, no scratch, no confirmations",
            changed(ask(), space={"methods": ["kd"]}, confirm_leaders=0, trials=9),
            by_method,
            "no scratch trial",
        ),
        ("minimised", changed(ask(), metric="val/loss", trials=14), lambda one: 1 - by_method(one), "over scratch"),
        ("the same value everywhere", changed(ask(), trials=12), lambda one: 0.5, "Tie: "),
        (
            "several students",
            changed(
                ask(student={"network": ["test_resnet", "resnet18"]}),
                objectives=["val/top1", "student/params_m"],
                metric="val/top1",
            ),
            lambda one: by_method(one) + 0.05 * (one.recipe.student.network == "resnet18"),
            "Accuracy and cost",
        ),
    ], quick={"one trial", "several students"}, names=itemgetter(0)),
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_every_kind_of_study_has_its_page(
    name: str, question: Experiment, quality: Any, said: str, tmp_path: Path
) -> None:
    folder = searched(Workspace(tmp_path), question, quality)
    page = page_of(folder, question)
    check(page)
    assert said in page
    if name == "several students":
        assert '<figure id="front-parameters">' in page


@pytest.mark.thorough
def test_a_segmentation_has_the_iou_of_its_classes(tmp_path: Path) -> None:
    question = fabricated.scenes(search={"space": {"methods": ["scratch", "pixel_kd"]}, "trials": 6})
    folder = searched(Workspace(tmp_path), question, by_method, metric="val/miou")
    winner = summary_of(folder).winner
    made = Measured(winner.number, 0, 20, ("background", "zero", "one"))
    iou = np.array([0.9, 0.5, np.nan])
    made.iou = {"teacher": iou, winner.method: iou - 0.1, "scratch": iou - 0.2}
    made.iou_intervals = np.array([[0.7, 0.85], [0.3, 0.5], [np.nan, np.nan]])
    made.missing = {"cka": "RuntimeError: out of memory"}
    made.write(folder)
    page = page_of(folder, question)
    check(page)
    assert '<tr><td>zero</td><td class="number">0.400</td><td class="number">0.3000 to 0.5000</td>' in page
    assert '<figure id="iou">' in page
    assert "best: background (0.80), worst: zero (0.40)" in page
    assert "could not be measured (RuntimeError: out of memory)" in page


@pytest.mark.thorough
def test_a_study_that_runs_is_shown_as_far_as_it_is(whole: tuple[StudyFolder, Experiment], tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "studies" / "tiny")
    shutil.copytree(whole[0].path, folder.path)
    folder.database.unlink()  # as on another machine
    folder.measured_file.write_text("{")
    summary = summary_of(folder)
    replace(summary, teacher=None, progress=replace(summary.progress, finished=False)).write(folder)
    page = page_of(folder, whole[1])
    check(page)
    assert "This search has not finished." in page
    assert "the study&#39;s database is not here" in page


def test_the_page_says_where_costs_come_from(tmp_path: Path) -> None:
    students, objectives = (
        {"network": ["test_resnet", "resnet18"]},
        ["val/top1", "student/int8_ms", "student/latency_ms"],
    )
    table = {"student/latency_ms": {"test_resnet": 3.25, "resnet18": 9}}
    question = changed(ask(student=students), objectives=objectives, costs=table, latency={"threads": 2})
    costs = {"test_resnet": {"latency_ms": 3.25, "int8_ms": 0.5}, "resnet18": {"latency_ms": 9.0, "int8_ms": 2.0}}
    folder = searched(Workspace(tmp_path), question, by_method, costs)
    measure(folder, summary_of(folder).winner.number)
    page = page_of(folder, question)
    check(page)
    assert page.count('<p class="soft">Latency: from a table of yours (search.costs).</p>') == 2  # front, and networks
    int8 = "Int8 latency: median of 30, batch 1, 32 x 32 pixels, ONNX Runtime, CPU, 2 threads, static quantization."
    assert page.count(int8) == 1
    assert '<td class="number">0.5</td><td class="number">3.25</td>' in page
    assert "Latency: median of 30, batch 1, 32 x 32 pixels, torch, CPU, 1 thread." in page_of(
        *measured_study(tmp_path / "torch")
    )


def measured_study(place: Path) -> tuple[StudyFolder, Experiment]:
    question = ask()
    folder = searched(Workspace(place), question, by_method)
    measure(folder, summary_of(folder).winner.number)
    return folder, question


def test_a_chart_that_fails_costs_itself_alone() -> None:
    def fail(_: Vector) -> str:
        raise RuntimeError("no <font>\nand more")

    chart = draw_chart("history", "Best value so far", fail)
    assert (chart.name, chart.svg) == ("history", "")
    assert chart.caption == "This chart could not be drawn (RuntimeError: no <font>)."


def test_numbers_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert Measured.read(folder) is None
    made = Measured(3, None, 5, ("a", "b"), np.array([[2, 0], [1, 2]]))
    made.iou = {"kd": np.array([0.25, np.nan])}
    made.iou_intervals = np.array([[0.1, 0.5], [np.nan, np.nan]])
    made.write(folder)
    found = Measured.read(folder)
    assert found is not None
    assert (found.confusion == made.confusion).all()
    assert found.scratch_confusion is None
    np.testing.assert_array_equal(found.iou["kd"], made.iou["kd"])
    np.testing.assert_array_equal(found.iou_intervals, made.iou_intervals)


def test_classes_are_listed_with_intervals_the_lowest_first() -> None:
    assert class_table(None) is None
    made = Measured(3, None, 33, ("cat", "dog", "none"), np.array([[18, 2, 0], [6, 4, 0], [0, 0, 0]]))
    assert class_table(made) == {
        "head": ["images", "found", "95 % interval", "precision"],
        "rows": [
            ["dog", "10", "0.400", "0.1682 to 0.6873", "0.667"],
            ["cat", "20", "0.900", "0.6990 to 0.9721", "0.750"],
        ],
        "left_out": 0,
    }
    made.scratch_confusion = np.array([[10, 10, 0], [0, 10, 0], [0, 0, 0]])
    table = class_table(made)
    assert table is not None
    assert [row[-1] for row in table["rows"]] == ["1.000", "0.500"]  # type: ignore[attr-defined]


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.mark.thorough
def test_the_page_in_a_browser_at_three_widths(whole: tuple[StudyFolder, Experiment], browser: Any) -> None:
    folder, _ = whole
    for width, height in WIDTHS.items():
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
        page = context.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.on("requestfailed", lambda request, wrong=wrong: wrong.append(request.url[:80]))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(folder.report.as_uri())
        assert not wrong
        assert [url for url in asked if not url.startswith("data:")] == [folder.report.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than its window"
        figures = page.locator("figure:not(.without)")
        assert figures.count() >= 8
        for place in range(figures.count()):
            drawn = figures.nth(place).locator("svg, img").first
            box = drawn.bounding_box()
            assert drawn.is_visible()
            assert box is not None
            assert min(box["width"], box["height"]) > 50, figures.nth(place).get_attribute("id")
            outside = drawn.evaluate(OUTSIDE)
            assert not outside, f"{figures.nth(place).get_attribute('id')} cuts {outside}"
            # The smallest letters have 6.5 points on a drawing of 302.4: at least 11 pixels.
            assert box["width"] / 302.4 * 6.5 > 10.9, figures.nth(place).get_attribute("id")
        context.close()


@pytest.mark.thorough
def test_copying_and_sorting_work_without_a_network(whole: tuple[StudyFolder, Experiment], browser: Any) -> None:
    folder, _ = whole
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(folder.report.as_uri())
    page.locator("#recipe summary").click()
    block = page.locator("#recipe .copied")
    block.locator("button").click()
    page.wait_for_function("document.querySelector('#recipe .copy').textContent === 'Copied'")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<textarea id=\"paste\"></textarea>')")
    page.focus("#paste")
    page.keyboard.press("Control+v")
    assert page.input_value("#paste") == block.locator("pre").text_content()
    heads = page.locator("#leaders table").first.locator("th button")
    heads.filter(has_text="trial").first.click()
    numbers = [
        int(text) for text in page.locator("#leaders table").first.locator("tbody tr td:first-child").all_inner_texts()
    ]
    assert numbers == sorted(numbers, reverse=True)
    heads.filter(has_text="trial").first.click()
    numbers = [
        int(text) for text in page.locator("#leaders table").first.locator("tbody tr td:first-child").all_inner_texts()
    ]
    assert numbers == sorted(numbers)
    context.close()


@pytest.mark.thorough
def test_the_answers_come_first_and_trials_are_filtered(whole: tuple[StudyFolder, Experiment], browser: Any) -> None:
    folder, _ = whole
    for width, height in WIDTHS.items():
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
        page = context.new_page()
        page.goto(folder.report.as_uri())
        top = page.evaluate("document.querySelector('#next pre').getBoundingClientRect().top")
        assert top < 1.5 * height, "the next step is within a screen and a half"
        assert page.locator("img:not([alt])").count() == 0
        page.locator("#trials summary").click()
        everything = page.locator("#trials tbody tr:visible").count()
        page.locator("#trials select").first.select_option("dkd")
        methods = page.locator("#trials tbody tr:visible td:nth-child(2)").all_inner_texts()
        assert set(methods) == {"dkd"}
        assert page.locator("#trials .filters").inner_text().endswith(f"{len(methods)} of {everything}")
        page.locator("#trials select").nth(1).select_option("complete")
        assert page.locator("#trials tbody tr:visible").count() < len(methods)
        context.close()


def test_caveats(whole: tuple[StudyFolder, Experiment]) -> None:
    folder, question = whole
    report = read_study(folder, question)
    assert report.measured is not None
    assert report.winner is not None
    report.measured.confusion[0] = [1, 30, *[0] * 8]
    runner_up = replace(report.winner, number=99, method="kd", mean=report.winner.mean - 0.001)
    tied = replace(report.summary, leaders=(report.winner, runner_up), val_images=200)
    found = caveats(replace(report, summary=tied))
    assert any(f"kd (trial 99, {runner_up.mean:.4f}) is not known to be worse" in sentence for sentence in found)
    assert any("with 200 images" in sentence and "an image is 0.0050" in sentence for sentence in found)
    assert "Classes of which the winner finds less than half: class <0> (3% of 31)." in found
    clear = replace(tied, leaders=(report.winner, replace(runner_up, mean=0.1, low=0.09, high=0.11)), val_images=50_000)
    left = caveats(replace(report, summary=clear, measured=None))
    assert not any(word in sentence for sentence in left for word in ("Tie", "Small"))
    stopped = tuple(replace(t, status=TrialStatus.PRUNED) if t.method == "dkd" else t for t in report.trials)
    assert any("Never trained to the end: dkd." in sentence for sentence in caveats(replace(report, trials=stopped)))


@pytest.mark.thorough
def test_the_page_prints_on_a4(whole: tuple[StudyFolder, Experiment], browser: Any) -> None:
    folder, _ = whole
    page = browser.new_page()
    page.goto(folder.report.as_uri())
    page.emulate_media(media="print")
    assert not page.locator(".copy").first.is_visible()
    # The width of a sheet of A4 without its margins, at 96 dots an inch.
    page.set_viewport_size({"width": 695, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") <= 695
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()
