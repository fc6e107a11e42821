"""What is published: the papers' tables and settings as data, and what a search may take from them.

`tables/*.yaml` holds the numbers (every table names its paper), `tables/settings.yaml` the hyper-parameters. Both
were selected on test sets: here they are starting points and something to compare with, never targets.

Pairs are found by data set, teacher and student; a network's name counts without timm's tag (`resnet50.tv_in1k` is
`resnet50`), and its options do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.config.yaml_files import read_yaml
from heterokd.datasets import DATASETS
from heterokd.domains import Scalar
from heterokd.errors import NetworkError, StudyError
from heterokd.methods import BASELINE
from heterokd.networks.network import predict_spec
from heterokd.storage.files import read_json
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.tasks import TASKS

FOLDER = Path(__file__).parent / "tables"

UNRANKED = 0.5
"""Mean rank of a method that stands in no table: the middle."""

SHARPNESS = 4.0
"""How much likelier the prior draws the best method (mean rank 0) than the worst (1): e to this power."""


WARM_LEADERS = 3
"""Leaders of another study that a search begins with."""

WARM_WEIGHT = 0.5
"""Share of the first samples whose method is drawn by ranks, in a search that begins where others ended."""


@dataclass(frozen=True)
class PublishedResult:
    """One cell of a table.

    Attributes:
        method: `scratch` for the student without a teacher.
        value: per cent, on the test split.
        top5: likewise; None where it is not printed.
        source: paper and table, and who quotes it where the paper itself was not read; several where they agree.
        metric: what `value` is: the score of the data set's task, `top1` or `miou`.
    """

    method: str
    value: float
    top5: float | None
    source: str
    metric: str = "top1"


@dataclass(frozen=True)
class PublishedPair:
    """What all tables say of one data set, teacher and student.

    Attributes:
        dataset: name in heterokd.
        teacher: the network, without timm's tag.
        student: likewise.
        teacher_name: as the paper calls it.
        student_name: likewise.
        teacher_kind: cnn, attention or mlp.
        student_kind: likewise.
        teacher_value: per cent, of the first table that has it; None when none does.
        results: never empty; a method stands more than once where sources disagree, its own paper's number first.
        notes: of the tables.
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
        """The method's number, its own paper's where sources disagree; None when no table has it."""
        return next((result for result in self.results if result.method == method), None)

    @property
    def metric(self) -> str:
        """What all its numbers are: `top1` or `miou`."""
        return self.results[0].metric

    @property
    def metric_name(self) -> str:
        """The metric for people."""
        return next(task.score_name for task in TASKS.values() if task.score == self.metric)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the tables, scratch among them, each once."""
        return tuple(dict.fromkeys(result.method for result in self.results))


@dataclass(frozen=True)
class PublishedSetting:
    """Hyper-parameters of one method on some pairs.

    Attributes:
        method: whose.
        values: parameters that differ from the method's defaults, or are named explicitly.
        task_weight: of the cross-entropy with the labels; None: as the experiment says.
        top1: per cent, of exactly these settings, where a table has it.
        source: where they are printed.
        reading: what had to be guessed.
    """

    method: str
    values: Mapping[str, Scalar] = field(hash=False)
    task_weight: float | None
    top1: float | None
    source: str
    reading: str | None

    @property
    def sample(self) -> dict[str, Scalar]:
        """The settings with a sample's keys."""
        weight = {} if self.task_weight is None else {"training.task_weight": self.task_weight}
        return {f"{self.method}.{name}": value for name, value in self.values.items()} | weight


def published_results(dataset: str, teacher: str, student: str) -> PublishedPair | None:
    """All published numbers of a pair; None when no table has it."""
    return _pairs().get((dataset, _plain(teacher), _plain(student)))


def published_pairs() -> tuple[PublishedPair, ...]:
    """Every pair of every table, each once, in the order of the tables."""
    return tuple(_pairs().values())


