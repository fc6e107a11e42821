"""Teachers of several networks: `teacher.ensemble` and `teacher.cross_fit` become options of the network.

ensemble: [a, {network: b, ...}]  ->  network: "ensemble(a, b)"
                                      options: {ensemble: [{network, options}, ...], average}
cross_fit: 5                      ->  options: {..., cross_fit: {folds: 5, seed, features}}
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from heterokd.config.modules import with_module_files
from heterokd.networks.combined_options import AVERAGE, CROSS_FIT, ENSEMBLE, PROBABILITIES

BY_NAME = ("options", "checkpoint", "start_from")
"""Keys next to `ensemble` that may be given by the name of a member."""
FOR_ALL = ("pretrained", "fit", "training")
"""Keys next to `ensemble` that are the default of all members."""
FEWEST = 2


def with_members(content: Mapping[str, object]) -> Mapping[str, object]:
    """Return an unchecked section `teacher` with its ensemble as a network.

    Raises:
        ValueError: the list has fewer than two networks, or another key contradicts it.
    """
    given = content.get(ENSEMBLE)
    if not isinstance(given, list | tuple) or not given:
        for key in (ENSEMBLE, CROSS_FIT):
            _refuse_options(content, key)
        if content.get(AVERAGE, PROBABILITIES) != PROBABILITIES:
            raise ValueError("average: is for teacher.ensemble; remove it")
        return content
    members = [_member(entry, content) for entry in given]
    if len(members) < FEWEST:
        raise ValueError("ensemble: name at least two networks")
    if content.get(CROSS_FIT) is not None:
        raise ValueError("give either ensemble or cross_fit, not both")
    names = [str(member.get("network", "?")) for member in members]
    name = f"{ENSEMBLE}({', '.join(names)})"
    if content.get("network", name) != name:
        raise ValueError("ensemble: its list names the networks; remove teacher.network")
    for key in BY_NAME[1:]:
        if content.get(key) is not None and not isinstance(content[key], Mapping):
            form = ", ".join(f"{network}: FILE" for network in dict.fromkeys(names))
            raise ValueError(f"{key}: one file cannot hold {len(names)} networks; write {key}: {{{form}}}")
    described = [{"network": member.get("network"), "options": member.get("options") or {}} for member in members]
    rest = {key: value for key, value in content.items() if key not in ("pretrained", "taps", *BY_NAME)}
    options = {ENSEMBLE: described, AVERAGE: content.get(AVERAGE, PROBABILITIES)}
    return {**rest, ENSEMBLE: members, "network": name, "options": options}


def _member(entry: object, content: Mapping[str, object]) -> dict[str, object]:
    """Return a member with the keys that it takes from the section."""
    if isinstance(entry, BaseModel):
        return entry.model_dump(mode="json")
    member = dict(entry) if isinstance(entry, Mapping) else {"network": entry}
    name = member.get("network")
    for key in FOR_ALL:
        if key in content and key not in member and not (key == "pretrained" and member.get("checkpoint")):
            member[key] = content[key]
    for key in BY_NAME:
        found = content.get(key)
        if key in member or not isinstance(found, Mapping) or ENSEMBLE in found:
            continue
        if name in found:
            member[key] = found[name]
        elif key == "options" and not any(isinstance(value, Mapping) for value in found.values()):
            member[key] = found
    return with_module_files(member)


def with_folds(content: Mapping[str, object]) -> Mapping[str, object]:
    """Return an unchecked teacher with `cross_fit` in the options of its network."""
    folds = content.get(CROSS_FIT)
    if not isinstance(folds, int):
        return content
    options = content.get("options") or {}
    training = content.get("training") or {}
    if isinstance(training, BaseModel):
        training = training.model_dump()
    if not isinstance(options, Mapping) or not isinstance(training, Mapping):
        return content
    has_start = bool(content.get("pretrained") or content.get("start_from"))
    is_head = has_start and training.get("trainable") == "head" and content.get("fit", "auto") == "auto"
    seed, features = training.get("seed", 0), content.get("fit") == "head" or is_head
    return {**content, "options": {**options, CROSS_FIT: {"folds": folds, "seed": seed, "features": features}}}


def _refuse_options(content: Mapping[str, object], key: str) -> None:
    options = content.get("options")
    if isinstance(options, Mapping) and key in options and not content.get(key):
        raise ValueError(f"options: {key} is no option but a key next to `options`; set it there")
