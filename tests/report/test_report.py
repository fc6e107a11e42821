"""The page of a study: its verdict follows from the figures, and it needs no network."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from heterokd.formatting import metric_name
from heterokd.report.cards import cards
from heterokd.report.measured import Measured, MeasuredNetwork
from heterokd.report.page import write_report
from heterokd.report.study_data import StudyReport, read_study
from heterokd.report.tables import published_tables
from heterokd.report.wording import notes, verdict
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary


def leader(method: str, mean: float, half: float | None, **more: Any) -> RankedConfig:
    return fabricated.ranked(0, method, mean, half, **more)


@pytest.mark.parametrize(
    ("winner", "scratch", "maximise", "said"),
    [
        (leader("hcd", 0.97, 0.005), leader("scratch", 0.95, 0.005), True, "is significant: +0.0200 over scratch"),
        (leader("hcd", 0.96, 0.02), leader("scratch", 0.95, 0.02), True, "Tie: the winner is not known to be better"),
        (leader("hcd", 0.96, 0.009), leader("scratch", 0.95, 0.009), True, "likely, but not certain: +0.0100"),
        (leader("hcd", 0.97, 0.01, confirmed=False), leader("scratch", 0.9, 0.01), True, "likely, but not certain"),
        (leader("hcd", 0.94, 0.001), leader("scratch", 0.95, 0.001), True, "below that of scratch: -0.0100"),
        (leader("kd", 0.2, 0.01), leader("scratch", 0.5, 0.01), False, "is significant: +0.3000"),
        (leader("hcd", 0.97, None, confirmed=False), leader("scratch", 0.9, None), True, "One seed each"),
        (leader("scratch", 0.97, 0.01), leader("scratch", 0.97, 0.01), True, "Distillation is not compared here"),
        (leader("kd", 0.97, 0.01), None, True, "no scratch trial"),
        (None, None, True, "No trial is complete"),
    ],
)
def test_the_verdict_says_how_sure_the_study_is(winner: Any, scratch: Any, maximise: bool, said: str) -> None:
    assert said in verdict(fabricated.summary(winner=winner, scratch=scratch, maximise=maximise))


def test_the_interval_of_the_difference_is_that_of_two_independent_means() -> None:
    sentence = verdict(fabricated.summary(leader("kd", 0.9, 0.03), leader("scratch", 0.8, 0.04)))
    assert "+0.0500 to +0.1500" in sentence


@pytest.mark.parametrize(
    ("winner", "teacher", "said"),
    [
        (
            leader("scratch", 0.5978, 0.01),
            {"val_score": 0.3913},
            "0.3913, less than the student without a teacher (0.5978)",
        ),
        (leader("kd", 0.62, 0.01), {"val_score": 0.3913}, "0.3913, less than the student without a teacher (0.5978)"),
        (leader("kd", 0.62, 0.01), {"val_score": 0.11, "chance": 0.1, "images": 500}, "0.1100, less than"),
        (
            leader("scratch", 0.1, 0.01),
            {"val_score": 0.11, "chance": 0.1, "images": 500},
            "0.1100, which is near chance",
        ),
        (leader("scratch", 0.5978, 0.01), {"val_score": 0.592}, None),
        (leader("scratch", 0.5978, 0.01), {"val_score": 0.7}, None),
        (leader("scratch", 0.5978, 0.01), {"val_score": 0.3, "metric": "val/miou"}, None),
    ],
)
def test_a_weak_teacher_is_the_problem(winner: RankedConfig, teacher: dict[str, Any], said: str | None) -> None:
    scratch = winner if winner.method == "scratch" else leader("scratch", 0.5978, 0.01)
    card = fabricated.card(**teacher)
    found = fabricated.summary(winner=winner, scratch=scratch, teacher=card, teachers=(card,))
    sentence = verdict(found)
    assert sentence.startswith("The teacher is the problem: ") == (said is not None)
    assert (said or "Distillation is not compared here") in sentence
    better = fabricated.card("resnet50", val_score=0.9)
    assert not verdict(replace(found, teachers=(card, better))).startswith("The teacher"), "one of them is good"


def test_the_page_names_a_weak_teacher(tmp_path: Path) -> None:
    names = ("a", "b")
    card = fabricated.card(val_score=0.3913, never_predicted=names)
    found = summary(leader("kd", 0.5978, 0.01), leader("scratch", 0.55, 0.01), teacher=card, teachers=(card,))
    report = StudyReport(NOWHERE, fabricated.experiment(), found)
    (told,) = (each for each in cards(report) if each.title == "Difference to the teacher")
    assert told.mark == "weak teacher"
    assert "The teacher is the problem" in told.text
    assert "152" not in told.text
    assert notes(found)[0] == "Teacher vit_tiny_patch16_224: it never predicts 2 of 10 classes on val: a, b."


SWIN = "swin_tiny_patch4_window7_224"
NOWHERE = StudyFolder(Path("nowhere"))


def summary(*leaders: RankedConfig, metric: str = "val/top1", **more: Any) -> StudySummary:
    """The last leader counts as scratch."""
    full = [replace(one, number=number) for number, one in enumerate(leaders)]
    return fabricated.summary(
        *full,
        **{"metric": metric, "scratch": full[-1], "teacher": fabricated.card(SWIN, metric=metric), **more},
    )


def question(**student: Any) -> Any:
    return fabricated.experiment(
        data={"dataset": "cifar100", "root": "data", "image_size": 224},
        teacher={"network": f"{SWIN}.ms_in1k", "pretrained": True},
        student={"network": "resnet18", **student},
    )


def test_published_numbers_stand_beside_ours() -> None:
    found = summary(leader("hcd", 0.8123, 0.01), leader("kd", 0.79, None, confirmed=False), leader("hcd", 0.78, 0.01))
    (table,) = published_tables(StudyReport(NOWHERE, question(), found))
    rows = {row["method"]: row for row in table["rows"]}
    assert rows["hcd"]["published"] == 82.78
    assert rows["hcd"]["ours"] == pytest.approx(81.23), "the best of its configurations"
    assert rows["kd"]["ours"] == pytest.approx(79.0)
    assert rows["rsd"]["ours"] is None
    assert table["rows"][0]["method"] == "rsd", "best published first"
    assert (
        published_tables(StudyReport(NOWHERE, question(), replace(found, metric="val/top5")))[0]["rows"][0]["ours"]
        is None
    )


def test_each_student_has_its_own_table() -> None:
    found = summary(
        leader("hcd", 0.82, 0.01, sample={"method": "hcd", "student.network": "resnet18"}),
        leader("hcd", 0.81, 0.01, sample={"method": "hcd", "student.network": "mobilenetv2_100"}),
    )
    students = question(network=["resnet18", "mobilenetv2_100", "test_resnet"])
    tables = published_tables(StudyReport(NOWHERE, students, found))
    ours = [next(row["ours"] for row in table["rows"] if row["method"] == "hcd") for table in tables]
    assert ours == pytest.approx([82.0, 81.0])


@pytest.mark.parametrize("published", [True, False])
def test_the_page_has_the_table_when_there_is_one(tmp_path: Path, published: bool) -> None:
    asked = question() if published else fabricated.experiment()
    folder = fabricated.study(Workspace(tmp_path), asked)
    for number, method in enumerate(("kd", "scratch")):
        fabricated.trial(folder, asked, number, method)
    summary(leader("kd", 0.8123, 0.01), leader("scratch", 0.7, 0.01)).write(folder)
    write_report(read_study(folder, asked))
    page = folder.report.read_text()
    assert ("Published for this pair" in page) == published
    assert ("81.23" in page) == published


def test_a_segmentation_is_read_by_its_miou_and_shows_its_pictures(tmp_path: Path) -> None:
    asked = fabricated.scenes()
    folder = fabricated.study(Workspace(tmp_path), asked)
    for number, method in enumerate(("pixel_kd", "scratch")):
        fabricated.trial(folder, asked, number, method)
    folder.pictures.mkdir()
    for name in ("iou", "two_words"):
        (folder.pictures / f"{name}.png").write_bytes(name.encode())
    (folder.pictures / "captions.json").write_text('{"iou": "Classes <that> gained."}')
    best = leader("pixel_kd", 0.4512, 0.01, iou_classes=(9, 11))
    card = fabricated.card(SWIN, metric="val/miou", iou_classes=10)
    found = summary(best, leader("scratch", 0.4, 0.01), metric="val/miou", teacher=card)
    found.write(folder)
    write_report(read_study(folder, asked))
    page = folder.report.read_text()
    assert "mIoU <strong>0.4512</strong> (9 to 11 classes)" in page
    assert "mIoU 90.00 % (10 classes) on val" in page
    assert '<th class="number">classes in the mean</th>' in page
    assert '<td class="number">9 to 11</td>' in page
    assert "top-1" not in page
    assert "top1" not in page
    assert f"data:image/png;base64,{base64.b64encode(b'iou').decode()}" in page
    assert "<figcaption>Classes &lt;that&gt; gained.</figcaption>" in page
    assert "<figcaption>two words</figcaption>" in page


@pytest.mark.parametrize(
    ("metric", "name"),
    [("val/top1", "top-1"), ("miou", "mIoU"), ("val/pixel_accuracy", "pixel accuracy"), ("val/loss", "loss")],
)
def test_metrics_have_names(metric: str, name: str) -> None:
    assert metric_name(metric) == name


def shown_cards(folder: Path, winner: RankedConfig, scratch: RankedConfig | None, **changes: Any) -> dict[str, Any]:
    """The cards of a study without trials, by title."""
    asked = fabricated.experiment()
    found = summary(winner, scratch, **changes) if scratch else summary(winner, scratch=None, **changes)
    report = StudyReport(fabricated.study(Workspace(folder), asked), asked, found)
    return {card.title: card for card in cards(report)}


@pytest.mark.parametrize(
    ("winner", "scratch", "figure", "mark"),
    [
        (leader("hcd", 0.97, 0.005), leader("scratch", 0.95, 0.005), "+0.0200", "significant"),
        (leader("hcd", 0.96, 0.02), leader("scratch", 0.95, 0.02), "+0.0100", "tie"),
        (leader("hcd", 0.96, 0.009), leader("scratch", 0.95, 0.009), "+0.0100", "likely"),
        (leader("hcd", 0.97, 0.01, confirmed=False), leader("scratch", 0.9, 0.01), "+0.0700", "likely"),
        (leader("hcd", 0.97, None, confirmed=False), leader("scratch", 0.95, None), "+0.0200", "one seed"),
        (leader("scratch", 0.97, 0.01), leader("scratch", 0.97, 0.01), "unknown", ""),
        (leader("hcd", 0.97, 0.01), None, "unknown", ""),
    ],
)
def test_a_card_says_how_sure_a_gain_is(tmp_path: Path, winner: Any, scratch: Any, figure: str, mark: str) -> None:
    card = shown_cards(tmp_path, winner, scratch)["Gain over scratch"]
    assert (card.figure, card.mark) == (figure, mark)


@pytest.mark.parametrize(
    ("distilled", "half", "said", "mark"),
    [
        (0.92, 0.01, "Distillation did not help here: kd (trial 1), the best distilled student, is worse", "worse"),
        (0.9375, 0.01, "Distillation probably did not help here", "likely worse"),
        (0.945, 0.01, "Tie: kd (trial 1), the best distilled student, is not known to be better or worse", "tie"),
        (0.945, None, "Not known: kd (trial 1)", "one seed"),
    ],
)
def test_a_search_that_scratch_won_says_what_is_known(
    tmp_path: Path, distilled: float, half: float | None, said: str, mark: str
) -> None:
    scratch, best = leader("scratch", 0.95, half), fabricated.ranked(1, "kd", distilled, half)
    found = fabricated.summary(scratch, best)
    assert said in verdict(found)
    asked = fabricated.experiment()
    shown = cards(StudyReport(fabricated.study(Workspace(tmp_path), asked), asked, found))
    assert {card.title: card.mark for card in shown}["Gain over scratch"] == mark


def test_the_teacher_is_compared_on_the_searched_metric_alone(tmp_path: Path) -> None:
    winner, scratch = leader("hcd", 0.87, 0.01), leader("scratch", 0.8, 0.01)
    card = shown_cards(tmp_path, winner, scratch)["Difference to the teacher"]
    assert (card.figure, card.mark) == ("-0.0300", "behind")
    other = fabricated.card(SWIN, metric="val/miou")
    card = shown_cards(tmp_path, winner, scratch, teacher=other)["Difference to the teacher"]
    assert card.figure == "unknown"
    assert "Its mIoU is 90.00 %" in card.text


@pytest.mark.parametrize(
    ("objectives", "figure", "text"),
    [
        ([], "0.37 M", "Parameters of test_resnet (50 % of the teacher's); FLOPs 0.02 G (2.0 times the teacher's)."),
        (
            ["val/top1", "student/flops_g"],
            "0.02 G",
            "FLOPs of test_resnet (2.0 times the teacher's); parameters 0.37 M",
        ),
    ],
)
def test_the_student_card_shows_every_measured_cost_objectives_first(
    tmp_path: Path, objectives: list[str], figure: str, text: str
) -> None:
    asked = fabricated.experiment(search={"objectives": objectives})
    made = Measured(0, networks={
        "student": MeasuredNetwork("test_resnet", {"flops_g": 0.02, "latency_ms": None, "params_m": 0.37}),
        "teacher": MeasuredNetwork(SWIN, {"flops_g": 0.01, "latency_ms": 3.0, "params_m": 0.74}),
    })  # fmt: skip
    found = summary(
        leader("hcd", 0.97, 0.01), leader("scratch", 0.9, 0.01), students={"test_resnet": {"params_m": 0.37}}
    )
    report = StudyReport(fabricated.study(Workspace(tmp_path), asked), asked, found, measured=made)
    (card,) = (card for card in cards(report) if card.title == "Student")
    assert card.figure == figure
    assert text in card.text