def published_settings(method: str, dataset: str, teacher: str, student: str) -> tuple[PublishedSetting, ...]:
    """The published hyper-parameters of a method on a pair; the printed tables' own first, none when none are known."""
    found = []
    for entry in _settings():
        fits = (
            entry["method"] == method
            and entry["dataset"] == dataset
            and _plain(teacher) in entry.get("teachers", [_plain(teacher)])
            and _plain(student) in entry.get("students", [_plain(student)])
        )
        if fits:
            found.append(_setting(entry))
    return tuple(found)


def published_samples(experiment: Experiment, method: str) -> tuple[dict[str, Scalar], ...]:
    """What to try of a method first: its published settings for the experiment's first pair, or its defaults.

    Values that a narrowed domain does not hold are replaced by its nearest one. Never empty; no sample stands twice.
    """
    teacher, student = experiment.teacher.networks[0], experiment.student.networks[0]
    settings = published_settings(method, experiment.data.dataset, teacher, student)
    samples: list[dict[str, Scalar]] = []
    for setting in settings or (None,):
        sample = experiment.published(method, {} if setting is None else setting.sample)
        if sample not in samples:
            samples.append(sample)
    return tuple(samples)


def matched_samples(experiment: Experiment, folder: StudyFolder, methods: Sequence[str]) -> list[dict[str, Scalar]]:
    """The starts that `heterokd match` proposes for these methods, where `search.match_starts` asks for them.

    Raises:
        StudyError: the study has not been matched.
    """
    if not experiment.search.match_starts:
        return []
    starts = read_json(folder.match_file).get("starts")
    if starts is None:
        raise StudyError(
            f"search.match_starts: {folder.match_file} is missing; run `heterokd match` on the experiment first, or "
            "set it to false"
        )
    known = {experiment.recipe(sample).hash for method in methods for sample in published_samples(experiment, method)}
    samples = [experiment.published(start["method"], start) for start in starts if start["method"] in methods]
    return [sample for sample in samples if experiment.recipe(sample).hash not in known]


def method_ranking(dataset: str, teacher_kind: str, student_kind: str) -> dict[str, float]:
    """Mean rank of every method on similar pairs, best first: 0 is the best of each pair, 1 the worst.

    Similar are pairs of the same data set and kinds (cnn, attention, mlp); where there are none, of the same kinds on
    any data set; then of the same student's kind; then all, always of the data set's task. Methods are ranked within
    each pair, so that easy pairs count as much as hard ones; ties share their mean rank. A method that the similar
    pairs leave out takes its rank from the next wider circle.
    """
    score = TASKS[DATASETS[dataset].tasks].score
    pairs = [pair for pair in published_pairs() if pair.metric == score]
    circles = (
        lambda pair: (pair.dataset, pair.teacher_kind, pair.student_kind) == (dataset, teacher_kind, student_kind),
        lambda pair: (pair.teacher_kind, pair.student_kind) == (teacher_kind, student_kind),
        lambda pair: pair.student_kind == student_kind,
        lambda pair: True,
    )
    ranking: dict[str, float] = {}
    for is_similar in circles:
        for method, rank in _mean_ranks(pair for pair in pairs if is_similar(pair)).items():
            ranking.setdefault(method, rank)
    return dict(sorted(ranking.items(), key=lambda item: item[1]))


def expected_ranks(experiment: Experiment, methods: Sequence[str]) -> dict[str, float]:
    """The mean rank that the tables let expect of each method on the experiment's (first) pair, best first.

    Methods of no table stand in the middle; equals keep their order.
    """
    ranking = method_ranking(experiment.data.dataset, *_kinds(experiment))
    expected = {method: ranking.get(method, UNRANKED) for method in methods}
    return dict(sorted(expected.items(), key=lambda item: item[1]))


@dataclass(frozen=True)
class Warm:
    """What finished studies of similar pairs let expect.

    Attributes:
        samples: what led there, in this experiment's own space, best first.
        ranks: by method, its mean rank there: 0 the best, 1 the worst.
    """

    samples: tuple[dict[str, Scalar], ...] = ()
    ranks: Mapping[str, float] = field(default_factory=dict)


