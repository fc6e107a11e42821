"""Question of a study: the settings that decide a search, kept in its database and compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from heterokd.config.costs import COSTS
from heterokd.config.experiment import Experiment
from heterokd.config.extension import UNIDENTIFIED
from heterokd.config.methods import methods_of
from heterokd.config.networks import StudentSettings
from heterokd.config.schema import FIRST_SCHEMA, METHODS_SECTION, SCHEMA, keys_of_schema_1
from heterokd.domains import Choice, Domain
from heterokd.errors import StudyError
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.typed_json import parse
from heterokd.study.assignment import method_space
from heterokd.study.space_change import SpaceChange

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
    "evaluate",
    "prior_weight",
}
SPACE = "search.space."
LISTED = f"{SPACE}methods"
FILES = f"{SPACE}extensions."
STUDENT = "student."
COMBINE = "search.combine"
LISTED_COSTS = f"{COSTS}."
UNCHANGEABLE = f"{SPACE}training.epochs"
"""Domain that may not change: rungs and budgets count in trainings of the study's epochs."""
ABSENT = "absent"


@dataclass(frozen=True)
class StoredQuestion:
    """Attributes of a study that decide whether an experiment agrees with it."""

    methods: tuple[str, ...]
    question: Mapping[str, object]
    schema: int = FIRST_SCHEMA
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def student(self) -> StudentSettings:
        """Students that the study was started with."""
        return StudentSettings.model_validate(self.question["student"])


def question(experiment: Experiment, methods: Sequence[str], without: Collection[str] = ()) -> dict[str, object]:
    """Return the settings that decide a search as plain values, with the domains of the space.

    `without` are keys of domains that are left out.
    """
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
    domains = {key: str(domain) for key, domain in _domains(experiment, methods).items() if key not in without}
    content["search"]["space"] = {"methods": named if named == "all" else list(named), **domains}
    files = {name: file.model_dump(exclude=UNIDENTIFIED) for name, file in experiment.space.extensions.items()}
    if files:
        content["search"]["space"]["extensions"] = files
    if experiment.search.costs:  # rows of other students do not count
        content["search"]["costs"] = {
            key: {network: value for network, value in listed.items() if network in experiment.student.networks}
            for key, listed in experiment.search.costs.items()
        }
    plain: dict[str, object] = json.loads(json.dumps(content))
    return plain


def _domains(experiment: Experiment, methods: Sequence[str]) -> dict[str, Domain]:
    domains = experiment.shared_domains()
    for method in methods:
        domains |= method_space(experiment, method)
    return domains


def methods_kept(stored: StoredQuestion, experiment: Experiment) -> tuple[str, ...]:
    """Return the methods of a study that the experiment searches, too."""
    return tuple(method for method in stored.methods if method in experiment.methods)


def check_question(attributes: Mapping[str, object], experiment: Experiment, folder: StudyFolder) -> None:
    """Compare an experiment with the settings that a study was started with, apart from its search space.

    `attributes` are the user attributes of the study.

    Raises:
        StudyError: they differ, or a method of the study is missing here.
    """
    _differences(parse(StoredQuestion, attributes), experiment, folder)


def space_change(
    attributes: Mapping[str, object], experiment: Experiment, folder: StudyFolder, excluded: Collection[str] = ()
) -> SpaceChange | None:
    """Return how the search space of an experiment differs from that of its study; None if it is the same.

    Methods, students and domains may be added, removed or changed when a study is resumed: the finished trials mean
    the same. Methods that the code has added to `all` since are no change.

    Args:
        attributes: user attributes of the study.
        experiment: the experiment, without the students that are left out.
        folder: the study's folder.
        excluded: methods that cannot be built for the pair.

    Raises:
        StudyError: they differ in another setting, or nothing is left of the study's students.
    """
    stored = parse(StoredQuestion, attributes)
    found = _differences(stored, experiment, folder)
    if not found:
        return None
    methods = [method for method in experiment.methods if method not in excluded]
    students = [network for network in stored.student.networks if network not in stored.left_out]
    now = experiment.student.networks
    listed = (f"{SPACE}student.network", f"{SPACE}teacher.network", LISTED)
    change = SpaceChange(
        added_methods=_without(methods, stored.methods),
        removed_methods=_without(stored.methods, methods),
        added_students=_without(now, students),
        removed_students=_without(students, now),
        domains={
            key.removeprefix(SPACE): texts
            for key, texts in found.items()
            if key.startswith(SPACE) and not key.startswith(FILES) and key not in listed
        },
    )
    return change if change.to_json() else None


