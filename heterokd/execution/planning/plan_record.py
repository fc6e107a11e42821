"""Record what a search was planned to cost, and what it took."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from heterokd.config.experiment import Experiment
from heterokd.execution.planning.plan import question_of
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.plan.record import Taken, plan_file, planned


class PlanRecorder:
    """Records in a study's plan what its search takes.

    Args:
        experiment: the experiment; the plan of another experiment is removed if the search has not started.
        folder: the study's folder.
    """

    def __init__(self, experiment: Experiment, folder: StudyFolder) -> None:
        self.experiment, self.folder = experiment, folder
        self.began, self.done = time.time(), self._finished()
        self.teacher_seconds = 0.0
        question = read_derived(plan_file(folder)).get("question")
        if question not in (None, question_of(experiment)) and not folder.experiment_file.exists():
            plan_file(folder).unlink()
        known = planned(folder)
        self.before = (known.taken if known else None) or Taken()

    def prepared(self, seconds: float) -> None:
        """Record how long the teachers took, on all devices of the search."""
        self.teacher_seconds = seconds

    @property
    def trial_seconds(self) -> float | None:
        """Planned seconds of the longest training, with a running teacher; None without a plan."""
        known = planned(self.folder)
        return None if known is None else known.costs.longest(self.experiment.training.epochs)

    def ended(self) -> None:
        """Write what the search has taken so far, including earlier runs; nothing if no trial has ended since."""
        known = planned(self.folder)
        if known is None or self._finished() == self.done:
            return
        plan, costs = known.plan, known.costs
        seconds = self.before.seconds + time.time() - self.began
        price, by_device = self.experiment.cluster.price_per_hour, self.experiment.search.budget.price
        trials = [trial.snapshot for trial in self.folder.trials()]
        spans = [trial.seconds for trial in trials if trial.seconds is not None]
        share = costs.gpus or costs.cpus
        repeated = [trial for trial in trials if trial.confirms is not None]
        # On resume the teachers already exist, so reuse the recorded time.
        teacher = max(self.teacher_seconds, self.before.teacher_seconds)
        at_work = teacher * (1.0 if costs.gpus else costs.cpus * costs.parallel)
        device_hours = (sum(spans) * share + at_work) / 3600
        money = None if by_device is None else device_hours * by_device
        taken = Taken(
            seconds=seconds,
            teacher_seconds=teacher,
            device_hours=device_hours,
            money=money if price is None else seconds / 3600 * price,
            trainings=len(trials) - len(repeated),
            pruned=sum(trial.status == TrialStatus.PRUNED for trial in trials),
            repeated=len(repeated),
            disk=sum(file.stat().st_size for file in self.folder.path.rglob("*") if file.is_file()),
            ratio=seconds / plan.seconds.expected,
        )
        file = plan_file(self.folder)
        write_text(file, json.dumps({**read_derived(file), "actual": asdict(taken)}, indent=1))

    def _finished(self) -> int:
        return sum(trial.status != TrialStatus.RUNNING for trial in self.folder.trials())
