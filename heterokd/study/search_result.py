"""SearchResult: the result of a search, for users of Optuna and pandas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.storage.sqlite_url import sqlite_url
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.teacher_card import TeacherCard
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary
from heterokd.study.trial_view import read_trials

if TYPE_CHECKING:
    import optuna
    import pandas


@dataclass(frozen=True)
class SearchResult:
    """Result of a search. Trials and the Optuna study are read on first access.

    Attributes:
        folder: files of the study, including report.html.
        summary: progress, winner, scratch and leaders.
        teacher: network, score on val and weights hash of the winner's teacher; of the first teacher if scratch won.
        uri: URI of the MLflow store.
        model: name and version of the registered winner; None if there is none, or if the store is unreachable.
    """

    folder: StudyFolder
    summary: StudySummary
    teacher: TeacherCard
    uri: str
    model: tuple[str, str] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train; `resume=True` continues an interrupted search."""
        return self.summary.progress.finished

    @property
    def failed(self) -> bool:
        """Whether every trial with a teacher, or every trial, failed; then no student is registered."""
        return self.summary.has_failed

    @property
    def report(self) -> Path:
        """File of the study's report."""
        return self.folder.report

    @property
    def winner(self) -> RankedConfig | None:
        """Configuration with the best lower confidence bound; None if no trial is complete."""
        return self.summary.winner

    @property
    def best_params(self) -> dict[str, Scalar]:
        """Values of the winner's parameters.

        Raises:
            StudyError: no trial is complete.
        """
        return dict(self._found().sample)

    @property
    def best_trial(self) -> optuna.trial.FrozenTrial:
        """The winner's trial in the Optuna study.

        `study.best_trial` may be another trial: it has the best single value, which is biased.

        Raises:
            StudyError: no trial is complete.
        """
        return self.study.trials[self._found().number]

    @cached_property
    def study(self) -> optuna.Study:
        """The Optuna study, opened read-only, for Optuna's plots and importances."""
        import optuna

        storage = optuna.storages.RDBStorage(sqlite_url(self.folder.database, read_only=True))
        return optuna.load_study(study_name=self.summary.name, storage=storage)

    @cached_property
    def trials(self) -> pandas.DataFrame:
        """A row per trial: number, state, method, origin, value, params_*, confirms, seed, seconds, path.

        `value` is the final metric, or that of the last epoch if the trial was stopped.
        """
        import pandas

        views = read_trials(self.folder, self.summary.metric)
        keys = list(dict.fromkeys(key for view in views for key in view.sample))
        rows = [
            {
                "number": view.number,
                "state": str(view.status),
                "method": view.method,
                "origin": view.origin,
                "value": view.value,
                **{f"params_{key}": view.sample.get(key) for key in keys},
                "confirms": view.confirms,
                "seed": view.seed,
                "seconds": view.seconds,
                "path": str(view.path),
            }
            for view in views
        ]
        frame = pandas.DataFrame(rows)
        return frame.astype({"value": float, "seconds": float, "confirms": "Int64"}) if rows else frame

    def _found(self) -> RankedConfig:
        if self.winner is None:
            raise StudyError(f"{self.folder.path}: no trial is complete; see report.html for the reasons")
        return self.winner
