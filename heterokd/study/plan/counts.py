"""How many trainings a search makes: the part of a plan that needs no clock, but for budgets of time."""

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
from heterokd.study.confirmation import LEADER_SEEDS, share, share_after
from heterokd.study.initial_trials import matched_samples, published_starts
from heterokd.study.pruner import checkpoint_epochs
from heterokd.study.sampler import has_freedom


@dataclass(frozen=True)
class Counts:
    """What is left of a search.

    Attributes:
        methods: all that exist for the pair.
        students: their networks, the first one's trainings are measured.
        teachers: their networks; each has caches of its own.
        starts: methods of the published settings that come first, in order; references are trained to the end.
        samples: trainings that the sampler proposes, and pruning may end.
        sampled: methods that it chooses from.
        epochs: of a whole training.
        rungs: epochs after which a training may end; empty without pruning.
        factor: one in so many passes a rung.
        repeats: trainings again on fresh seeds, at most.
        seeds: that they are of: each has a cache of its own.
        is_adaptive: whether repetitions end once they cannot change the decision.
        done: trainings that are done already.
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
        """All that are left, at most."""
        return len(self.starts) + self.samples + self.repeats

    @property
    def length(self) -> float:
        """Of a whole training, what one that may be stopped takes in the mean."""
        left, before, part = 1.0, 0, 0.0
        for rung in (*self.rungs, self.epochs):
            part += left * (rung - before) / self.epochs
            left, before = left / self.factor, rung
        return part


def _length_of(counts: Counts) -> float:
    """Whole trainings that the starts take in the mean."""
    spared = sum(method in REFERENCES for method in counts.starts)
    return spared + (len(counts.starts) - spared) * counts.length


def count(
    experiment: Experiment,
    excluded: Mapping[str, str],
    folder: StudyFolder | None = None,
    affordable: float | None = None,
) -> Counts:
    """What an experiment's search will train.

    Args:
        experiment: the question.
        excluded: methods that do not exist for the pair, see `check_experiment`.
        folder: of the study; what is done there is not done again, and what was matched there comes after the starts.
        affordable: whole trainings that its budget of time or money pays for; None where it has none.
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
    """Whole trainings that every limit of the budget pays for; None without a limit."""
    budget = experiment.search.budget
    found = [] if affordable is None else [affordable]
    if budget.trainings is not None:
        found.append(budget.trainings)
    if budget.trials is not None:
        found.append(_length_of(counts) + max(0, budget.trials - len(counts.starts)) * counts.length)
    return min(found, default=None)


def _with_repeats(experiment: Experiment, counts: Counts, limit: float | None) -> Counts:
    """The same with its repetitions; where a budget ends the search, with as many samples as that pays for."""
    settings, starts = experiment.search, _length_of(counts)
    configurations = settings.confirm_leaders or 0
    configurations += BASELINE in counts.methods and 0 < configurations < len(counts.starts) + counts.samples
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
    return replace(counts, repeats=repeats, seeds=math.ceil(repeats / LEADER_SEEDS), is_adaptive=True)


def _left(counts: Counts, folder: StudyFolder) -> Counts:
    """What is not done yet."""
    starts = list(counts.starts)
    done: Counter[str] = Counter()
    for trial in folder.trials():
        snapshot = trial.snapshot
        if snapshot.status == TrialStatus.RUNNING:
            continue
        origin = snapshot.origin
        done[origin] += 1
        if origin == "published" and trial.recipe.method in starts:
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
