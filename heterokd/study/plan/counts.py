"""Counts: the number of trainings of a search, which needs no measurement except for budgets of time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from heterokd.config.experiment import Experiment
from heterokd.config.search import MOST_TRIALS
from heterokd.methods import BASELINE
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import REFERENCES, method_space
from heterokd.study.confirmation import LEADER_SEEDS, expected_references, most_references, share, share_after
from heterokd.study.distributions import has_freedom
from heterokd.study.initial_trials import matched_samples, published_starts
from heterokd.study.pruner import checkpoint_epochs


@dataclass(frozen=True)
class Counts:
    """Number of trainings that are left of a search.

    Attributes:
        methods: all methods that can be built for the pair.
        students: networks of the students; trainings of the first are measured.
        teachers: networks of the teachers, each with separate caches.
        starts: methods of the published settings, in order; references are never pruned.
        samples: number of samples, which may be pruned.
        sampled: methods of the samples.
        epochs: epochs of a complete training.
        rungs: epochs after which a training may be pruned; empty without pruning.
        factor: inverse of the share of trainings that pass a rung.
        repeats: maximum number of trainings on fresh seeds.
        seeds: number of these seeds, each with a separate cache.
        is_adaptive: whether repetitions end when they cannot change the decision.
        done: number of finished trainings.
        maximise: whether a larger metric is better.
    """

    methods: tuple[str, ...]
    students: tuple[str, ...]
    starts: tuple[str, ...]
    samples: int
    sampled: tuple[str, ...]
    epochs: int
    rungs: tuple[int, ...]
    factor: int
    repeats: int
    seeds: int
    is_adaptive: bool = False
    done: int = 0
    teachers: tuple[str, ...] = ()
    maximise: bool = True

    @property
    def trainings(self) -> int:
        """Maximum number of trainings that are left."""
        return len(self.starts) + self.samples + self.repeats

    @property
    def length(self) -> float:
        """Mean length of a training that may be pruned, as a share of a complete training."""
        left, before, part = 1.0, 0, 0.0
        for rung in (*self.rungs, self.epochs):
            part += left * (rung - before) / self.epochs
            left, before = left / self.factor, rung
        return part


def _length_of(counts: Counts) -> float:
    """Return the mean length of all starts in complete trainings."""
    references = sum(method in REFERENCES for method in counts.starts)
    return references + (len(counts.starts) - references) * counts.length


def count(
    experiment: Experiment,
    excluded: Mapping[str, str],
    folder: StudyFolder | None = None,
    affordable: float | None = None,
) -> Counts:
    """Count the trainings of an experiment's search.

    Args:
        experiment: the experiment.
        excluded: methods that cannot be built for the pair, see `check_experiment`.
        folder: folder of the study; its finished trainings are subtracted, the proposals of `heterokd match` are added.
        affordable: complete trainings within a budget of time or money; None without such a budget.
    """
    settings = experiment.search
    methods = tuple(method for method in experiment.methods if method not in excluded)
    ordered = sorted(methods, key=lambda method: method != BASELINE)
    starts = [str(sample["method"]) for sample in published_starts(experiment, ordered, excluded)][: settings.trials]
    if settings.match_starts and folder is not None and folder.match_file.exists():
        starts += [str(sample["method"]) for sample in matched_samples(experiment, folder, methods)]
        starts = starts[: settings.trials]
    free = tuple(method for method in methods if has_freedom(method_space(experiment, method, excluded)))
    counts = Counts(
        methods=methods,
        students=experiment.student.networks,
        teachers=experiment.teacher.networks,
        starts=tuple(starts),
        samples=settings.trials - len(starts) if free else 0,
        sampled=free,
        epochs=experiment.training.epochs,
        rungs=checkpoint_epochs(experiment, experiment.training.epochs) if settings.prune else (),
        factor=settings.reduction_factor,
        repeats=0,
        seeds=0,
        maximise=experiment.maximise,
    )
    counts = _with_repeats(experiment, counts, _limit(experiment, counts, affordable))
    return counts if folder is None else _left(counts, folder)


def _limit(experiment: Experiment, counts: Counts, affordable: float | None) -> float | None:
    """Return the complete trainings within all limits of the budget; None without a limit."""
    budget = experiment.search.budget
    found = [] if affordable is None else [affordable]
    if budget.trainings is not None:
        found.append(budget.trainings)
    if budget.trials is not None:
        found.append(_length_of(counts) + max(0, budget.trials - len(counts.starts)) * counts.length)
    return min(found, default=None)


def _with_repeats(experiment: Experiment, counts: Counts, limit: float | None) -> Counts:
    """Add the repetitions; if a budget ends the search, reduce the samples to what it allows."""
    settings, starts = experiment.search, _length_of(counts)
    configurations = settings.confirm_leaders or 0
    configurations += BASELINE in counts.methods and 0 < configurations < len(counts.starts) + counts.samples
    if configurations:
        most = max(configurations, len(counts.starts) + counts.samples)
        configurations = min(configurations + most_references(experiment, counts.methods), most)
    fixed = configurations * settings.confirm_seeds
    searched = starts + counts.samples * counts.length
    is_adaptive = settings.confirm_leaders is None
    part = share_after(experiment, searched, is_warm=False) if is_adaptive else 0.0
    if limit is not None and (searched / (1 - part) if is_adaptive else searched + fixed) > limit:
        part = share(experiment, limit, is_warm=False) if is_adaptive else min(fixed, limit / 2) / limit
        searched = (1 - part) * limit
        samples = max(0, math.floor((searched - starts) / counts.length)) if counts.sampled else 0
        counts = replace(
            counts,
            starts=counts.starts if starts <= searched else counts.starts[: math.ceil(searched)],
            samples=min(samples, MOST_TRIALS),
        )
        fixed = math.floor(part * limit)
    if not is_adaptive:
        return replace(counts, repeats=fixed, seeds=settings.confirm_seeds if fixed else 0)
    repeats = math.ceil(part * searched / (1 - part))
    seeds = math.ceil(repeats / LEADER_SEEDS)
    on_top = expected_references(experiment, counts.methods, repeats) if limit is None else 0
    return replace(counts, repeats=repeats + on_top, seeds=seeds, is_adaptive=True)


def _left(counts: Counts, folder: StudyFolder) -> Counts:
    """Subtract the finished trainings of a study."""
    starts = list(counts.starts)
    done: Counter[str] = Counter()
    for trial in folder.trials():
        snapshot = trial.snapshot
        if snapshot.status == TrialStatus.RUNNING:
            continue
        done[snapshot.origin] += 1
        if snapshot.origin == "published" and trial.recipe.method in starts:
            starts.remove(trial.recipe.method)
    repeats = max(0, counts.repeats - done["confirm"])
    return replace(
        counts,
        starts=tuple(starts),
        samples=max(0, counts.samples - done["sampled"]),
        repeats=repeats,
        seeds=min(counts.seeds, repeats),
        done=sum(done.values()),
    )