def _without(names: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _differences(stored: StoredQuestion, experiment: Experiment, folder: StudyFolder) -> dict[str, tuple[str, str]]:
    """Return the settings of the search space that differ from a study's, before and now, by key.

    Raises:
        StudyError: another setting differs, or a method of the study is missing here.
    """
    lost = [method for method in stored.methods if not experiment.knows(method)]
    if lost:
        raise StudyError(
            f"{folder.database}: the study searches method {lost[0]!r}, which neither the experiment nor this version "
            "of heterokd has; install the version that has it, or rename the experiment to start a new study"
        )
    kept = methods_kept(stored, experiment)
    before, now = dict(leaves(stored.question)), dict(leaves(question(experiment, kept)))
    added = _added(experiment, stored, before, now)
    removed = {f"{SPACE}{key}" for key in _domains(experiment, _without(stored.methods, kept))}
    may_change = _same_students(stored, experiment)
    common = tuple(f".{name}" for name in set(stored.student.networks) & set(experiment.student.networks))
    found: dict[str, tuple[str, str]] = {}
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = (json.dumps(values[key]) if key in values else ABSENT for values in (before, now))
        if old == new or key in added or (key.startswith(LISTED_COSTS) and not key.endswith(common)):
            continue
        if not _is_of_space(key, in_both=key in before and key in now, students=may_change):
            raise StudyError(
                f"{folder.path}: {key} was {old} when this study started and is {new} now; set it back, or rename the "
                "experiment to start a new study"
            )
        if key in now or key not in removed:
            found[key] = (str(before.get(key, ABSENT)), str(now.get(key, ABSENT)))
    if found.keys() & {f"{STUDENT}network"} and not set(stored.student.networks) & set(experiment.student.networks):
        raise StudyError(
            f"{folder.path}: student.network: none of the study's students ({', '.join(stored.student.networks)}) is "
            "left; keep one of them, or rename the experiment to start a new study"
        )
    return found


def _is_of_space(key: str, *, in_both: bool, students: bool) -> bool:
    """Return whether a key may change between two runs of a study, since the finished trials mean the same.

    Args:
        key: key of a setting that differs.
        in_both: whether the study and the experiment have it: a file of a method may not change.
        students: whether the students that both have are the same.
    """
    if key.startswith(STUDENT):
        return students
    if key.startswith(FILES):
        return not in_both
    return key == COMBINE or (key.startswith(SPACE) and key != UNCHANGEABLE)


def _same_students(stored: StoredQuestion, experiment: Experiment) -> bool:
    """Return whether the students that a study and an experiment both have are built in the same way."""
    before, now = stored.student, experiment.student
    common = set(before.networks) & set(now.networks)
    is_list_changed = set(before.networks) != set(now.networks)
    return is_list_changed and all(before.settings_of(name) == now.settings_of(name) for name in common)


def grown_question(
    attributes: Mapping[str, object], experiment: Experiment, methods: Sequence[str]
) -> dict[str, object]:
    """Return the question of a study whose search space has changed, with these methods.

    Parameters that the code has added to methods of the study stay pinned in later runs: they are left out.
    """
    stored = parse(StoredQuestion, attributes)
    kept = [method for method in methods_kept(stored, experiment) if method in methods]
    before, now = dict(leaves(stored.question)), dict(leaves(question(experiment, kept)))
    added = _added(experiment, stored, before, now)
    return question(experiment, methods, {key.removeprefix(SPACE) for key in added if key != LISTED})


def _added(
    experiment: Experiment, stored: StoredQuestion, before: Mapping[str, object], now: Mapping[str, object]
) -> set[str]:
    """Return the keys that the code has added since the study started."""
    domains, overrides = _domains(experiment, methods_kept(stored, experiment)), experiment.space.overrides
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
