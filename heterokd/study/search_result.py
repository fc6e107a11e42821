"""SearchResult: what a search leaves, as a user of Optuna and pandas expects it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.domains import Scalar
from heterokd.errors import StudyError
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
    """What a search leaves. Trials and the Optuna study are read when they are first asked for.

    Attributes:
        folder: the study's files, report.html among them.
        summary: progress, winner, scratch and leaders.
        teacher: network, score on val and weights hash of the winner's teacher; of the first one where scratch won.
        uri: the MLflow store.
        model: name and version of the registered winner; None when there is none, or the store did not answer.
    """

    folder: StudyFolder
    summary: StudySummary
    teacher: TeacherCard
    uri: str
    model: tuple[str, str] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train; an interrupted search goes on with `resume=True`."""
        return self.summary.progress.finished

    @property
    def report(self) -> Path:
        """The study's page."""
        return self.folder.report

    @property
    def winner(self) -> RankedConfig | None:
        """The configuration of the best lower confidence bound; None when no trial was trained to the end."""
        return self.summary.winner

    @property
    def best_params(self) -> dict[str, Scalar]:
        """The winner's sample.

        Raises:
            StudyError: no trial was trained to the end.
        """
        return dict(self._found().sample)

    @property
    def best_trial(self) -> optuna.trial.FrozenTrial:
        """The winner's trial in the Optuna study.

        `study.best_trial` may be another one: it has the best single value, which overstates its configuration.

        Raises:
            StudyError: no trial was trained to the end.
        """
        return self.study.trials[self._found().number]

    @cached_property
    def study(self) -> optuna.Study:
        """The Optuna study, opened to be read: for Optuna's plots and importances."""
        import optuna

        url = f"sqlite:///file:{self.folder.database.absolute()}?mode=ro&uri=true"
        return optuna.load_study(study_name=self.summary.name, storage=optuna.storages.RDBStorage(url))

    @cached_property
    def trials(self) -> pandas.DataFrame:
        """One row a trial: number, state, method, origin, value, params_*, confirms, seed, seconds, path.

        `value` is the metric at the trial's end, or at its last epoch where it was stopped.
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
            raise StudyError(f"{self.folder.path}: no trial was trained to the end; see the page for what ended them")
        return self.winner
