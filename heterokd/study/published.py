"""Published results and hyper-parameters, by data set, teacher and student.

`tables/*.yaml` holds the results (every table names its paper), `tables/settings.yaml` the hyper-parameters. Both were
selected on test sets: here they are starting points and references, never targets.

A network is identified by its name without timm's tag (`resnet50.tv_in1k` is `resnet50`) and without its options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.config.yaml_files import read_yaml
from heterokd.domains import Scalar
from heterokd.formatting import metric_name
from heterokd.methods import BASELINE
from heterokd.storage.typed_json import parse
from heterokd.tasks import TASKS

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class PublishedResult:
    """A cell of a table.

    Attributes:
        method: name of the method; `scratch` for the student without a teacher.
        value: score in per cent, on the test split.
        top5: top-5 accuracy in per cent, on the test split; None if it is not published.
        source: paper and table, and the paper that quotes it if it was not read itself; all sources that agree.
        metric: metric of `value`.
    """

    method: str
    value: float
    top5: float | None
    source: str
    metric: str = "top1"


@dataclass(frozen=True)
class PublishedPair:
    """All published numbers of a data set, teacher and student.

    Attributes:
        dataset: name in heterokd.
        teacher: the network, without timm's tag.
        student: the network, without timm's tag.
        teacher_name: name in the paper.
        student_name: name in the paper.
        teacher_kind: cnn, attention or mlp.
        student_kind: cnn, attention or mlp.
        teacher_value: score in per cent, of the first table that has it, or None.
        results: never empty; several of a method if sources disagree, that of the method's paper first.
        notes: notes of the tables.
    """

    dataset: str
    teacher: str
    student: str
    teacher_name: str
    student_name: str
    teacher_kind: str
    student_kind: str
    teacher_value: float | None
    results: tuple[PublishedResult, ...]
    notes: tuple[str, ...] = ()

    def of(self, method: str) -> PublishedResult | None:
        """Return the method's result, that of its paper if sources disagree; None if no table has it."""
        return next((result for result in self.results if result.method == method), None)

    @property
    def metric(self) -> str:
        """Metric of the results."""
        return self.results[0].metric

    @property
    def metric_name(self) -> str:
        """Printed name of the metric."""
        return metric_name(self.metric)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the tables, including the baseline, without duplicates."""
        return tuple(dict.fromkeys(result.method for result in self.results))


@dataclass(frozen=True)
class PublishedSetting:
    """Hyper-parameters of a method on some pairs; an entry of `tables/settings.yaml`.

    Attributes:
        method: name of the method.
        dataset: name of the data set.
        source: paper and section.
        values: parameters that differ from the method's defaults, or are named explicitly.
        teachers: networks without timm's tag; empty: any.
        students: networks without timm's tag; empty: any.
        task_weight: weight of the cross-entropy with the labels; None: that of the experiment.
        top1: top-1 accuracy in per cent of these settings, if a table has it.
        reading: assumptions where the paper is incomplete.
    """

    method: str
    dataset: str
    source: str
    values: Mapping[str, Scalar] = field(hash=False)
    teachers: tuple[str, ...] = ()
    students: tuple[str, ...] = ()
    task_weight: float | None = None
    top1: float | None = None
    reading: str | None = None

    @property
    def sample(self) -> dict[str, Scalar]:
        """Settings by the keys of a sample."""
        weight = {} if self.task_weight is None else {"training.task_weight": self.task_weight}
        return {f"{self.method}.{name}": value for name, value in self.values.items()} | weight


def published_results(dataset: str, teacher: str, student: str) -> PublishedPair | None:
    """Return all published numbers of a pair; None if no table has it."""
    return _pairs().get((dataset, _plain(teacher), _plain(student)))


def published_pairs() -> tuple[PublishedPair, ...]:
    """Return the pairs of all tables, in the order of the tables."""
    return tuple(_pairs().values())


def published_settings(method: str, dataset: str, teacher: str, student: str) -> tuple[PublishedSetting, ...]:
    """Return the published hyper-parameters of a method on a pair, those of the published results first."""
    return tuple(
        setting
        for setting in _settings()
        if (setting.method, setting.dataset) == (method, dataset)
        and (not setting.teachers or _plain(teacher) in setting.teachers)
        and (not setting.students or _plain(student) in setting.students)
    )


def settings_of(method: str) -> tuple[PublishedSetting, ...]:
    """Return all published hyper-parameters of a method that differ from its defaults, in the order of the file."""
    return tuple(setting for setting in _settings() if setting.method == method)


def published_samples(experiment: Experiment, method: str) -> tuple[dict[str, Scalar], ...]:
    """Return a method's published settings for the experiment's first pair as samples, or its defaults.

    Values outside a narrowed domain are clipped to it. Never empty, without duplicates.
    """
    teacher, student = experiment.teacher.networks[0], experiment.student.networks[0]
    settings = published_settings(method, experiment.data.dataset, teacher, student)
    samples: list[dict[str, Scalar]] = []
    for setting in settings or (None,):
        sample = experiment.published(method, {} if setting is None else setting.sample)
        if sample not in samples:
            samples.append(sample)
    return tuple(samples)


@lru_cache(maxsize=1)
def _settings() -> tuple[PublishedSetting, ...]:
    return parse(tuple[PublishedSetting, ...], read_yaml(FOLDER / "settings.yaml")["settings"])


@dataclass(frozen=True)
class _Row:
    """A row of a table: scores of a pair."""

    teacher: Mapping[str, str | float | bool]
    student: Mapping[str, str | float | bool]
    results: Mapping[str, float | Mapping[str, float]]
    dataset: str | None = None
    table: int | str | None = None
    through: str | None = None

    @property
    def metric(self) -> str:
        return next(task.score for task in TASKS.values() if task.score in self.student)


@dataclass(frozen=True)
class _Table:
    """A file of published results."""

    short: str
    arxiv: str
    rows: tuple[_Row, ...]
    dataset: str | None = None
    table: int | str | None = None
    place: str | None = None
    notes: tuple[str, ...] = ()

    def source(self, row: _Row) -> str:
        number = row.table or self.table
        printed = f"{self.short}{f', Table {number}' if number else ''} (arXiv {self.arxiv})"
        if row.through is not None:
            return f"{printed}, second-hand through {row.through}"
        return f"{printed}, {self.place}" if self.place is not None else printed


@lru_cache(maxsize=1)
def _pairs() -> dict[tuple[str, str, str], PublishedPair]:
    found: dict[tuple[str, str, str], list[tuple[_Table, _Row]]] = {}
    for file in sorted(FOLDER.glob("*_table*.yaml")):
        table = parse(_Table, read_yaml(file))
        for row in table.rows:
            dataset = row.dataset or table.dataset or ""
            key = (dataset, str(row.teacher["network"]), str(row.student["network"]))
            found.setdefault(key, []).append((table, row))
    return {key: _pair(key, rows) for key, rows in found.items()}


def _pair(key: tuple[str, str, str], rows: Sequence[tuple[_Table, _Row]]) -> PublishedPair:
    sources: dict[tuple[str, float, float | None], list[str]] = {}
    for table, row in rows:
        for method, value, top5 in _cells(row):
            # A cell with top-5 and a cell without are the same number if their scores are equal.
            same = next((cell for cell in sources if cell[:2] == (method, value) and None in (cell[2], top5)), None)
            if same is not None and same[2] is None and top5 is not None:
                sources[method, value, top5] = sources.pop(same)
                same = (method, value, top5)
            sources.setdefault(same or (method, value, top5), []).append(table.source(row))

    def is_foreign(cell: tuple[str, float, float | None]) -> bool:
        """Return whether a number is not from the method's paper."""
        return not any(source.lower().startswith((f"{cell[0]},", f"{cell[0]} ")) for source in sources[cell])

    first = rows[0][1]
    teacher_values = [score for _, row in rows if (score := _score(row.teacher, row.metric)) is not None]
    return PublishedPair(
        *key,
        teacher_name=str(first.teacher["name"]),
        student_name=str(first.student["name"]),
        teacher_kind=str(first.teacher["kind"]),
        student_kind=str(first.student["kind"]),
        teacher_value=teacher_values[0] if teacher_values else None,
        results=tuple(
            PublishedResult(*cell, source="; ".join(sources[cell]), metric=first.metric)
            for cell in sorted(sources, key=is_foreign)  # stable: otherwise the order of the tables
        ),
        notes=tuple(dict.fromkeys(note for table, _ in rows for note in table.notes)),
    )


def _cells(row: _Row) -> Iterable[tuple[str, float, float | None]]:
    """Yield method, score and top-5 of a row, the student from scratch first."""
    scratch = _score(row.student, row.metric)
    if row.student.get(BASELINE, True) and scratch is not None:
        yield BASELINE, scratch, _score(row.student, "top5")
    for method, value in row.results.items():
        if isinstance(value, Mapping):
            yield method, value[row.metric], value.get("top5")
        else:
            yield method, value, None


def _score(values: Mapping[str, str | float | bool], metric: str) -> float | None:
    value = values.get(metric)
    return value if isinstance(value, float) else None


def _plain(network: str) -> str:
    return network.partition(".")[0]
