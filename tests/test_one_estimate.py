"""A study's winner has the same estimate and the same interval wherever a user reads it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import fabricated
import pytest
from mlflow.entities import Run

from heterokd.cli.terminal.console import Terminal
from heterokd.cli.terminal.search_summary import print_summary
from heterokd.datasets import load_dataset
from heterokd.datasets.io.split import Splits
from heterokd.report.page import write_report
from heterokd.report.study_data import read_study
from heterokd.report.wording import lead
from heterokd.storage.workspace import Workspace
from heterokd.students.promotion.promote import promote
from heterokd.students.registry import log_student, register
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.search_result import SearchResult
from heterokd.study.summary import StudySummary
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store

SINGLE = fabricated.ranked(
    1, mean=0.47512, half=0.04321, confirmed=False, values=(0.47512,), seeds=(0,), numbers=(1,), expected=0.409
)
CONFIRMED = fabricated.ranked(1, mean=0.41234, half=0.03108, search_value=0.47512, expected=0.409)
WITH_VERDICT = {"MLflow's description of the study": "gain over scratch +", "model card": "without a teacher: +"}
SCRATCH = fabricated.ranked(0, "scratch", 0.21, 0.02)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset("digits", image_size=32, labels_per_class=20)


@pytest.fixture
def runs(tmp_path: Path, splits: Splits) -> StudyRuns:
    root = fabricated.root_with_store(tmp_path)
    question = fabricated.experiment()
    folder = fabricated.study(root, question)
    fabricated.trial(folder, question, 0, "scratch", student=fabricated.fitted_student(splits, 30))
    fabricated.trial(folder, question, 1, "kd", student=fabricated.fitted_student(splits, 200))
    return StudyRuns(question, folder, open_store(root, None), root.artifacts)


def study_run(runs: StudyRuns) -> Run:
    return next(run for run in runs.client.search_runs([runs.experiment_id]) if run.info.run_name == "tiny")


def in_terminal(runs: StudyRuns, summary: StudySummary) -> str:
    found = SearchResult(runs.folder, summary, fabricated.card(), runs.uri)
    with redirect_stdout(StringIO()) as printed:
        print_summary(Terminal(), found, (), "")
    return next(line for line in printed.getvalue().splitlines() if line.startswith("0001"))


def places(runs: StudyRuns, splits: Splits, summary: StudySummary) -> Iterator[tuple[str, str]]:
    """End a search and register its winner; return the text of each place that shows the winner."""
    summary.write(runs.folder)
    yield "terminal", in_terminal(runs, summary)
    write_report(read_study(runs.folder, runs.experiment))
    page = html.unescape(runs.folder.report.read_text())
    yield "heterokd report", lead(summary)
    for name, pattern in (("page", r'<p class="lead">.*?</p>'), ("page's table", r'<tr class="winner">.*?</tr>')):
        found = re.search(pattern, page, re.DOTALL)
        assert found, pattern
        yield name, re.sub(r"<[^>]+>", "", found[0])

    trial = runs.folder.trial(1)
    version = register(runs, trial, log_student(runs, trial, splits), splits)
    assert runs.finish(summary)
    study = study_run(runs)
    yield "MLflow's description of the study", study.data.tags["mlflow.note.content"]
    metrics = {key: value for key, value in study.data.metrics.items() if key.startswith("best")}
    yield "MLflow's metrics", " ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    registered = runs.client.get_model_version("digits-student", version)
    yield "the version's description", registered.description
    yield "the version's tags", " ".join(registered.tags[key] for key in ("val/top1", "interval", "seeds"))


def promoted(runs: StudyRuns) -> Iterator[tuple[str, str]]:
    promote(Workspace(runs.folder.path.parents[1]), "tiny")
    yield "model card", (runs.folder.path / "model_card.md").read_text()
    champion = runs.client.get_model_version_by_alias("digits-student", "champion")
    yield "the champion's description", champion.description


def check(winner: RankedConfig, evidence: str, shown: Iterable[tuple[str, str]]) -> None:
    numbers = [f"{value:.4f}" for value in (winner.mean, winner.low, winner.high)]  # type: ignore[str-format]
    # The value of the search, that of the training of the registered weights, and the posterior mean.
    others = {f"{value:.4f}" for value in (winner.search_value, 0.3, winner.expected)} - set(numbers)  # type: ignore[str-format]
    for place, text in shown:
        assert all(number in text for number in numbers), f"{place}: {text}"
        if place != "MLflow's metrics":
            assert place == "page's table" or evidence in text, f"{place}: {text}"
        if place in WITH_VERDICT:
            assert WITH_VERDICT[place] in text, f"{place}: {text}"
            assert ("likely" if evidence == "one seed" else "significant") in text, f"{place}: {text}"
        if place != "page's table":  # which has a column for the value of the search
            assert not [other for other in others if other in text], f"{place}: {text}"


def test_an_estimate_is_the_same_everywhere(runs: StudyRuns, splits: Splits) -> None:
    """With a single seed, after a resumed search that repeated the winner, and after its promotion."""
    for winner, evidence in ((SINGLE, "one seed"), (CONFIRMED, "2 fresh seeds")):
        check(winner, evidence, places(runs, splits, fabricated.summary(winner, SCRATCH)))
        stored: dict[str, Any] = json.loads(runs.folder.summary_file.read_text())
        assert [stored["winner"][key] for key in ("mean", "low", "high")] == [winner.mean, winner.low, winner.high]
    check(CONFIRMED, "2 fresh seeds", promoted(runs))

    assert runs.finish(fabricated.summary(SCRATCH, CONFIRMED))
    assert study_run(runs).data.metrics["best/val/top1"] == SCRATCH.mean, "a new winner with a smaller number"
