"""reproduce(): train the published settings of a pair over seeds, and compare with the published numbers.

    studies/<name>-reproduce/trials/NNNN/   a training each, as in a study: resumed from its checkpoint, run once
                             reproduction.json, reproduction.csv     the table, rewritten after each training

Published numbers are from test splits that were also used for selection. Measured ones are from val, as always before
promotion: they show whether a method works here as published, not which method wins by a tenth of a per cent.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, stdev

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.errors import ConfigError, did_you_mean
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.distill import StudyTrainer
from heterokd.execution.prepare import prepare_teacher
from heterokd.formatting import metric_name
from heterokd.methods import BASELINE
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.study.published import PublishedPair, published_results, published_samples, published_settings
from heterokd.study.significance import Comparison, as_rows, compare
from heterokd.tasks import TASKS
from heterokd.teachers.prepare import PreparedTeacher
from heterokd.tracking.runs import open_runs
from heterokd.tracking.tracker import with_others
from heterokd.training.train import Metrics, Report


@dataclass(frozen=True)
class ReproducedMethod:
    """Published and measured scores of a method, in per cent.

    Attributes:
        method: name of the method.
        published: the task's score (top-1 or mIoU); None if no table has it.
        source: source of `published`; empty without it.
        settings: source of the hyper-parameters.
        values: score on val for each finished seed.
        mean: mean of `values`; None before the first.
        deviation: sample standard deviation of `values`; None with fewer than two.
        difference: mean minus published; None if either is missing.
    """

    method: str
    published: float | None
    source: str
    settings: str
    values: tuple[float, ...]
    mean: float | None
    deviation: float | None
    difference: float | None


@dataclass(frozen=True)
class Reproduction:
    """Table of published and measured scores of a pair.

    Attributes:
        folder: folder of the trainings and the table's files.
        pair: published results of the pair; None if there are none.
        rows: a row per method, the best published score first; methods without a published score last.
        excluded: methods that cannot exist for the pair, with the reason.
        metric: name of the score in texts.
        teacher_value: score of our teacher on val, in per cent.
    """

    folder: StudyFolder
    pair: PublishedPair | None
    rows: tuple[ReproducedMethod, ...]
    excluded: dict[str, str]
    metric: str
    teacher_value: float

    def sentences(self) -> list[str]:
        """Explain the table: the teachers, missing numbers, comparisons and excluded methods."""
        lines = []
        if self.pair is None:
            lines.append("Nothing is published for this data set, teacher and student: measured values stand alone.")
        else:
            missing = [row.method for row in self.rows if row.published is None]
            if missing:
                lines.append(f"No table has {', '.join(missing)} for this pair.")
            known = self.pair.teacher_value
            lines.append(
                f"Teacher: {'unknown' if known is None else f'{known:.2f}'} published, "
                f"{self.teacher_value:.2f} measured; all numbers are {self.metric} in per cent. "
                "Published: test split, selected on it; measured: val."
            )
        if all(len(row.values) > 1 for row in self.rows):
            lines += [comparison.sentence(digits=2) for comparison in self.comparisons]
        return lines + list(self.excluded.values())

    @property
    def comparisons(self) -> list[Comparison]:
        """Compare each method with scratch, paired by seed, in per cent; empty if scratch was not trained."""
        values = {row.method: dict(enumerate(row.values)) for row in self.rows}
        return compare(values, [(name, BASELINE) for name in values if name != BASELINE and BASELINE in values])

    def to_json(self) -> dict[str, object]:
        """Convert to JSON values."""
        pair = None if self.pair is None else {"teacher": self.pair.teacher_value, "notes": list(self.pair.notes)}
        return {
            "name": self.folder.name,
            "metric": self.metric,
            "published": pair,
            "teacher": self.teacher_value,
            "rows": [asdict(row) for row in self.rows],
            "comparisons": as_rows(self.comparisons),
            "excluded": self.excluded,
            "sentences": self.sentences(),
        }

    def to_csv(self) -> str:
        """Format as CSV, a line per method."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "published", "mean", "deviation", "seeds", "difference", "source", "settings"])
        for row in self.rows:
            numbers = [row.published, row.mean, row.deviation, len(row.values), row.difference]
            cells = ["" if n is None else f"{n:.2f}" if isinstance(n, float) else n for n in numbers]
            writer.writerow([row.method, *cells, row.source, row.settings])
        return text.getvalue()


