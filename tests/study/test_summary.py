"""What a study has found is written and read whole; files of older versions are read, damaged ones refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import fabricated
import pytest

from heterokd.errors import StudyError
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.progress import StudyProgress
from heterokd.study.read_summary import read_summary
from heterokd.study.summary import HarmfulTrial, StudySummary


def whole() -> StudySummary:
    """With something in every field."""
    winner, scratch = fabricated.ranked(3, "kd", 0.31, 0.02), fabricated.ranked(0, "scratch", None, confirmed=False)
    return fabricated.summary(
        winner,
        scratch,
        methods=("scratch", "kd"),
        excluded={"fbt": "no such pair"},
        left_out={"resnet18": "too large"},
        students={"test_resnet": {"params_m": 0.4}},
        objectives=("val/top1", "student/params_m"),
        progress=StudyProgress(planned=4, complete=2, finished=True),
        budget={"trials": 60, "hours": None, "price": 2.0},
        spent={"trials": 4, "hours": 0.25},
        negative_transfer=(HarmfulTrial(2, "fitnet", 9),),
        front=(winner,),
        teacher=fabricated.card(),
        teachers=(fabricated.card(), fabricated.card("resnet18")),
    )


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, summary = StudyFolder(tmp_path), whole()
    assert read_summary(folder) is None
    summary.write(folder)
    assert read_summary(folder) == summary
    content = json.loads(folder.summary_file.read_text())
    assert content["standing"]["planned"] == 4
    assert content["front"][0]["params_m"] == 0.4, "with what the student costs"
    assert content["scratch"]["mean"] is None
    assert "teacher" not in replace(summary, teacher=None).to_json(), "it is known at the end"


def test_a_summary_of_an_older_version_is_read(tmp_path: Path) -> None:
    content = {**whole().to_json(), "key_of_another_version": 1}
    for key in ("budget", "spent", "negative_transfer", "front", "students", "left_out", "teachers"):
        del content[key]
    for key in ("diverged", "paused", "negative_transfer"):
        del content["standing"][key]
    for key in ("student", "expected", "expected_deviation"):
        del content["winner"][key]
    folder = StudyFolder(tmp_path)
    write_text(folder.summary_file, json.dumps(content))
    found = read_summary(folder)
    assert found is not None
    assert found.winner is not None
    assert (found.winner.mean, found.winner.student, found.progress.paused, found.limits) == (0.31, "", 0, {})


def test_values_that_are_no_numbers_are_null_in_json() -> None:
    content = fabricated.summary(students={"test_resnet": {"latency_ms": math.inf}}).to_json()
    assert json.loads(json.dumps(content, allow_nan=False))["students"]["test_resnet"] == {"latency_ms": None}


@pytest.mark.parametrize("key", ["leaders", "metric"])
def test_a_damaged_summary_is_refused_with_its_place(key: str, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    write_text(folder.summary_file, json.dumps({**whole().to_json(), key: [{"number": "three"}]}))
    with pytest.raises(StudyError, match=rf"summary\.json: is damaged \({key}"):
        read_summary(folder)


def test_rows_of_a_table_are_in_the_order_of_what_it_shows() -> None:
    winner = fabricated.ranked(28, "kd", 0.9627, 0.0165)
    few = fabricated.ranked(21, "hcd", 0.9641, 0.0233)
    many = fabricated.ranked(2, "hcd", 0.9613, 0.0165)
    single = fabricated.ranked(9, "kd", 0.97, confirmed=False)
    scratch = fabricated.ranked(0, "scratch", 0.9282, 0.0165)
    summary = fabricated.summary(winner, few, many, single, scratch)
    assert [row.number for row in summary.rows()] == [28, 2, 21, 0, 9]
    assert [row.number for row in summary.rows(2)] == [28, 21, 0], "scratch is always shown"
    loss = fabricated.summary(winner, few, many, metric="val/loss", maximise=False)
    assert [row.number for row in loss.rows()] == [28, 2, 21]
