"""Initial trials of a study: each method's published settings, and every student and teacher once."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.storage.files import damaged, read_json
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.assignment import Origin, teachers_of
from heterokd.study.priors import expected_ranks
from heterokd.study.published import published_samples
from heterokd.study.storage import StudyFacts


@dataclass(frozen=True)
class Start:
    """A sample to try before the sampler's, and its origin."""

    origin: Origin
    sample: Mapping[str, Scalar]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.sample["method"])


def list_starts(experiment: Experiment, facts: StudyFacts, folder: StudyFolder) -> list[Start]:
    """List scratch, the leaders of other studies, every other teacher once, each method's published settings.

    Of students that were added to a study, scratch and the setting of its leader follow the leaders of other studies.
    Methods are sorted by their expected rank in published tables.

    Raises:
        StudyError: `search.match_starts` is set, and the study has not been matched.
    """
    listed = [method for method in facts.methods if method in experiment.listed_methods]
    ordered = sorted(expected_ranks(experiment, listed), key=lambda method: method != BASELINE)

    def exists(sample: Mapping[str, Scalar]) -> bool:
        """Return whether a sample of another source can be trained here."""
        method, teacher, student = str(sample["method"]), sample.get(TEACHER), sample.get("student.network")
        known = teachers_of(experiment, method, facts.excluded)
        if student is not None and student not in experiment.student.networks:
            return False
        return method in facts.methods and (teacher is None or teacher in known)

    published = published_starts(experiment, ordered, facts.excluded)
    published += [sample for sample in matched_samples(experiment, folder, facts.methods) if exists(sample)]
    first = sum(sample["method"] == BASELINE for sample in published)
    starts = [Start("published", sample) for sample in published]
    warm = [Start("warm", sample) for sample in (*facts.warm.samples, *facts.later) if exists(sample)]
    return [*starts[:first], *warm, *starts[first:]]


def published_starts(
    experiment: Experiment, methods: Sequence[str], excluded: Container[str] = ()
) -> list[dict[str, Scalar]]:
    """List scratch (for each student if costs count), every other teacher once, each method's published settings.

    A method uses the first teacher for which it can be built, with the settings published for that pair.

    `methods` are in the order in which they are tried; `excluded`: see `teachers_of`.
    """
    baseline: list[dict[str, Scalar]] = []
    starts: list[dict[str, Scalar]] = []
    for method in methods:
        teachers = teachers_of(experiment, method, excluded) or experiment.teacher.networks
        (baseline if method == BASELINE else starts).extend(_published(experiment, method, teachers[0]))
    if experiment.by_student and baseline:
        baseline += [{**baseline[0], "student.network": network} for network in experiment.student.networks[1:]]
    return [*baseline, *_other_teachers(experiment, methods, excluded, starts), *starts]


def _published(experiment: Experiment, method: str, teacher: str) -> list[dict[str, Scalar]]:
    """Return a method's published settings for a teacher as samples of the experiment."""
    chosen = {TEACHER: teacher} if TEACHER in experiment.domains(method) else {}
    return [{**sample, **chosen} for sample in published_samples(experiment.for_teacher(teacher), method)]


def _other_teachers(
    experiment: Experiment, methods: Sequence[str], excluded: Container[str], starts: Sequence[dict[str, Scalar]]
) -> list[dict[str, Scalar]]:
    """Return a start for each other teacher, with a reference method if possible, otherwise with any."""
    found: list[dict[str, Scalar]] = []
    for teacher in experiment.teacher.networks:
        known = [method for method in methods if teacher in teachers_of(experiment, method, excluded)]
        started = [start["method"] for start in starts if start.get(TEACHER, teacher) == teacher]
        vanilla = [method for method in known if method in VANILLA_KD.values()]
        if vanilla and vanilla[0] not in started:
            found += _published(experiment, vanilla[0], teacher)[:1]
        elif known and not started:
            found += _published(experiment, known[0], teacher)[:1]
    return found


def matched_samples(experiment: Experiment, folder: StudyFolder, methods: Sequence[str]) -> list[dict[str, Scalar]]:
    """Return the starts that `heterokd match` proposed for these methods if `search.match_starts` is set.

    Raises:
        StudyError: the study has not been matched, or match.json is damaged.
    """
    if not experiment.search.match_starts:
        return []
    content = read_json(folder.match_file)
    if "starts" not in content:
        raise StudyError(
            f"search.match_starts: {folder.match_file} is missing; run `heterokd match` on the experiment first, or "
            "set it to false"
        )
    known = {experiment.recipe(sample).hash for method in methods for sample in published_samples(experiment, method)}
    try:
        starts = parse(list[dict[str, Scalar]], content["starts"])
    except ValueError as error:
        raise damaged(folder.match_file, error) from None
    samples = [
        experiment.published(method, start) for start in starts if (method := str(start.get("method"))) in methods
    ]
    return [sample for sample in samples if experiment.recipe(sample).hash not in known]
