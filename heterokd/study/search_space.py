"""SearchSpace: a study's methods and networks as plain data.

Methods and networks are torch modules. The driver, which imports them, makes the space, and the study uses the space
alone: its actor in a search does not import torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.domains import Domain, Scalar
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import method_defaults, method_space, teachers_of
from heterokd.study.initial_trials import Start, list_starts
from heterokd.study.priors import expected_ranks
from heterokd.study.storage import StudyFacts, open_database, read_facts

UNSHARED = ("training.workers", "training.gpus_per_worker")
"""Settings that do not change what is trained."""


@dataclass(frozen=True)
class SearchSpace:
    """Search space of a study.

    Attributes:
        domains: domains of each method's parameters.
        defaults: values of each method for keys that a sample leaves out.
        teachers: teachers for which each method can be built; empty if it reads none.
        starts: samples that are tried first, in order.
        ranks: expected rank of each method in published tables, best first, by teacher; empty if the study does not
            use them.
    """

    domains: Mapping[str, Mapping[str, Domain]]
    defaults: Mapping[str, Mapping[str, Scalar]]
    teachers: Mapping[str, tuple[str, ...]]
    starts: tuple[Start, ...]
    ranks: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, experiment: Experiment, facts: StudyFacts, folder: StudyFolder) -> SearchSpace:
        """Make the space of a study.

        Raises:
            StudyError: `search.match_starts` is set, and the study has not been matched.
        """
        has_ranks = experiment.search.prior_weight > 0 or facts.warm.ranks
        return cls(
            domains={method: method_space(experiment, method, facts.excluded) for method in facts.methods},
            defaults={method: method_defaults(experiment, method) for method in facts.methods},
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
        """Return the values that decide a sample's training: equal for two samples of the same recipe."""
        # A method that is not searched any more has no defaults: its samples differ from all others.
        values = {**self.defaults.get(str(sample["method"]), {}), **sample}
        return tuple((key, values[key]) for key in sorted(values) if key not in UNSHARED)


def open_space(experiment: Experiment, folder: StudyFolder, facts: StudyFacts | None = None) -> SearchSpace:
    """Open or create the study in a folder; return its space.

    Raises:
        StudyError: see `open_database` and `SearchSpace.of`.
    """
    kept = read_facts(open_database(experiment, folder, facts or StudyFacts()))
    return SearchSpace.of(experiment.without(kept.left_out), kept, folder)
