"""Opening a study: its database, and the question that the database was begun with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna

from heterokd.config.experiment import Experiment
from heterokd.errors import StudyError
from heterokd.methods import METHODS
from heterokd.storage.disk import when_writable
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.assignment import method_space
from heterokd.study.warm_start import WarmStart

# What may change between two runs of one study: it decides where and for how long, never what is comparable.
FREE_KEYS = {
    "parallel",
    "trials",
    "budget",
    "max_failures",
    "confirm_share",
    "confirm_leaders",
    "confirm_seeds",
    "prior_weight",
}


@dataclass(frozen=True)
class Given:
    """What a study is told when it is created; it keeps this, whatever is said when it is opened again.

    Attributes:
        excluded: methods that cannot exist for the pair, with the reason; see `check_experiment`.
        left_out: students that are over a limit, with the reason.
        facts: by student, what it costs: `params_m`, `latency_ms`.
        warm: what other studies let expect.
    """

    excluded: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warm: WarmStart = field(default_factory=WarmStart)


def given(database: optuna.Study) -> Given:
    """What a study was told when it was created."""
    attrs = database.user_attrs
    warm = attrs.get("warm", {})
    return Given(
        attrs["excluded"],
        attrs.get("left_out", {}),
        attrs.get("facts", {}),
        WarmStart(tuple(warm.get("samples", ())), warm.get("ranks", {})),
    )


def averages(database: optuna.Study) -> bool:
    """Whether rungs hold means over epochs; in studies of older versions they hold single epochs, and go on so."""
    return bool(database.user_attrs.get("averages", False))


def open_database(experiment: Experiment, folder: StudyFolder, told: Given, *, is_kept: bool = True) -> optuna.Study:
    """Open the study in `folder`, or create it; its user_attrs hold "methods" and what it was told at its creation.

    Args:
        experiment: the question.
        folder: of the study.
        told: for a new study.
        is_kept: whether it lies on disk; otherwise a new one in memory.

    Raises:
        StudyError: the study belongs to another experiment, its database is damaged, or no method is left.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = _open(experiment, folder) if is_kept else optuna.create_study(direction=_direction(experiment))
    _agree(database, experiment, folder, told)
    return database


def _open(experiment: Experiment, folder: StudyFolder) -> optuna.Study:
    from sqlalchemy.exc import SQLAlchemyError

    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        storage = _Patient(
            folder.database,
            f"sqlite:///{folder.database.absolute()}",
            # Seconds to wait for another process that writes (a reader of the study on a slow disk).
            engine_kwargs={"connect_args": {"timeout": 60}},
        )
        return optuna.create_study(
            storage=storage,
            study_name=experiment.name,
            load_if_exists=True,
            direction=_direction(experiment),
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"{folder.database}: cannot be used ({reason}); restore it from a backup, or remove it"
        ) from None


def _direction(experiment: Experiment) -> Literal["maximize", "minimize"]:
    return "maximize" if experiment.maximise else "minimize"


class _Patient(optuna.storages.RDBStorage):
    """Waits where a write fails because the disk cannot be written for the moment."""

    def __init__(self, file: Path, url: str, **settings: Any) -> None:
        self._file = file
        super().__init__(url, **settings)

    def _create_new_trial(self, *given: Any, **named: Any) -> Any:
        return when_writable(self._file, partial(super()._create_new_trial, *given, **named))

    def set_trial_param(self, *given: Any, **named: Any) -> None:
        when_writable(self._file, partial(super().set_trial_param, *given, **named))

    def set_trial_state_values(self, *given: Any, **named: Any) -> bool:
        return when_writable(self._file, partial(super().set_trial_state_values, *given, **named))

    def set_trial_intermediate_value(self, *given: Any, **named: Any) -> None:
        when_writable(self._file, partial(super().set_trial_intermediate_value, *given, **named))

    def set_trial_user_attr(self, *given: Any, **named: Any) -> None:
        when_writable(self._file, partial(super().set_trial_user_attr, *given, **named))

    def set_trial_system_attr(self, *given: Any, **named: Any) -> None:
        when_writable(self._file, partial(super().set_trial_system_attr, *given, **named))


def _agree(database: optuna.Study, experiment: Experiment, folder: StudyFolder, told: Given) -> None:
    """Freeze the question in a new study; compare it in an old one."""
    stored = database.user_attrs
    methods = stored.get("methods")
    if methods is None:
        methods = [method for method in experiment.methods if method not in told.excluded]
        if not methods:
            reasons = "; ".join(f"{method}: {reason}" for method, reason in told.excluded.items())
            raise StudyError(f"search.space.methods: no method is left to search ({reasons}); list others")
    lost = [method for method in methods if method not in METHODS]
    if lost:
        raise StudyError(
            f"{folder.database}: the study searches method {lost[0]!r}, which this version of heterokd does "
            "not have; install the one that does, or give the experiment another name to begin a new study"
        )
    question = json.loads(json.dumps(_question(experiment, methods)))
    if "question" in stored:
        _compare(stored["question"], question, folder)
        return
    with warnings.catch_warnings():
        # Experimental in Optuna; what goes wrong with it is a name on optuna-dashboard's axes.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        database.set_metric_names([experiment.metric])
    # The question last: it marks a study whose other attributes are written.
    database.set_user_attr("methods", methods)
    database.set_user_attr("excluded", dict(told.excluded))
    database.set_user_attr("left_out", dict(told.left_out))
    database.set_user_attr("facts", {network: dict(facts) for network, facts in told.facts.items()})
    database.set_user_attr("warm", asdict(told.warm))
    database.set_user_attr("averages", True)
    database.set_user_attr("question", question)


def _question(experiment: Experiment, methods: Sequence[str]) -> dict[str, Any]:
    """What decides a search, as plain values; the space by its domains, which the code may change as well."""
    content = experiment.model_dump(
        mode="json",
        exclude={
            "tracking": True,
            "cluster": True,
            "promotion": True,
            "search": FREE_KEYS,
            "training": {"workers", "gpus_per_worker"},
        },
    )
    domains = experiment.shared_domains()
    for method in methods:
        domains |= method_space(experiment, method)
    named = experiment.space.methods
    listed = named if named == "all" else list(named)
    content["search"]["space"] = {"methods": listed, **{key: str(domain) for key, domain in domains.items()}}
    return content


def _compare(stored: Mapping[str, Any], current: Mapping[str, Any], folder: StudyFolder) -> None:
    before, now = dict(_leaves(stored)), dict(_leaves(current))
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = (json.dumps(values[key]) if key in values else "absent" for values in (before, now))
        # A key that an older version did not know, left at what that version did.
        is_newer = key not in before and now[key] in (None, [], {})
        if old != new and not is_newer:
            raise StudyError(
                f"{folder.path}: {key} was {old} when this study began and is {new} now; set it back, or give the "
                "experiment another name to begin a new study"
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value
