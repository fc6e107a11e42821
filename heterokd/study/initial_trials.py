"""What a study begins with: each method's published settings, and every student and teacher once."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.storage.files import read_json
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.assignment import Origin, teachers_of
from heterokd.study.priors import expected_ranks
from heterokd.study.published import published_samples
from heterokd.study.storage import StudyFacts


@dataclass(frozen=True)
class Start:
    """Values that are given: of a start, or of a configuration that is repeated."""

    origin: Origin
    sample: Mapping[str, Scalar]

    @property
    def method(self) -> str:
        """The method that is distilled with."""
        return str(self.sample["method"])


def list_starts(experiment: Experiment, facts: StudyFacts, folder: StudyFolder) -> list[Start]:
    """Scratch, what led in other studies, every other teacher once, each method's published settings.

    Methods come by the rank that published tables let expect.

    Args:
        experiment: the question.
        facts: of the study.
        folder: of the study, where `heterokd match` leaves its proposals.

    Raises:
        StudyError: `search.match_starts` is set, and the study has not been matched.
    """
    ordered = sorted(expected_ranks(experiment, facts.methods), key=lambda method: method != BASELINE)

    def exists(sample: Mapping[str, Scalar]) -> bool:
        """Whether a sample that others propose can be trained here."""
        method, teacher = str(sample["method"]), sample.get(TEACHER)
        known = teachers_of(experiment, method, facts.excluded)
        return method in facts.methods and (teacher is None or teacher in known)

    published = published_starts(experiment, ordered, facts.excluded)
    published += [sample for sample in matched_samples(experiment, folder, facts.methods) if exists(sample)]
    first = sum(sample["method"] == BASELINE for sample in published)
    starts = [Start("published", sample) for sample in published]
    warm = [Start("warm", sample) for sample in facts.warm.samples if exists(sample)]
    return [*starts[:first], *warm, *starts[first:]]


def published_starts(
    experiment: Experiment, methods: Sequence[str], excluded: Container[str] = ()
) -> list[dict[str, Scalar]]:
    """Scratch (of each student, where size counts), every other teacher once, each method's published settings.

    A method follows the first teacher for which it exists, by the settings that are published for that pair.

    Args:
        experiment: the question.
        methods: of the study, in the order in which they are tried.
        excluded: see `teachers_of`.
    """
    baseline: list[dict[str, Scalar]] = []
    starts: list[dict[str, Scalar]] = []
    for method in methods:
        own = teachers_of(experiment, method, excluded) or experiment.teacher.networks
        (baseline if method == BASELINE else starts).extend(_published(experiment, method, own[0]))
    if experiment.by_student and baseline:
        baseline += [{**baseline[0], "student.network": network} for network in experiment.student.networks[1:]]
    return [*baseline, *_of_each_teacher(experiment, methods, excluded, starts), *starts]


def _published(experiment: Experiment, method: str, teacher: str) -> list[dict[str, Scalar]]:
    """A method's published settings for one of the experiment's teachers, as samples of the experiment."""
    chosen = {TEACHER: teacher} if TEACHER in experiment.domains(method) else {}
    return [{**sample, **chosen} for sample in published_samples(experiment.for_teacher(teacher), method)]


def _of_each_teacher(
    experiment: Experiment, methods: Sequence[str], excluded: Container[str], starts: Sequence[dict[str, Scalar]]
) -> list[dict[str, Scalar]]:
    """The other teachers by a method that shows what each is worth; by any, where no such method is searched."""
    found: list[dict[str, Scalar]] = []
    for teacher in experiment.teacher.networks:
        known = [method for method in methods if teacher in teachers_of(experiment, method, excluded)]
        followed_by = [start["method"] for start in starts if start.get(TEACHER, teacher) == teacher]
        vanilla = [method for method in known if method in VANILLA_KD.values()]
        if vanilla and vanilla[0] not in followed_by:
            found += _published(experiment, vanilla[0], teacher)[:1]
        elif known and not followed_by:
            found += _published(experiment, known[0], teacher)[:1]
    return found


def matched_samples(experiment: Experiment, folder: StudyFolder, methods: Sequence[str]) -> list[dict[str, Scalar]]:
    """The starts that `heterokd match` proposes for these methods, if `search.match_starts` asks for them.

    Raises:
        StudyError: the study has not been matched.
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
    starts = parse(list[dict[str, Scalar]], content["starts"])
    samples = [experiment.published(method, start) for start in starts if (method := str(start["method"])) in methods]
    return [sample for sample in samples if experiment.recipe(sample).hash not in known]
