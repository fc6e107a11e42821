"""Write a changed search space to the database of a study: its finished trials as the new space has them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial

from heterokd.config.experiment import Experiment
from heterokd.domains import Scalar
from heterokd.errors import ConfigError, StudyError
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.storage.disk import when_writable
from heterokd.storage.files import read_json, write_text
from heterokd.storage.machine_load import under_load
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import completed, method_defaults, method_space, with_student
from heterokd.study.distributions import fitted, has_freedom
from heterokd.study.space_change import SpaceChange
from heterokd.study.stored_question import LOCK_SECONDS, summary_of_files

UPSERT = (
    "INSERT INTO study_user_attributes (study_id, key, value_json) SELECT study_id, ?, ? FROM studies WHERE true "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)


@dataclass(frozen=True)
class FittedTrial:
    """A trial as the new search space has it.

    Attributes:
        number: number of the trial.
        assignment: its attributes, see `assignment_attrs`; the sample names its student.
        params: name, value and distribution of each parameter, as Optuna's database has them.
    """

    number: int
    assignment: Mapping[str, object]
    params: Sequence[tuple[str, float, str]]


def fitted_trials(
    experiment: Experiment,
    methods: Sequence[str],
    excluded: Container[str],
    trials: Sequence[FrozenTrial],
    folder: StudyFolder,
) -> Iterator[FittedTrial]:
    """Yield the trials of a study with the distributions of another search space.

    Optuna compares the distributions of a parameter over all trials: options may not change, nor the kind of a domain.
    So values that the space does not have any more are no parameters of their trial; they stay in its sample.

    Args:
        experiment: the experiment with the new space.
        methods: methods that are searched.
        excluded: see `teachers_of`.
        trials: trials of the study.
        folder: the study's folder, whose recipes have the values that samples left out.
    """
    spaces = {method: space for method in methods if has_freedom(space := method_space(experiment, method, excluded))}
    defaults = {method: method_defaults(experiment, method) for method in spaces}
    for trial in trials:
        if "assignment" not in trial.user_attrs:
            continue
        attrs = trial.user_attrs["assignment"]
        sample = with_student(attrs["sample"], attrs["student"], experiment)
        with suppress(ConfigError):  # a sample that was not trained has no recipe
            sample = completed(sample, folder.trial(trial.number).recipe, experiment)
        values, ranges = fitted(spaces, sample, defaults.get(str(sample["method"]), {}))
        params = [
            (key, ranges[key].to_internal_repr(value), distribution_to_json(ranges[key]))
            for key, value in values.items()
        ]
        yield FittedTrial(trial.number, {**attrs, "sample": sample}, params)


def samples_of_added(
    change: SpaceChange, experiment: Experiment, folder: StudyFolder, methods: Sequence[str]
) -> list[dict[str, Scalar]]:
    """Return the samples to try with each added student: scratch, and the leader of the study or plain KD."""
    summary = summary_of_files(folder)
    leaders = () if summary is None else summary.leaders
    leader = next((leader for leader in leaders if leader.method in methods and leader.method != BASELINE), None)
    if leader is not None:
        settings = {key: value for key, value in leader.sample.items() if key not in ("method", "student.network")}
        best = [experiment.published(leader.method, settings)]
    else:
        best = [experiment.published(method) for method in VANILLA_KD.values() if method in methods]
    known = {"method", *(key for method in methods for key in experiment.domains(method))}
    scratch = [experiment.published(BASELINE)] if BASELINE in methods else []
    return [
        {**{key: value for key, value in sample.items() if key in known}, "student.network": network}
        for network in change.added_students
        for sample in (*scratch, *best)
    ]


def recorded_changes(folder: StudyFolder) -> list[dict[str, object]]:
    """Read the changes of a study's search space from its folder; empty if there are none."""
    try:
        found = read_json(folder.changes_file).get("changes", [])
    except StudyError:
        return []
    return [change for change in found if isinstance(change, dict)] if isinstance(found, list) else []


def write_space(
    folder: StudyFolder,
    attributes: Mapping[str, object],
    change: SpaceChange,
    trials: Iterator[FittedTrial],
    before: Mapping[str, object],
) -> None:
    """Write another search space to the database of a study, in one transaction, and the change to changes.json.

    Optuna has no function that changes the parameters of a trial.

    Args:
        folder: the study's folder.
        attributes: user attributes of the study that change.
        change: difference between the two spaces.
        trials: all trials in the new space.
        before: user attributes of the study.
    """
    found, ended = list(trials), sum(trial.status.is_final for trial in folder.trials())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": now, "ended_trials": ended, "sentence": change.sentence(ended), **change.to_json()}
    known = before.get("changes", [])
    changes = [*(known if isinstance(known, list) else []), entry]
    written = {**attributes, "changes": changes}
    # First the file: it is written again if the database was not.
    write_text(folder.changes_file, json.dumps({"changes": changes}, indent=1))

    def write() -> None:
        with closing(sqlite3.connect(folder.database, timeout=under_load(LOCK_SECONDS))) as database, database:
            ids = dict(database.execute("SELECT number, trial_id FROM trials"))
            database.execute("DELETE FROM trial_params")
            for trial in found:
                database.executemany(
                    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
                    "VALUES (?, ?, ?, ?)",
                    [(ids[trial.number], *param) for param in trial.params],
                )
                database.execute(
                    "UPDATE trial_user_attributes SET value_json = ? WHERE trial_id = ? AND key = 'assignment'",
                    (json.dumps(trial.assignment), ids[trial.number]),
                )
            database.executemany(UPSERT, [(key, json.dumps(value)) for key, value in written.items()])

    when_writable(folder.database, write)
