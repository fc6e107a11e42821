"""Database of a study, and the facts that it was created with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

import optuna

from heterokd.config.experiment import Experiment
from heterokd.config.schema import SCHEMA
from heterokd.domains import Scalar
from heterokd.errors import StudyError
from heterokd.storage.disk import when_writable
from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import sqlite_url
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.question import check_question, grown_question, question, space_change
from heterokd.study.rebuild import reads_every_epoch, rebuilt_trials, recorded_reports
from heterokd.study.seed_noise import NoisePrior
from heterokd.study.space_growth import fitted_trials, recorded_changes, samples_of_added, write_space
from heterokd.study.stored_question import LOCK_SECONDS, attributes_of_files, summary_of_files
from heterokd.study.warm_start import WarmStart

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyFacts:
    """Facts that a study is created with and keeps, apart from changes of its search space.

    Attributes:
        excluded: methods that cannot be built for the pair, with the reason; see `check_experiment`.
        left_out: students that exceed a limit, with the reason.
        costs: costs of each student, by the keys of `STUDENT_COSTS`.
        warm: samples and ranks from other studies.
        methods: methods that are searched; in a new study, those of its experiment that are not excluded.
        averages: whether rungs compare means over epochs; in studies of older versions they compare single epochs.
        prior: prior of the variance over seeds; studies of older versions have none.
        later: samples to try of students that were added while the study was resumed.
        since: number of trials before the last change of the search space.
        changes: changes of the search space, a sentence with its date each.
    """

    excluded: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warm: WarmStart = field(default_factory=WarmStart)
    methods: tuple[str, ...] = ()
    averages: bool = True
    prior: NoisePrior = field(default_factory=NoisePrior)
    later: tuple[Mapping[str, Scalar], ...] = ()
    since: int = 0
    changes: tuple[str, ...] = ()


def read_facts(database: optuna.Study) -> StudyFacts:
    """Read the facts that a study was created with."""
    attrs = database.user_attrs
    warm = attrs.get("warm", {})
    return StudyFacts(
        excluded=attrs["excluded"],
        left_out=attrs.get("left_out", {}),
        costs=attrs.get("facts", {}),
        warm=WarmStart(tuple(warm.get("samples", ())), warm.get("ranks", {}), warm.get("studies", {})),
        methods=tuple(attrs["methods"]),
        averages=bool(attrs.get("averages", False)),
        prior=NoisePrior(**attrs.get("noise_prior", {})),
        later=tuple(attrs.get("later", ())),
        since=attrs.get("since", 0),
        changes=tuple(f"{change['time'][:10]}: {change['sentence']}" for change in attrs.get("changes", ())),
    )


def open_database(
    experiment: Experiment, folder: StudyFolder, facts: StudyFacts, *, is_kept: bool = True, is_compared: bool = False
) -> optuna.Study:
    """Open the study in `folder`, or create it, with its facts as user attributes.

    A database that is missing, or empty, is created with the trials whose folders exist; to an older copy, as a store
    has, what it lacks is added. A changed search space is written to it, see `space_change`. Without `is_kept`, it is a
    new study in memory. With `is_compared`, the experiment is known to agree with the study: comparing it imports the
    methods.

    Raises:
        StudyError: the study belongs to another experiment, its database is damaged, or no method is left.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = _open(experiment, folder) if is_kept else optuna.create_study(direction=direction(experiment))
    attrs = database.user_attrs
    if "question" not in attrs:
        known = attributes_of_files(folder) if is_kept and folder.trials() else {}
        _create(database, experiment, _known_facts(facts, folder) if known else facts, known, folder)
        if is_kept:
            if number := len(folder.trials()):
                logger.warning("%s: was missing; it is rebuilt from the folders of %d trials", folder.database, number)
                _add_trials(database, experiment, folder)
            # Written last: a study that has a question has all other attributes.
            is_changed = known and space_change(known, experiment, folder) is not None
            asked = known["question"] if is_changed else question(experiment, database.user_attrs["methods"])
            database.set_user_attr("question", asked)
        if not known:
            return database
    elif not is_compared:
        check_question(attrs, experiment, folder)
        if is_kept:
            _add_missing(database, experiment, folder)
    return database if is_compared or not is_kept else _with_space(database, experiment, folder, facts)


def _with_space(database: optuna.Study, experiment: Experiment, folder: StudyFolder, facts: StudyFacts) -> optuna.Study:
    """Return a study with the search space of an experiment, of which `facts` are those of now."""
    searched, attrs = experiment.without(facts.left_out), database.user_attrs
    change = space_change(attrs, searched, folder, facts.excluded)
    if change is None:
        return database
    kept = read_facts(database)
    methods = tuple(method for method in experiment.methods if method not in facts.excluded)
    costs = {**kept.costs, **facts.costs}
    now = replace(kept, excluded=facts.excluded, left_out=facts.left_out, costs=costs, methods=methods)
    later = (*kept.later, *samples_of_added(change, searched, folder, methods))
    trials = database.get_trials(deepcopy=False)
    attributes = {
        **fact_attributes(now),
        "since": len(trials),
        "later": [dict(sample) for sample in later],
        "question": grown_question(attrs, experiment, methods),
    }
    write_space(folder, attributes, change, fitted_trials(searched, methods, facts.excluded, trials, folder), attrs)
    return _open(experiment, folder)  # Optuna keeps the trials of a study that was opened


