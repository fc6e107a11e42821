"""SearchSpace: what a study needs to know of methods and networks, as plain data.

Methods and networks are torch modules. The driver, which imports them, makes the space, and the study decides by it
alone: its actor in a search imports no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Domain, Scalar
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import method_space, teachers_of
from heterokd.study.initial_trials import Start, list_starts
from heterokd.study.priors import expected_ranks
from heterokd.study.storage import StudyFacts, open_database, read_facts

UNSHARED = ("training.workers", "training.gpus_per_worker")
"""Settings that do not change what is trained."""


@dataclass(frozen=True)
class SearchSpace:
    """Samples of a study.

    Attributes:
        domains: by method of the study, the domains of its values.
        defaults: by method, the values of keys that a sample leaves out.
        teachers: by method, those that it exists for; none where it reads none.
        starts: samples that are tried first, in order.
        ranks: by teacher, the mean rank that published tables let expect of each method, best first; empty where the
            study does not use them.
    """

    domains: Mapping[str, Mapping[str, Domain]]
    defaults: Mapping[str, Mapping[str, Scalar]]
    teachers: Mapping[str, tuple[str, ...]]
    starts: tuple[Start, ...]
    ranks: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, experiment: Experiment, facts: StudyFacts, folder: StudyFolder) -> SearchSpace:
        """Make the space of a study.

        Args:
            experiment: the question about the students that are not left out.
            facts: that the study was created with.
            folder: of the study, where `heterokd match` leaves its proposals.

        Raises:
            StudyError: `search.match_starts` is set, and the study has not been matched.
        """
        has_ranks = experiment.search.prior_weight > 0 or facts.warm.ranks
        return cls(
            domains={method: method_space(experiment, method, facts.excluded) for method in facts.methods},
            defaults={method: _defaults(experiment, method) for method in facts.methods},
            teachers={method: teachers_of(experiment, method, facts.excluded) for method in facts.methods},
            starts=tuple(list_starts(experiment, facts, folder)),
            ranks={
                teacher: expected_ranks(experiment.for_teacher(teacher), facts.methods)
                for teacher in experiment.teacher.networks
            }
            if has_ranks
            else {},
        )

    def identity(self, sample: Mapping[str, Scalar]) -> Hashable:
        """What decides the training that a sample describes: equal for two samples of the same recipe."""
        values = {**self.defaults[str(sample["method"])], **sample}
        return tuple((key, values[key]) for key in sorted(values) if key not in UNSHARED)


def open_space(experiment: Experiment, folder: StudyFolder, facts: StudyFacts | None = None) -> SearchSpace:
    """Open or create the study in a folder; return its space.

    Args:
        experiment: the question.
        folder: of the study.
        facts: for a new study.

    Raises:
        StudyError: see `open_database` and `SearchSpace.of`.
    """
    kept = read_facts(open_database(experiment, folder, facts or StudyFacts()))
    return SearchSpace.of(experiment.without(kept.left_out), kept, folder)


def _defaults(experiment: Experiment, method: str) -> dict[str, Scalar]:
    recipe = experiment.recipe({"method": method})
    params = {f"{method}.{name}": value for name, value in recipe.params.items()}
    training = {f"training.{name}": value for name, value in recipe.training.model_dump().items()}
    networks = {"student.network": recipe.student.network}
    if experiment.reads_teacher(method):
        networks[TEACHER] = recipe.teacher.network
    return {**params, **training, **networks}
