"""Read a study's summary; a damaged or missing summary.json is written again from the study's database."""

from __future__ import annotations

import logging

from heterokd.errors import StudyError, UserError
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.summary import StudySummary, stored_summary

logger = logging.getLogger(__name__)


def read_summary(folder: StudyFolder) -> StudySummary | None:
    """Read a study's summary; None before its first trial has ended.

    Raises:
        StudyError: the file is damaged, and the database is missing or damaged.
    """
    try:
        found = stored_summary(folder)
        if found is not None or not any(trial.status.is_final for trial in folder.trials()):
            return found
    except StudyError as error:
        rebuilt = _rebuilt(folder)
        if rebuilt is None:
            raise
        logger.warning("%s; it is written again, and `heterokd search --resume` adds the teacher", error)
        return rebuilt
    return _rebuilt(folder)


def _rebuilt(folder: StudyFolder) -> StudySummary | None:
    """Write a study's summary from its database; return None if that cannot be read."""
    # These import the methods and Optuna, which are rarely needed here.
    from heterokd.config.reading import load_study_experiment
    from heterokd.study.options import StudyOptions
    from heterokd.study.storage import open_database
    from heterokd.study.stored_question import read_attributes
    from heterokd.study.study import Study

    try:
        if "question" not in read_attributes(folder):
            return None
        experiment, options = load_study_experiment(folder.experiment_file), StudyOptions()
        database = open_database(experiment, folder, options.facts, is_compared=True)
        # Not `Study.open`, which ends trials that a search may be running.
        summary = Study(experiment, folder, database, options).summary()
    except UserError:
        return None
    summary.write(folder)
    return summary
