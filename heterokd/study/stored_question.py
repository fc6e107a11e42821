"""Stored question of a study: read from its database or its files, and compared with an experiment that resumes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from contextlib import closing

from heterokd.config.experiment import Experiment
from heterokd.config.reading import at_schema, load_study_experiment, study_schema
from heterokd.config.schema import SCHEMA
from heterokd.errors import ConfigError, StudyError
from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import sqlite_file_uri
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.question import (
    SPACE,
    STUDENT,
    StoredQuestion,
    check_question,
    leaves,
    methods_kept,
    question,
    space_change,
)
from heterokd.study.summary import StudySummary, stored_summary

LOCK_SECONDS = 60.0
"""Timeout for another process's lock on the database (a reader on a slow disk); longer on a busy machine."""


def as_stored(experiment: Experiment, folder: StudyFolder) -> Experiment:
    """Return the experiment with the defaults of an existing study; nothing is written.

    A study is resumed with the defaults of its schema, and with the default of each parameter that a method has gained
    since, and with the files of methods that are not searched any more. If its database is missing, its
    experiment.yaml is compared. Its search space may differ, see `space_change`.

    Raises:
        StudyError: the study belongs to another experiment, or searches a method that this version does not have.
    """
    attributes = read_attributes(folder)
    of_files = attributes_of_files(folder)
    if "question" in attributes and of_files:
        _check_file(attributes, of_files, folder)
    attributes = attributes if "question" in attributes else of_files
    if "question" not in attributes:
        return experiment
    stored = parse(StoredQuestion, attributes)
    experiment = _with_removed_files(at_schema(experiment, stored.schema), stored, folder)
    known, gained = dict(leaves(stored.question)), dict[str, object]()
    for method in filter(experiment.knows, methods_kept(stored, experiment)):
        defaults = experiment.method_class(method).Params().model_dump() | SCHEMA.parameters(method, stored.schema)
        for key in experiment.method_domains(method):
            if f"{SPACE}{key}" not in known:
                gained[key] = defaults[key.partition(".")[2]]
    if gained:
        experiment = experiment.with_overrides({**gained, **experiment.space.overrides})
    check_question(attributes, experiment, folder)
    return experiment


def _with_removed_files(experiment: Experiment, stored: StoredQuestion, folder: StudyFolder) -> Experiment:
    """Return the experiment with the files of methods that the study has searched and the experiment does not list."""
    removed = [method for method in stored.methods if not experiment.knows(method)]
    if not removed:
        return experiment
    try:
        files = load_study_experiment(folder.experiment_file).space.extensions
    except ConfigError:
        return experiment
    found = {method: files[method] for method in removed if method in files}
    space = experiment.space
    return experiment.with_space(space.model_copy(update={"extensions": {**space.extensions, **found}}))


def changed_space(experiment: Experiment, folder: StudyFolder, excluded: Collection[str]) -> str | None:
    """Return the sentence about a search space that differs from that of a study in `folder`, or None.

    Args:
        experiment: what `as_stored` returned, without the students that are left out.
        folder: the study's folder, which need not exist.
        excluded: methods that cannot be built for the pair.

    Raises:
        StudyError: something was added, and the number of trials leaves no trial for it.
    """
    attributes = read_attributes(folder)
    attributes = attributes if "question" in attributes else attributes_of_files(folder)
    change = space_change(attributes, experiment, folder, excluded) if "question" in attributes else None
    if change is None:
        return None
    statuses = [trial.snapshot for trial in folder.trials()]
    begun, trials = sum(snapshot.confirms is None for snapshot in statuses), experiment.search.trials
    if change.adds and begun >= trials:
        raise StudyError(
            f"search.trials: the study has begun {begun} trials already, and {trials} are allowed, so none is left for "
            f"{change.adds}; raise the number, for example --trials {begun + 12}"
        )
    return change.sentence(sum(snapshot.status.is_final for snapshot in statuses))


def _check_file(attributes: Mapping[str, object], of_files: Mapping[str, object], folder: StudyFolder) -> None:
    """Refuse a study whose experiment.yaml was edited: it would be replaced, and the edit lost without a message.

    Keys that one of the two lacks are those of other versions. The search space may change.

    Raises:
        StudyError: a key differs.
    """
    before, now = (dict(leaves(parse(StoredQuestion, each).question)) for each in (attributes, of_files))
    for key, old in before.items():
        if key in now and now[key] != old and not key.startswith((SPACE, STUDENT)):
            raise StudyError(
                f"{folder.experiment_file}: {key} was {json.dumps(old)} when this study started and is "
                f"{json.dumps(now[key])} now; set it back, or rename the experiment to start a new study"
            )


def read_attributes(folder: StudyFolder) -> dict[str, object]:
    """Read the user attributes of a study; empty without a database, or if SQLite must recover it with write access."""
    if not folder.database.is_file():
        return {}
    try:
        timeout = under_load(LOCK_SECONDS)
        with closing(sqlite3.connect(sqlite_file_uri(folder.database), uri=True, timeout=timeout)) as database:
            rows = database.execute("SELECT key, value_json FROM study_user_attributes").fetchall()
    except sqlite3.OperationalError:
        return {}
    except sqlite3.DatabaseError as error:
        raise StudyError(
            f"{folder.database}: cannot be used ({error}); move it away, and --resume rebuilds it from the trials"
        ) from None
    return {key: json.loads(value) for key, value in rows}


def attributes_of_files(folder: StudyFolder) -> dict[str, object]:
    """Return the attributes of a study whose database is missing; empty if its experiment.yaml cannot be read."""
    try:
        experiment = load_study_experiment(folder.experiment_file)
        schema = study_schema(folder.experiment_file)
    except ConfigError:
        return {}
    summary = summary_of_files(folder)
    methods = list(experiment.methods if summary is None else summary.methods)
    return {"methods": methods, "question": question(experiment, methods), "schema": schema}


def summary_of_files(folder: StudyFolder) -> StudySummary | None:
    """Read a study's summary; None if it is missing or damaged."""
    try:
        return stored_summary(folder)
    except StudyError:
        return None