def _open(experiment: Experiment, folder: StudyFolder) -> optuna.Study:
    from sqlalchemy.exc import SQLAlchemyError

    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.create_study(
            storage=_WaitingStorage(folder.database),
            study_name=experiment.name,
            load_if_exists=True,
            direction=direction(experiment),
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"{folder.database}: cannot be used ({reason}); move it away, and --resume rebuilds it from the trials"
        ) from None


def direction(experiment: Experiment) -> Literal["maximize", "minimize"]:
    """Return Optuna's direction of the metric."""
    return "maximize" if experiment.maximise else "minimize"


Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def _waiting(
    write: Callable[Concatenate[optuna.storages.RDBStorage, Arguments], Answer],
) -> Callable[Concatenate[_WaitingStorage, Arguments], Answer]:
    """Make a method of a storage wait while the disk cannot be written."""

    @wraps(write)
    def waiting(storage: _WaitingStorage, /, *given: Arguments.args, **named: Arguments.kwargs) -> Answer:
        return when_writable(storage._file, lambda: write(storage, *given, **named))

    return waiting


class _WaitingStorage(optuna.storages.RDBStorage):
    """A storage whose writes wait while the disk cannot be written (full, or read-only)."""

    def __init__(self, file: Path) -> None:
        connect = {"timeout": under_load(LOCK_SECONDS)}
        super().__init__(sqlite_url(file.absolute()), engine_kwargs={"connect_args": connect})
        self._file = file

    _create_new_trial = _waiting(optuna.storages.RDBStorage._create_new_trial)
    set_trial_param = _waiting(optuna.storages.RDBStorage.set_trial_param)
    set_trial_state_values = _waiting(optuna.storages.RDBStorage.set_trial_state_values)
    set_trial_intermediate_value = _waiting(optuna.storages.RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _waiting(optuna.storages.RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _waiting(optuna.storages.RDBStorage.set_trial_system_attr)


def _known_facts(facts: StudyFacts, folder: StudyFolder) -> StudyFacts:
    """Return the facts of a study whose database is missing, by its summary; `facts` if it is unreadable."""
    summary = summary_of_files(folder)
    if summary is None:
        return facts
    return replace(facts, excluded=summary.excluded, left_out=summary.left_out, costs=summary.students)


def _add_trials(database: optuna.Study, experiment: Experiment, folder: StudyFolder) -> None:
    """Add the trials after those of the database whose folders exist; an interrupted call is repeated."""
    kept, before = read_facts(database), database.get_trials(deepcopy=False)
    experiment = experiment.without(kept.left_out)
    for trial in rebuilt_trials(experiment, folder, kept.methods, kept.excluded, before):
        database.add_trial(trial)


def _add_missing(database: optuna.Study, experiment: Experiment, folder: StudyFolder) -> None:
    """Add the trials and reports that folders record and the database lacks: a copy in a store is older than they are.

    A trial that goes on from a checkpoint does not report again what it reported before.
    """
    trials = database.get_trials(deepcopy=False)
    later = sum(trial.number >= len(trials) for trial in folder.trials())
    if later:
        logger.warning("%s: is older than the folders of %d trials, which are added to it", folder.database, later)
        _add_trials(database, experiment, folder)
    storage = database._storage
    for trial in trials:
        if trial.state.is_finished() or "assignment" not in trial.user_attrs:
            continue
        epochs = trial.user_attrs["assignment"]["epochs"]
        values, rungs = recorded_reports(folder.trial(trial.number), experiment, epochs)
        if reads_every_epoch(experiment):
            known = trial.user_attrs.get("rungs", {})
            if len(known) < len(rungs):
                rungs_by_text = {str(rung): value for rung, value in rungs.items()}
                storage.set_trial_user_attr(trial._trial_id, "rungs", {**rungs_by_text, **known})
        else:
            values = rungs
        for epoch, value in values.items():
            if epoch not in trial.intermediate_values:
                storage.set_trial_intermediate_value(trial._trial_id, epoch, value)


def _create(
    database: optuna.Study,
    experiment: Experiment,
    facts: StudyFacts,
    known: Mapping[str, object],
    folder: StudyFolder,
) -> None:
    """Write the facts of a new study; an interrupted call is repeated.

    `known`: methods and schema of a study whose database is rebuilt, see `attributes_of_files`.
    """
    methods = database.user_attrs.get("methods", known.get("methods"))
    if methods is None:
        methods = [method for method in experiment.methods if method not in facts.excluded]
        if not methods:
            reasons = "; ".join(f"{method}: {reason}" for method, reason in facts.excluded.items())
            raise StudyError(f"search.space.methods: no method is left to search ({reasons}); list others")
    with warnings.catch_warnings():
        # Experimental in Optuna; a failure would only affect a name on optuna-dashboard's axes.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        database.set_metric_names([experiment.metric])
    for key, value in fact_attributes(replace(facts, methods=tuple(methods))).items():
        database.set_user_attr(key, value)
    if recorded := recorded_changes(folder) if known else []:
        database.set_user_attr("changes", recorded)
    database.set_user_attr("warm", asdict(facts.warm))
    database.set_user_attr("averages", True)
    database.set_user_attr("noise_prior", asdict(facts.prior))
    database.set_user_attr("schema", known.get("schema", SCHEMA.number))


def fact_attributes(facts: StudyFacts) -> dict[str, object]:
    """Return the user attributes of a study for the facts that a change of its search space changes."""
    return {
        "methods": list(facts.methods),
        "excluded": dict(facts.excluded),
        "left_out": dict(facts.left_out),
        "facts": {network: dict(costs) for network, costs in facts.costs.items()},
    }
