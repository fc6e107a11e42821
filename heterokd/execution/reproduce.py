"""reproduce(): the published settings of a pair, trained over seeds, beside the published numbers.

    studies/<name>-reproduce/trials/NNNN/   one training each, as in a study: resumed from its checkpoint, done once
                             reproduction.json, reproduction.csv     the table, rewritten after each training

Published numbers are of test splits that were also selected on. Measured ones are of val, as everywhere before
promotion: they tell whether a method works here as there, not who wins by a tenth of a per cent.
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
from typing import Any

from heterokd.config.experiment import Experiment
from heterokd.config.reading import dump_experiment
from heterokd.errors import ConfigError, did_you_mean
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.distill import StudyTrainer
from heterokd.methods import BASELINE
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.published import PublishedPair, published_results, published_samples, published_settings
from heterokd.study.significance import Comparison, as_rows, compare
from heterokd.tasks import TASKS
from heterokd.teachers.prepare import PreparedTeacher, prepare_teacher
from heterokd.tracking.labels import dataset_inputs
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store
from heterokd.tracking.tracker import with_others
from heterokd.training.data import open_splits
from heterokd.training.train import Metrics, Report


@dataclass(frozen=True)
class ReproducedMethod:
    """One method: what is published and what was measured, in per cent.

    Attributes:
        method: its name.
        published: the task's score (top-1 or mIoU); None when no table has it.
        source: of `published`; empty without one.
        settings: where the hyper-parameters are from.
        values: the score on val, one for each finished seed.
        mean: of `values`; None before the first.
        deviation: sample standard deviation of `values`; None below two.
        difference: mean minus published; None when either is missing.
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
    """The table of a pair.

    Attributes:
        folder: its files.
        pair: what tables say of it; None when none does.
        rows: in the order of the published numbers, best first; methods of no table last.
        excluded: methods that cannot exist for the pair, with the reason.
        metric: what every number is, for people.
        teacher_value: of our teacher on val, per cent.
    """

    folder: StudyFolder
    pair: PublishedPair | None
    rows: tuple[ReproducedMethod, ...]
    excluded: dict[str, str]
    metric: str
    teacher_value: float

    def sentences(self) -> list[str]:
        """What the table alone does not say."""
        said = []
        if self.pair is None:
            said.append("Nothing is published for this data set, teacher and student: measured values stand alone.")
        else:
            missing = [row.method for row in self.rows if row.published is None]
            if missing:
                said.append(f"No table has {', '.join(missing)} for this pair.")
            known = self.pair.teacher_value
            said.append(
                f"Teacher: {'unknown' if known is None else f'{known:.2f}'} published, "
                f"{self.teacher_value:.2f} measured; all numbers are {self.metric} in per cent. "
                "Published: test split, selected on it; measured: val."
            )
        if all(len(row.values) > 1 for row in self.rows):
            said += [one.sentence(digits=2) for one in self.comparisons]
        return said + list(self.excluded.values())

    @property
    def comparisons(self) -> list[Comparison]:
        """Every method with scratch, seed by seed, in per cent; none where scratch was not trained."""
        values = {row.method: dict(enumerate(row.values)) for row in self.rows}
        return compare(values, [(name, BASELINE) for name in values if name != BASELINE and BASELINE in values])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
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
        """One line a method."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "published", "mean", "deviation", "seeds", "difference", "source", "settings"])
        for row in self.rows:
            numbers = [row.published, row.mean, row.deviation, len(row.values), row.difference]
            cells = ["" if one is None else f"{one:.2f}" if isinstance(one, float) else one for one in numbers]
            writer.writerow([row.method, *cells, row.source, row.settings])
        return text.getvalue()


def chosen_methods(experiment: Experiment, methods: Sequence[str] | None) -> tuple[str, ...]:
    """The methods to run: those given, or those of the experiment that a table has for its pair, or all of its own.

    Raises:
        ConfigError: a given one is not among the experiment's.
    """
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
    """Train the published settings of each method over seeds; what was trained before is not trained again.

    Args:
        experiment: data, one teacher, one student, training.
        root: where state lives.
        methods: some of the experiment's; see `chosen_methods`.
        seeds: trainings of each method, from the experiment's own seed upwards.
        on_epoch: told the method, the seed and each epoch's metrics.
        teacher_progress: told each epoch of the teacher's fit.

    Raises:
        UserError: the input is wrong; nothing has been trained then.
    """
    for section, networks in (("student", experiment.student.networks), ("teacher", experiment.teacher.networks)):
        if len(networks) > 1:
            raise ConfigError(
                f"{section}.network: a list is searched; give the one {section} whose table is to be reproduced"
            )
    experiment = experiment.for_teacher(experiment.teacher.networks[0])
    chosen = chosen_methods(experiment, methods)
    measured = f"val/{TASKS[experiment.data.task].score}"
    named = experiment.model_copy(update={"name": f"{experiment.name}-reproduce"})
    excluded = {method: why for method, why in check_experiment(named).items() if method in chosen}
    check_files(named)
    folder = root.fetch_study(named.name)
    uri = open_store(root, experiment.tracking.uri)
    runs = StudyRuns(named, folder, uri, root.artifacts, dataset_inputs(named.data, open_splits(named.data)))
    tracker = with_others(runs, named, folder)
    prepared = prepare_teacher(experiment, root, progress=teacher_progress)
    write_text(folder.experiment_file, dump_experiment(named))
    values: dict[str, list[float]] = {method: [] for method in chosen if method not in excluded}
    table = _table(experiment, folder, values, excluded, prepared)
    trainer = StudyTrainer(root, folder, tracker, prepared)
    # Seed by seed, not method by method: a run that is cut short has still compared all of them.
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
        metric=TASKS[experiment.data.task].score_name,
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
