"""Record what a search was planned to cost, and what it took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

import torch

from heterokd.config.experiment import Experiment
from heterokd.errors import HeterokdError
from heterokd.execution.planning.plan import keep, plan_with, question_of
from heterokd.storage.files import read_json, write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Root
from heterokd.study.plan.costs import Costs, MethodCost
from heterokd.study.plan.counts import count
from heterokd.study.plan.estimate import Plan
from heterokd.study.plan.record import plan_file
from heterokd.training.precision import device_name

Event = Literal["start", "report", "finish"]
Listener = Callable[[Event, TrialFolder, Mapping[str, Any]], None]

END_SECONDS = 10.0
"""Pictures, page and registration of a small student, where nobody has measured a start-up."""


class Following:
    """Follows one search from its begin to its end.

    Args:
        experiment: the question.
        root: where state lives.
        folder: of the study.
        excluded: methods that do not exist for the pair.
    """

    def __init__(self, experiment: Experiment, root: Root, folder: StudyFolder, excluded: Mapping[str, str]) -> None:
        self.experiment, self.root, self.folder, self.excluded = experiment, root, folder, excluded
        self.began, self.done = time.time(), self._finished()
        self.teacher_seconds = 0.0
        known = read_json(plan_file(folder))
        self.before = float(known.get("actual", {}).get("seconds", 0.0))
        self.is_planned = known.get("question") == question_of(experiment)
        if known and not self.is_planned and not folder.experiment_file.exists():
            plan_file(folder).unlink()

    def listening(self, listener: Listener | None) -> Listener:
        """A listener of trials that also makes the plan, before it tells `listener`."""

        def listen(event: Event, trial: TrialFolder, summary: Mapping[str, Any]) -> None:
            if event == "finish":
                self.trial_ended()
            if listener is not None:
                listener(event, trial, summary)

        return listen

    def prepared(self, seconds: float) -> None:
        """Note how long the teachers took, on all that trials share afterwards."""
        self.teacher_seconds = seconds

    def _finished(self) -> int:
        return sum(trial.status.get("state") != "running" for trial in self.folder.trials())

    def trial_ended(self) -> None:
        """Make the plan, once the published settings have been trained, where none was made before."""
        if self.is_planned:
            return
        trials = [trial for trial in self.folder.trials() if trial.status.get("state") in ("complete", "failed")]
        starts = [trial for trial in trials if trial.status.get("origin") == "published"]
        counts = count(self.experiment, self.excluded)
        known = {trial.recipe.method for trial in starts}
        # Scratch may start once for each student: a number alone does not say that every method has been timed.
        if len(starts) < len(counts.starts) or not known >= set(self.experiment.methods) - set(self.excluded):
            return
        self.is_planned = True
        costs = costs_of_trials(starts, self.began)
        if costs is None:
            return
        teacher = min(self.teacher_seconds, costs.start)
        costs = replace(costs, teacher=teacher, start=costs.start - teacher)
        try:
            # The whole search, not what is left of it: that is what its end will be compared with.
            keep(self.folder, self.experiment, plan_with(self.experiment, self.root, self.excluded, costs, None), costs)
        except HeterokdError:
            return  # a plan is no reason to end a search

    def ended(self) -> None:
        """Note what the search has taken until now, earlier runs of it included; one that trained nothing is none."""
        known = read_json(plan_file(self.folder))
        if "plan" not in known or self._finished() == self.done:
            return
        plan = Plan.from_json(known["plan"])
        seconds = self.before + time.time() - self.began
        price, by_device = self.experiment.cluster.price_per_hour, self.experiment.search.budget.price
        trials = [trial.status for trial in self.folder.trials()]
        spans = [one["ended"] - one["began"] for one in trials if "ended" in one and "began" in one]
        costs = known["costs"]
        share = costs["gpus"] or costs["cpus"]
        repeated = [one for one in trials if one.get("confirms") is not None]
        # Of a search that was interrupted the teachers were there when it went on.
        teacher = max(self.teacher_seconds, float(known.get("actual", {}).get("teacher_seconds", 0.0)))
        at_work = teacher * (1.0 if costs["gpus"] else costs["cpus"] * costs["parallel"])
        device_hours = (sum(spans) * share + at_work) / 3600
        money = None if by_device is None else device_hours * by_device
        actual = {
            "seconds": seconds,
            "teacher_seconds": teacher,
            "device_hours": device_hours,
            "money": money if price is None else seconds / 3600 * price,
            "trainings": len(trials) - len(repeated),
            "pruned": sum(one.get("state") == "pruned" for one in trials),
            "repeated": len(repeated),
            "disk": sum(file.stat().st_size for file in self.folder.path.rglob("*") if file.is_file()),
            "ratio": seconds / plan.seconds.expected,
        }
        write_text(plan_file(self.folder), json.dumps({**known, "actual": actual}, indent=1))


def costs_of_trials(trials: list[TrialFolder], began: float) -> Costs | None:
    """Costs as a search's first trials had them; None where they do not say.

    Args:
        trials: whole trainings, of each method at least one that did not fail.
        began: when the search began.
    """
    spans: dict[str, list[float]] = {}
    disk: dict[str, list[int]] = {}
    statuses = {trial.number: trial.status for trial in trials}
    for trial in trials:
        status, recipe = statuses[trial.number], trial.recipe
        if status.get("state") == "complete" and "ended" in status:
            spans.setdefault(recipe.method, []).append((status["ended"] - status["began"]) / recipe.training.epochs)
            files = (trial.checkpoint, trial.weights)
            disk.setdefault(recipe.method, []).append(sum(file.stat().st_size for file in files if file.exists()))
    if not spans:
        return None
    usual = fmean(fmean(own) for own in spans.values())
    methods = {
        trial.recipe.method: MethodCost(
            begin=0.0,
            epoch=fmean(spans.get(trial.recipe.method, [usual])),
            live=fmean(spans.get(trial.recipe.method, [usual])),
            stored=False,
            disk=round(fmean(disk.get(trial.recipe.method, [0]))),
        )
        for trial in trials
    }
    processes = {status.get("pid") for status in statuses.values()}
    first = min(status["began"] for status in statuses.values() if "began" in status)
    parallel = max(1, len(processes))
    has_gpu = torch.cuda.is_available()
    return Costs(
        device=device_name("cuda" if has_gpu else "cpu"),
        parallel=parallel,
        cpus=float(max(1, (os.cpu_count() or 1) // parallel)),
        gpus=torch.cuda.device_count() / parallel if has_gpu else 0.0,
        start=first - began,
        process=0.0,
        end=END_SECONDS,
        teacher=0.0,
        view=0.0,
        methods=methods,
        source="read off its first trials",
    )