def finished_summaries(experiment: Experiment, root: Workspace) -> list[dict[str, Any]]:
    """The summaries of the studies that `search.warm_start_from` names.

    Raises:
        StudyError: a study is unknown, not finished, or this one.
    """
    summaries = []
    for name in experiment.search.warm_start_from:
        if name == experiment.name:
            raise StudyError(f"search.warm_start_from: {name!r} is this study itself; name others")
        try:
            summary = root.existing_study(name).summary
        except StudyError as error:
            raise StudyError(f"search.warm_start_from: {error}") from None
        if not summary.get("standing", {}).get("finished"):
            raise StudyError(
                f"search.warm_start_from: the study {name!r} is not finished; go on with it (heterokd search ... "
                "--resume), or take it off the list"
            )
        summaries.append(summary)
    return summaries


def warm_starts(experiment: Experiment, summaries: Sequence[Mapping[str, Any]]) -> Warm:
    """What to begin with after other studies, each of which counts as much as the others.

    Args:
        experiment: its methods and domains decide what of it is usable: values that a domain does not hold are replaced
            by its nearest one, keys that it does not have are left out.
        summaries: of the studies, as `Study.summary` gives them.
    """
    columns = []
    ranks: dict[str, list[float]] = {}
    for summary in summaries:
        leaders = [leader for leader in summary["leaders"] if leader["method"] in experiment.methods]
        teacher = (summary.get("teacher") or {}).get("network")
        followed = {TEACHER: teacher} if teacher in experiment.teacher.networks else {}
        first = list(dict.fromkeys(leader["method"] for leader in leaders))
        for place, method in enumerate(first):
            ranks.setdefault(method, []).append(place / max(1, len(first) - 1))
        found = [leader["sample"] for leader in leaders if leader["method"] != BASELINE][:WARM_LEADERS]
        columns.append([{**followed, **sample} for sample in found])
    samples: list[dict[str, Scalar]] = []
    # The best of each study, then the second of each.
    for place in range(WARM_LEADERS):
        for column in columns:
            if place < len(column):
                sample = _translated(experiment, column[place])
                if sample not in samples:
                    samples.append(sample)
    return Warm(tuple(samples), {method: math.fsum(found) / len(found) for method, found in ranks.items()})


def _translated(experiment: Experiment, sample: Mapping[str, Scalar]) -> dict[str, Scalar]:
    method = str(sample["method"])
    known = experiment.domains(method)
    return experiment.published(method, {key: value for key, value in sample.items() if key in known})


