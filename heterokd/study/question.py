"""Question of a study: the settings that decide a search, kept in its database and compared when it is resumed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from heterokd.config.experiment import Experiment
from heterokd.config.extension import UNIDENTIFIED
from heterokd.config.methods import methods_of
from heterokd.config.reading import at_schema, load_study_experiment, study_schema
from heterokd.config.schema import FIRST_SCHEMA, METHODS_SECTION, SCHEMA, keys_of_schema_1
from heterokd.domains import Choice, Domain
from heterokd.errors import ConfigError, StudyError
from heterokd.storage.machine_load import under_load
from heterokd.storage.sqlite_url import sqlite_file_uri
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.assignment import method_space
from heterokd.study.summary import StudySummary, stored_summary

# Keys that may change between two runs of a study: they decide where and how long, not what is compared.
FREE_KEYS = {
    "parallel",
    "trials",
    "budget",
    "max_failures",
    "trial_timeout",
    "confirm_share",
    "confirm_leaders",
    "confirm_seeds",
    "confirm_references",
    "prior_weight",
}
LOCK_SECONDS = 60.0
"""Timeout for another process's lock on the database (a reader on a slow disk); longer on a busy machine."""

SPACE = "search.space."
LISTED = f"{SPACE}methods"


@dataclass(frozen=True)
class _Stored:
    """Attributes of a study that decide whether an experiment agrees with it."""

    methods: tuple[str, ...]
    question: Mapping[str, object]
    schema: int = FIRST_SCHEMA


def question(experiment: Experiment, methods: Sequence[str]) -> dict[str, object]:
    """Return the settings that decide a search as plain values, with the domains of the space."""
    content = experiment.model_dump(
        mode="json",
        exclude={
            "data": {"extension": UNIDENTIFIED, "pixels_max_gb": True},
            "tracking": True,
            "cluster": True,
            "promotion": True,
            "search": FREE_KEYS,
            "training": {"workers", "gpus_per_worker"},
        },
    )
    named = experiment.space.methods
    domains = {key: str(domain) for key, domain in _domains(experiment, methods).items()}
    content["search"]["space"] = {"methods": named if named == "all" else list(named), **domains}
    files = {name: file.model_dump(exclude=UNIDENTIFIED) for name, file in experiment.space.extensions.items()}
    if files:
        content["search"]["space"]["extensions"] = files
    plain: dict[str, object] = json.loads(json.dumps(content))
    return plain


def _domains(experiment: Experiment, methods: Sequence[str]) -> dict[str, Domain]:
    domains = experiment.shared_domains()
    for method in methods:
        domains |= method_space(experiment, method)
    return domains


def as_stored(experiment: Experiment, folder: StudyFolder) -> Experiment:
    """Return the experiment with the defaults of an existing study; nothing is written.

    A study is resumed with the defaults of its schema, and with the default of each parameter that a method has gained
    since. If its database is missing, its experiment.yaml is compared.

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
    stored = parse(_Stored, attributes)
    experiment = at_schema(experiment, stored.schema)
    known, gained = dict(leaves(stored.question)), dict[str, object]()
    for method in filter(experiment.knows, stored.methods):
        defaults = experiment.method_class(method).Params().model_dump() | SCHEMA.parameters(method, stored.schema)
        for key in experiment.method_domains(method):
            if f"{SPACE}{key}" not in known:
                gained[key] = defaults[key.partition(".")[2]]
    if gained:
        experiment = experiment.with_overrides({**gained, **experiment.space.overrides})
    check_question(attributes, experiment, folder)
    return experiment


def _check_file(attributes: Mapping[str, object], of_files: Mapping[str, object], folder: StudyFolder) -> None:
    """Refuse a study whose experiment.yaml was edited: it would be replaced, and the edit lost without a message.

    Keys that one of the two lacks are those of other versions.

    Raises:
        StudyError: a key differs.
    """
    before, now = (dict(leaves(parse(_Stored, each).question)) for each in (attributes, of_files))
    for key, old in before.items():
        if key in now and now[key] != old and key != LISTED:
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


def check_question(attributes: Mapping[str, object], experiment: Experiment, folder: StudyFolder) -> None:
    """Compare an experiment with the settings that a study was started with.

    `attributes` are the user attributes of the study.

    Raises:
        StudyError: they differ, or a method of the study is missing here.
    """
    stored = parse(_Stored, attributes)
    lost = [method for method in stored.methods if not experiment.knows(method)]
    if lost:
        raise StudyError(
            f"{folder.database}: the study searches method {lost[0]!r}, which neither the experiment nor this version "
            "of heterokd has; install the version that has it, or rename the experiment to start a new study"
        )
    before, now = dict(leaves(stored.question)), dict(leaves(question(experiment, stored.methods)))
    added = _added(experiment, stored, before, now)
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = (json.dumps(values[key]) if key in values else "absent" for values in (before, now))
        if old != new and key not in added:
            raise StudyError(
                f"{folder.path}: {key} was {old} when this study started and is {new} now; set it back, or rename the "
                "experiment to start a new study"
            )


def _added(
    experiment: Experiment, stored: _Stored, before: Mapping[str, object], now: Mapping[str, object]
) -> set[str]:
    """Return the keys that the code has added since the study started."""
    domains, overrides = _domains(experiment, stored.methods), experiment.space.overrides
    added = set()
    for key, value in now.items():
        method, _, name = key.removeprefix(SPACE).partition(".")
        if key in before:
            if key == LISTED and only_new_methods(_names(before[key]), _names(value), methods_of(experiment.data.task)):
                added.add(key)
        elif key.startswith(SPACE) and experiment.knows(method):
            field = experiment.method_class(method).Params.model_fields[name]
            default = SCHEMA.parameters(method, stored.schema).get(name, field.default)
            domain = domains[f"{method}.{name}"]
            is_pinned = isinstance(domain, Choice) and domain.options == (default,)
            if is_pinned or f"{method}.{name}" not in overrides:
                added.add(key)
        elif value == SCHEMA.default(type(experiment), key, stored.schema):
            added.add(key)
    return added


def only_new_methods(before: Sequence[str], now: Sequence[str], every: Sequence[str]) -> bool:
    """Return whether two lists of methods are both `all`, the later one with methods that were added since.

    `before` are the methods that a study was started with, `now` those of the experiment, `every` all of the task.
    """
    first = keys_of_schema_1()
    are_new = all(f"{METHODS_SECTION}.{method}" not in first for method in set(now) - set(before))
    return are_new and set(before) <= set(now) and tuple(now) == tuple(every)


def _names(value: object) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (list, str)) else ()


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested mappings by their keys, joined by points."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value
