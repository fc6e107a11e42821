"""write_report(): the page of a study, put together from its parts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from heterokd import __version__
from heterokd.config.experiment import Experiment
from heterokd.errors import without_password
from heterokd.formatting import format_interval, format_percent, format_score, metric_name
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report import search_charts as charts
from heterokd.report import student_charts, tables, wording
from heterokd.report.cards import cards, paired_tie
from heterokd.report.parameter_charts import value_charts
from heterokd.report.study_data import StudyReport
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.teacher_card import TeacherCard
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary

DEFAULT_ROOT = "runs"


def write_report(report: StudyReport, *, root: str | None = None) -> None:
    """Write the page of a study into its folder. It is drawn from the study's own files, without data or networks.

    Args:
        report: what `read_study` read.
        root: what the reader gives as `--root`; the folder's own root when left out.
    """
    loader = PackageLoader("heterokd.report", "template")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": format_score, "percent": format_percent, "metric_name": metric_name}
    content = page_content(report, root=root)
    for name in ("style.css", "page.js"):  # both are this package's own, and stand in the page as they are
        content[name.replace(".", "_")] = Markup(loader.get_source(environment, name)[0])
    write_text(report.folder.report, environment.get_template("page.html.j2").render(content))


def page_content(report: StudyReport, *, root: str | None = None) -> dict[str, object]:
    """Everything that the template shows; see `write_report`."""
    folder, experiment, summary, winner = report.folder, report.experiment, report.summary, report.winner
    option = _root_option(folder, root)
    trials, left_out = tables.trial_rows(report)
    network_costs, networks = tables.network_rows(report.measured)
    recipe_file = None if winner is None else folder.trial(winner.number).path / "recipe.yaml"
    return {
        "name": experiment.name,
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "teacher": summary.teacher or {"network": experiment.teacher.networks[0]},
        "teachers": _teachers(experiment, summary),
        "students": experiment.student.networks,
        "dataset": experiment.data.dataset,
        "metric": summary.metric,
        "standing": summary.progress,
        "winner": winner,
        "winner_interval": "" if winner is None else _interval(winner),
        "verdict": wording.verdict(summary),
        "paired_tie": paired_tie(report),
        "cards": cards(report),
        "glance": _with_markup(charts.glance(report)),
        "leaders": tables.leader_rows(report),
        "comparisons": report.comparisons,
        "published": tables.published_tables(report),
        "methods": tables.method_rows(report),
        "method_chart": _with_markup(charts.methods(report)),
        "fronts": [_with_markup(one) for one in student_charts.fronts(report)],
        "front": tables.front_rows(report),
        "costs": [STUDENT_COSTS[key].label() for key in experiment.search.costs],
        "search_charts": [_with_markup(one) for one in (charts.history(report), charts.curves(report))],
        "value_charts": [_with_markup(one) for one in value_charts(report)],
        "seen": [_with_markup(one) for one in student_charts.seen(report)],
        "pictures": tables.embedded_pictures(report),
        "plan": tables.plan_table(report.plan),
        "network_costs": network_costs,
        "networks": networks,
        "notes": wording.notes(summary),
        "failures": tables.failure_rows(report),
        "trials": trials,
        "trials_left_out": left_out,
        "recipe": "" if recipe_file is None or not recipe_file.exists() else recipe_file.read_text(encoding="utf-8"),
        "commands": commands(experiment, winner, folder, option),
        "several_students": len(experiment.student.networks) > 1,
    }


def commands(
    experiment: Experiment, winner: RankedConfig | None, folder: StudyFolder, option: str
) -> list[dict[str, str]]:
    """What to do next, as commands to copy.

    Args:
        experiment: the question.
        winner: the best leader, if there is one.
        folder: of the study.
        option: `--root ...` with a space before it, or nothing.
    """
    name, file = experiment.name, shlex.quote(str(folder.experiment_file))
    found = [
        ("Search again, from nothing", f"heterokd search {file} --set name={name}-again{option}"),
        ("Go on with this search, or with a larger budget", f"heterokd search {file} --resume{option}"),
    ]
    if winner is not None:
        found = [
            ("Open the test split and promote the winner if it passes", f"heterokd promote {name}{option}"),
            ("Show that decision, change nothing", f"heterokd promote {name} --dry-run{option}"),
            (
                "Take it away as ONNX (or pt2, or safetensors that timm opens)",
                f"heterokd export studies/{name} --format onnx --out {name}-onnx{option}",
            ),
            ("Load it in Python", _loading(experiment, folder)),
            *found,
        ]
    found.append(("Every trial in MLflow's pages", f"heterokd ui{option}"))
    return [{"what": what, "text": text} for what, text in found]


def _loading(experiment: Experiment, folder: StudyFolder) -> str:
    """Python that opens the registered winner."""
    store = experiment.tracking.uri or f"sqlite:///{folder.path.parents[1] / 'mlflow.db'}"
    return (
        f"import mlflow\n\nmlflow.set_tracking_uri({without_password(store)!r})\n"
        f"student = mlflow.pytorch.load_model({f'models:/{experiment.registered_model}@challenger'!r})"
    )


def _root_option(folder: StudyFolder, root: str | None) -> str:
    shown = str(folder.path.parents[1]) if root is None else root
    return "" if Path(shown) == Path(DEFAULT_ROOT) else f" --root {shlex.quote(shown)}"


def _interval(leader: RankedConfig) -> str:
    if not leader.confirmed:
        return ", one training, the best of its search: a fresh one will reach less"
    count = len(leader.seeds)
    seeds = f"{count} fresh seed{'' if count == 1 else 's'}"
    if leader.low is None:
        return f", {seeds}"
    return f" ({format_interval(leader.low, leader.high)}, {seeds})"


def _teachers(experiment: Experiment, summary: StudySummary) -> Sequence[TeacherCard | Mapping[str, str]]:
    """What is known of each teacher: its card, once there is one."""
    if summary.teacher is None:
        return [{"network": network} for network in experiment.teacher.networks]
    return summary.teachers or [summary.teacher]


def _with_markup(made: charts.Chart) -> dict[str, object]:
    """A chart whose SVG the template does not escape: ElementTree has escaped every text in it."""
    return {**made.__dict__, "svg": Markup(made.svg)}