def method_prior(
    experiment: Experiment, methods: Sequence[str], finished: int, warm: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """With which probability the next sample's method is drawn by the tables instead of by the sampler.

        share(n) = w exp(-n / N)           q(m) = exp(-s r(m)) / sum_m' exp(-s r(m'))           share(n) q(m)

    w is `search.prior_weight` (at least `WARM_WEIGHT` after other studies, whose ranks then count half), n the finished
    samples (published starts apart), N the number of methods, r the expected mean rank and s `SHARPNESS`. The share
    vanishes within a few N samples, so that the tables cannot hold a search that finds them wrong; what is left of 1
    belongs to the sampler.

    Args:
        experiment: the question; of several teachers the first one's pair is meant, see `Experiment.following`.
        methods: that are sampled.
        finished: samples.
        warm: mean ranks in other studies.
    """
    weight = max(experiment.search.prior_weight, WARM_WEIGHT if warm else 0.0)
    if not weight or not methods:
        return {}
    share = weight * math.exp(-finished / len(methods))
    ranks = expected_ranks(experiment, methods)
    ranks = {method: (rank + warm[method]) / 2 if method in warm else rank for method, rank in ranks.items()}
    likely = {method: math.exp(-SHARPNESS * rank) for method, rank in ranks.items()}
    total = math.fsum(likely.values())
    return {method: share * value / total for method, value in likely.items()}


@lru_cache(maxsize=1)
def _settings() -> tuple[dict[str, Any], ...]:
    return tuple(read_yaml(FOLDER / "settings.yaml")["settings"])


def _setting(entry: Mapping[str, Any]) -> PublishedSetting:
    return PublishedSetting(
        method=entry["method"],
        values=dict(entry["values"]),
        task_weight=entry.get("task_weight"),
        top1=entry.get("top1"),
        source=entry["source"],
        reading=entry.get("reading"),
    )


@dataclass(frozen=True)
class _Row:
    """A row of a table with what stands over it."""

    source: str
    notes: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def metric(self) -> str:
        return "miou" if "miou" in self.content["student"] else "top1"


@lru_cache(maxsize=1)
def _pairs() -> dict[tuple[str, str, str], PublishedPair]:
    found: dict[tuple[str, str, str], list[_Row]] = {}
    for file in sorted(FOLDER.glob("*_table*.yaml")):
        table = read_yaml(file)
        for row in table["rows"]:
            key = (row.get("dataset", table.get("dataset")), row["teacher"]["network"], row["student"]["network"])
            found.setdefault(key, []).append(_Row(_source(table, row), tuple(table.get("notes", ())), row))
    return {key: _pair(key, rows) for key, rows in found.items()}


def _source(table: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    place = row.get("table", table.get("table"))
    printed = f"{table['short']}{f', Table {place}' if place else ''} (arXiv {table['arxiv']})"
    if "through" in row:
        return f"{printed}, second-hand through {row['through']}"
    return f"{printed}, {table['place']}" if "place" in table else printed


def _pair(key: tuple[str, str, str], rows: Sequence[_Row]) -> PublishedPair:
    sources: dict[tuple[str, float, float | None], list[str]] = {}
    for row in rows:
        for method, value, top5 in _cells(row):
            # One number with more digits of information (top-5) says the same of top-1 as one without.
            same = next((one for one in sources if one[:2] == (method, value) and None in (one[2], top5)), None)
            if same is not None and same[2] is None and top5 is not None:
                sources[method, value, top5] = sources.pop(same)
                same = (method, value, top5)
            sources.setdefault(same or (method, value, top5), []).append(row.source)

    def is_foreign(cell: tuple[str, float, float | None]) -> bool:
        """A number for which no paper of the method's own stands."""
        return not any(source.lower().startswith((f"{cell[0]},", f"{cell[0]} ")) for source in sources[cell])

    first = rows[0].content
    return PublishedPair(
        *key,
        teacher_name=first["teacher"]["name"],
        student_name=first["student"]["name"],
        teacher_kind=first["teacher"]["kind"],
        student_kind=first["student"]["kind"],
        teacher_value=next((value for row in rows if (value := row.content["teacher"].get(row.metric))), None),
        results=tuple(
            PublishedResult(*cell, source="; ".join(sources[cell]), metric=rows[0].metric)
            for cell in sorted(sources, key=is_foreign)  # stable: otherwise the order of the tables
        ),
        notes=tuple(dict.fromkeys(note for row in rows for note in row.notes)),
    )


def _cells(row: _Row) -> Iterable[tuple[str, float, float | None]]:
    """Method, score and top-5 of a row, the student from scratch first."""
    student = row.content["student"]
    if student.get("scratch", True):
        yield BASELINE, student[row.metric], student.get("top5")
    for method, value in row.content["results"].items():
        if isinstance(value, Mapping):
            yield method, value[row.metric], value.get("top5")
        else:
            yield method, value, None


def _mean_ranks(pairs: Iterable[PublishedPair]) -> dict[str, float]:
    ranks: dict[str, list[float]] = {}
    for pair in pairs:
        values = {method: result.value for method in pair.methods if (result := pair.of(method)) is not None}
        for method, value in values.items():
            better = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values()) - 1
            ranks.setdefault(method, []).append((better + equal / 2) / max(1, len(values) - 1))
    return {method: math.fsum(found) / len(found) for method, found in ranks.items()}


def _kinds(experiment: Experiment) -> tuple[str, str]:
    """Of teacher and (first) student: what their last stage is made of; empty for a network that cannot be built."""

    def kind(settings: NetworkSettings) -> str:
        try:
            return predict_spec(settings.network, 10, settings.options, experiment.data.image_size).stages[-1].kind
        except NetworkError:
            return ""

    return kind(experiment.teacher.one()), kind(experiment.student.one())


def _plain(network: str) -> str:
    return network.partition(".")[0]