def chosen_methods(experiment: Experiment, methods: Sequence[str] | None) -> tuple[str, ...]:
    """Return the given methods, or the experiment's methods with published results for its pair, or all of them.

    Raises:
        ConfigError: a given method is not among the experiment's, or none is given.
    """
    if methods is not None and not methods:
        raise ConfigError("--methods: names no method; give some of the experiment's, separated by commas")
    for method in methods or ():
        if method not in experiment.methods:
            raise ConfigError(
                f"--methods {method}: is not searched by this experiment; {did_you_mean(method, experiment.methods)}"
            )
    if methods:
        return tuple(dict.fromkeys(methods))
    pair = _pair(experiment)
    known = tuple(method for method in experiment.methods if pair is not None and pair.of(method) is not None)
    return known or experiment.methods


def reproduce(
    experiment: Experiment,
    root: Workspace,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    on_epoch: Callable[[str, int, Metrics], bool],
    teacher_progress: Report | None = None,
) -> Reproduction:
    """Train the published settings of each method over seeds; finished trainings are reused.

    Args:
        experiment: data, one teacher, one student, training.
        root: workspace.
        methods: methods of the experiment; see `chosen_methods`.
        seeds: number of trainings per method, with seeds from the experiment's seed upwards.
        on_epoch: called with the method, the seed and the metrics of each epoch.
        teacher_progress: called with the metrics of each epoch of the teacher's fit.

    Raises:
        UserError: the input is wrong; raised before any training.
    """
    for section, networks in (("student", experiment.student.networks), ("teacher", experiment.teacher.networks)):
        if len(networks) > 1:
            raise ConfigError(
                f"{section}.network: a list is searched; give the {section} whose table is to be reproduced"
            )
    experiment = with_given_weights(experiment.for_teacher(experiment.teacher.networks[0]), root)
    chosen = chosen_methods(experiment, methods)
    measured = f"val/{TASKS[experiment.data.task].score}"
    named = experiment.model_copy(update={"name": f"{experiment.name}-reproduce"})
    excluded = {method: why for method, why in check_experiment(named).items() if method in chosen}
    check_files(named, root)
    folder = root.fetch_study(named.name)
    runs = open_runs(named, folder, root)
    tracker = with_others(runs, named, folder)
    prepared = prepare_teacher(experiment, root, progress=teacher_progress)
    write_text(folder.experiment_file, dump_experiment(named))
    values: dict[str, list[float]] = {method: [] for method in chosen if method not in excluded}
    table = _table(experiment, folder, values, excluded, prepared)
    trainer = StudyTrainer(root, folder, tracker, prepared)
    # Seed by seed, not method by method: an interrupted run has still compared all methods.
    for seed in range(experiment.training.seed, experiment.training.seed + seeds):
        for method, found in values.items():
            sample = published_samples(named, method)[0]
            report = partial(on_epoch, method, seed)
            result = trainer.train(named.recipe(sample, seed=seed), sample, report)
            found.append(100 * float(result.metrics[measured]))
            table = _table(experiment, folder, values, excluded, prepared)
            write_text(folder.path / "reproduction.json", json.dumps(table.to_json(), indent=1))
            write_text(folder.path / "reproduction.csv", table.to_csv())
    root.mirror(folder.path).close(skip=("trials",))
    tracker.finish(None)
    return table


def _table(
    experiment: Experiment,
    folder: StudyFolder,
    values: Mapping[str, Sequence[float]],
    excluded: Mapping[str, str],
    prepared: PreparedTeacher,
) -> Reproduction:
    pair = _pair(experiment)
    rows = [_row(experiment, pair, method, tuple(found)) for method, found in values.items()]
    return Reproduction(
        folder=folder,
        pair=pair,
        rows=tuple(sorted(rows, key=lambda row: -math.inf if row.published is None else row.published, reverse=True)),
        excluded=dict(excluded),
        metric=metric_name(TASKS[experiment.data.task].score),
        teacher_value=100 * prepared.card.val_score,
    )


def _row(
    experiment: Experiment, pair: PublishedPair | None, method: str, values: tuple[float, ...]
) -> ReproducedMethod:
    cell = None if pair is None else pair.of(method)
    settings = published_settings(
        method, experiment.data.dataset, experiment.teacher.networks[0], experiment.student.networks[0]
    )
    mean = fmean(values) if values else None
    return ReproducedMethod(
        method=method,
        published=None if cell is None else cell.value,
        source="" if cell is None else cell.source,
        settings=settings[0].source if settings else "the method's defaults",
        values=values,
        mean=mean,
        deviation=stdev(values) if len(values) > 1 else None,
        difference=None if cell is None or mean is None else mean - cell.value,
    )


def _pair(experiment: Experiment) -> PublishedPair | None:
    return published_results(experiment.data.dataset, experiment.teacher.networks[0], experiment.student.networks[0])
