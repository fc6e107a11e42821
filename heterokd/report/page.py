"""write_report(): assemble the page of a study."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from heterokd.config.experiment import Experiment
from heterokd.datasets.io.split import REST
from heterokd.errors import without_password
from heterokd.formatting import format_classes, format_percent, format_score, metric_name, package_version
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report import tables, wording
from heterokd.report.cards import cards
from heterokd.report.caveats import caveats
from heterokd.report.chart import Chart
from heterokd.report.decisions import decisions, running_rows
from heterokd.report.gallery import failure_gallery
from heterokd.report.parameter_charts import parameter_charts
from heterokd.report.search_charts import course_charts, overview_charts
from heterokd.report.student_charts import front_charts, winner_charts
from heterokd.report.study_data import StudyReport
from heterokd.storage.files import write_text
from heterokd.storage.sqlite_url import mlflow_sqlite_uri
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.teacher_card import TeacherCard
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary

DEFAULT_ROOT = "runs"


def write_report(report: StudyReport, *, root: str | None = None) -> None:
    """Write the page of a study into its folder, from the study's files alone, without data or networks.

    `root` is the workspace as the reader names it with `--root`; by default, the folder's.
    """
    write_text(report.folder.report, render_report(report, root=root))


def render_report(report: StudyReport, *, root: str | None = None, reload_seconds: int = 0) -> str:
    """Return the page of a study, see `write_report`; it reloads itself every `reload_seconds`, if above 0."""
    loader = PackageLoader("heterokd.report", "template")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": format_score, "percent": format_percent, "metric_name": metric_name}
    environment.filters |= {"classes": format_classes}
    content = page_content(report, root=root) | {"reload_seconds": reload_seconds}
    for name in ("style.css", "page.js"):  # files of this package, which need no escaping
        content[name.replace(".", "_")] = Markup(loader.get_source(environment, name)[0])
    return environment.get_template("page.html.j2").render(content)


def page_content(report: StudyReport, *, root: str | None = None) -> dict[str, object]:
    """Return everything that the template shows; see `write_report`."""
    folder, experiment, summary, winner = report.folder, report.experiment, report.summary, report.winner
    trials, left_out = tables.trial_rows(report)
    network_costs, networks = tables.network_rows(report.measured)
    recipe_file = None if winner is None else folder.trial(winner.number).path / "recipe.yaml"
    return {
        "name": experiment.name,
        "version": package_version(),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "teacher": summary.teacher,
        "teachers": _teachers(experiment, summary),
        "students": experiment.student.networks,
        "dataset": _data_words(report),
        "metric": summary.metric,
        "progress": summary.progress,
        "running": [] if summary.progress.finished else running_rows(report),
        "decisions": [] if summary.progress.finished else decisions(report),
        "winner": winner,
        "winner_interval": "" if winner is None else wording.winner_interval(winner),
        "verdict": wording.verdict(summary),
        "cards": cards(report),
        "caveats": caveats(report),
        "overview_charts": _with_markup(overview_charts(report)),
        "leaders": tables.leader_rows(report),
        "counts_classes": any(leader.iou_classes for leader in summary.leaders),
        "comparisons": report.comparisons,
        "published": tables.published_tables(report),
        "methods": tables.method_rows(report),
        "front_charts": _with_markup(front_charts(report)),
        "front": tables.front_rows(report),
        "cost_sources": wording.cost_sources(experiment.cost_conditions),
        "costs": [STUDENT_COSTS[key].label() for key in experiment.search.cost_objectives],
        "course_charts": _with_markup(course_charts(report)),
        "parameter_charts": _with_markup(parameter_charts(report)),
        "winner_charts": _with_markup(winner_charts(report)),
        "classes": tables.class_table(report.measured),
        "wrong": failure_gallery(report),
        "pictures": tables.embedded_pictures(report),
        "plan": tables.plan_table(report.plan),
        "network_costs": network_costs,
        "networks": networks,
        "network_sources": tables.network_sources(report),
        "notes": wording.notes(summary),
        "failures": tables.failure_rows(report),
        "trials": trials,
        "trials_left_out": left_out,
        "recipe": "" if recipe_file is None or not recipe_file.exists() else recipe_file.read_text(encoding="utf-8"),
        "commands": commands(experiment, winner, folder, _root_option(folder, root)),
        "several_students": len(experiment.student.networks) > 1,
    }


def _data_words(report: StudyReport) -> str:
    """Name the data set and its images without labels, with counts once a search has ended."""
    data = report.experiment.data
    if data.unlabelled is None:
        return data.dataset
    counts = {} if report.measured is None else report.measured.training_images
    labelled, others = (f"{counts[key]:,} " if key in counts else "" for key in ("labelled", "unlabelled"))
    source = "" if data.unlabelled == REST else f" below {data.unlabelled}"
    return f"{data.dataset}, {labelled}labelled training images and {others}images without labels{source}"


def commands(
    experiment: Experiment, winner: RankedConfig | None, folder: StudyFolder, option: str
) -> list[dict[str, str]]:
    """List the next steps as commands to copy; `option` is `--root ...` with a space before it, or empty."""
    name, file = experiment.name, shlex.quote(str(folder.experiment_file))
    found = [
        ("Repeat the search as a new study", f"heterokd search {file} --set name={name}-again{option}"),
        (
            "Extend the search: continue with twice as many trials",
            f"heterokd search {file} --resume --set search.trials={2 * experiment.search.trials}{option}",
        ),
    ]
    if winner is not None:
        export = f"heterokd export studies/{name} --format onnx --out {name}-onnx{option}"
        found = [
            ("Evaluate the winner on test and promote it if it passes", f"heterokd promote {name}{option}"),
            ("Show that decision without changing anything", f"heterokd promote {name} --dry-run{option}"),
            ("Export to ONNX (or pt2, or safetensors for timm)", export),
            ("Load the winner in Python", _loading(experiment, folder)),
            *found,
        ]
    found.append(("Open all trials in MLflow", f"heterokd ui{option}"))
    return [{"what": what, "text": text} for what, text in found]


def _loading(experiment: Experiment, folder: StudyFolder) -> str:
    """Return Python code that opens the registered winner."""
    store = experiment.tracking.uri or mlflow_sqlite_uri(folder.path.parents[1] / "mlflow.db")
    return (
        f"import mlflow\n\nmlflow.set_tracking_uri({without_password(store)!r})\n"
        f"student = mlflow.pytorch.load_model({f'models:/{experiment.registered_model}@challenger'!r})"
    )


def _root_option(folder: StudyFolder, root: str | None) -> str:
    shown = str(folder.path.parents[1]) if root is None else root
    return "" if Path(shown) == Path(DEFAULT_ROOT) else f" --root {shlex.quote(shown)}"


def _teachers(experiment: Experiment, summary: StudySummary) -> Sequence[TeacherCard | Mapping[str, str]]:
    """Return the teachers' cards, or their networks before the cards are known."""
    if summary.teacher is None:
        return [{"network": network} for network in experiment.teacher.networks]
    return summary.teachers or [summary.teacher]


def _with_markup(charts: Sequence[Chart]) -> list[dict[str, object]]:
    """Mark SVG that the template must not escape: ElementTree has escaped every text in it."""
    return [{**vars(chart), "svg": Markup(chart.svg)} for chart in charts]
