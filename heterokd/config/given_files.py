"""Files of weights that an experiment names: `teacher.checkpoint`, `teacher.start_from` and `student.start_from`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings, StudentSettings, TeacherSettings, TeachersSettings
from heterokd.networks.combined_options import ENSEMBLE

SECTIONS = {"teacher": ("checkpoint", "start_from"), "student": ("start_from",)}


@dataclass(frozen=True)
class GivenFile:
    """A file of weights.

    Attributes:
        key: key of the experiment that names it.
        network: network that it is for.
        file: path, or a URI of MLflow.
    """

    key: str
    network: NetworkSettings
    file: Path


_Section = TeachersSettings | StudentSettings


def _section(experiment: Experiment, name: str) -> _Section:
    return experiment.teacher if name == "teacher" else experiment.student


def given_files(experiment: Experiment) -> list[GivenFile]:
    """List the files of weights that an experiment names."""
    found = []
    for section, keys in SECTIONS.items():
        searched = _section(experiment, section)
        for key in keys:
            given: Path | Mapping[str, Path] | None = getattr(searched, key)
            for network in searched.networks if given is not None else ():
                file = given.get(network) if isinstance(given, Mapping) else given
                name = f"{section}.{key}.{network}" if isinstance(given, Mapping) else f"{section}.{key}"
                if file is not None:
                    found.append(GivenFile(name, _single(searched, network), file))
    for number, member in enumerate(experiment.teacher.ensemble):
        for key in SECTIONS["teacher"]:
            file = getattr(member, key)
            if file is not None:
                found.append(GivenFile(f"teacher.{ENSEMBLE}[{number}].{key}", member, file))
    return found


def _single(searched: _Section, network: str) -> NetworkSettings:
    settings = searched.settings_of(network)
    return settings.members[0] if isinstance(settings, TeacherSettings) else settings


def with_files(experiment: Experiment, change: Callable[[GivenFile], Path]) -> Experiment:
    """Return the experiment with each file of weights replaced by `change`."""
    changed = {each.key: change(each) for each in given_files(experiment)}
    sections: dict[str, _Section] = {}
    for section, keys in SECTIONS.items():
        searched = _section(experiment, section)
        update: dict[str, object] = {}
        for key in keys:
            given: Path | Mapping[str, Path] | None = getattr(searched, key)
            if isinstance(given, Mapping):
                update[key] = {network: changed[f"{section}.{key}.{network}"] for network in given}
            elif given is not None:
                update[key] = changed[f"{section}.{key}"]
        if isinstance(searched, TeachersSettings) and searched.ensemble:
            update[ENSEMBLE] = tuple(
                member.model_copy(update=_changed_member(f"{section}.{ENSEMBLE}[{number}]", changed))
                for number, member in enumerate(searched.ensemble)
            )
        if update != {key: getattr(searched, key) for key in update}:
            sections[section] = searched.model_copy(update=update)
    return experiment.model_copy(update=sections) if sections else experiment


def _changed_member(name: str, changed: Mapping[str, Path]) -> dict[str, Path]:
    return {key: changed[f"{name}.{key}"] for key in SECTIONS["teacher"] if f"{name}.{key}" in changed}
