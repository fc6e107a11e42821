"""Importances and domains of a study's parameters, kept in its parameters.json until a trial changes.

Forests, the study's database and the methods' files take seconds to import; a page that is drawn again needs none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from heterokd.domains import Choice, Domain, Float, Int, Scalar
from heterokd.formatting import package_version
from heterokd.report.study_data import StudyReport
from heterokd.storage.files import read_derived, write_text
from heterokd.storage.typed_json import parse
from heterokd.study.importance import Importance

logger = logging.getLogger(__name__)

KINDS: Mapping[str, type[Float | Int]] = {"Float": Float, "Int": Int}


@dataclass(frozen=True)
class ParameterFacts:
    """What the charts of parameters show beside the trials.

    Attributes:
        importances: by group, see `heterokd.study.importance`.
        domains: of each method's parameters, by `method.parameter`.
        problem: why the importances are unknown, or "".
    """

    importances: Mapping[str, Importance]
    domains: Mapping[str, Mapping[str, Domain]]
    problem: str = ""


def parameter_facts(report: StudyReport) -> ParameterFacts:
    """Return the facts of the study's trials: those of parameters.json, or computed and written there."""
    file, digest = report.folder.path / "parameters.json", _digest(report)
    content = read_derived(file)
    if content.get("digest") == digest and report.folder.database.exists():
        try:
            return _parsed(content)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: is damaged and is computed again", file)
    found = _computed(report)
    if not found.problem:
        try:
            write_text(file, json.dumps({"digest": digest, **_content(found)}))
        except OSError as error:
            logger.warning("%s: cannot be written (%s); the next page takes longer", file, error.strerror)
    return found


def _digest(report: StudyReport) -> str:
    """Return a hash of everything that the facts follow from."""
    trials = [
        (trial.number, trial.status, trial.value, trial.epochs, trial.curve, trial.sample) for trial in report.search
    ]
    content = [package_version(), report.experiment.model_dump(mode="json"), trials]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _computed(report: StudyReport) -> ParameterFacts:
    from heterokd.study.importance import importances

    methods = dict.fromkeys(trial.method for trial in report.search)
    domains = {method: report.experiment.method_domains(method) for method in methods}
    try:
        found = {known.group: known for known in importances(report.folder)}
        problem = "" if report.folder.database.exists() else "the study's database is not here"
    except Exception as error:  # noqa: BLE001  without the database, the page lacks these charts only
        found, problem = {}, f"{type(error).__name__}: {error}".splitlines()[0]
    return ParameterFacts(found, domains, problem)


def _content(facts: ParameterFacts) -> dict[str, object]:
    return {
        "importances": [asdict(known) for known in facts.importances.values()],
        "domains": {
            method: {key: {"kind": type(domain).__name__, **asdict(domain)} for key, domain in domains.items()}
            for method, domains in facts.domains.items()
        },
    }


def _parsed(content: Mapping[str, object]) -> ParameterFacts:
    """Parse parameters.json.

    Raises:
        ValueError, TypeError, KeyError: it is damaged.
    """
    known = parse(list[Importance], content["importances"])
    stored = parse(dict[str, dict[str, dict[str, object]]], content["domains"])
    domains = {method: {key: _domain(of) for key, of in found.items()} for method, found in stored.items()}
    return ParameterFacts({each.group: each for each in known}, domains)


def _domain(stored: Mapping[str, object]) -> Domain:
    kind, fields = str(stored["kind"]), {key: value for key, value in stored.items() if key != "kind"}
    if kind == "Choice":
        return Choice(*parse(list[Scalar], fields["options"]))
    return KINDS[kind](**fields)  # type: ignore[arg-type]  # its constructor checks them
