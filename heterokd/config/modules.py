"""Users' modules in the sections `teacher` and `student`: their files become part of the options.

network: ./nets.py:make_student        ->  network: make_student
options: {width: 8}                        options: {width: 8, module: {file, name, sha256, text}, taps: {...}}
taps: {stages: [...], embedding: NAME}
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from pathlib import PurePath

from heterokd.config.extension import REFERENCE, is_reference
from heterokd.errors import ConfigError, did_you_mean
from heterokd.extensions import read_source

MODULE = "module"
TAPS = "taps"
"""Names of the two options."""


def with_module_files(content: Mapping[str, object]) -> dict[str, object]:
    """Return an unchecked section with the files of its users' modules, and with `taps`, in its options.

    Raises:
        ValueError: a file cannot be read or does not define the function, or `taps` is given for several networks.
    """
    section = dict(content)
    network, taps = section.get("network"), section.pop(TAPS, None)
    names = list(network) if isinstance(network, list | tuple) else [network]
    options = section.get("options") or {}
    if not isinstance(options, Mapping) or not (taps or any(is_reference(name) for name in names)):
        return section if taps is None else {**section, TAPS: taps}
    if taps is not None and len(names) > 1:
        raise ValueError(f"taps: of a list of networks, write options: {{{names[0]}: {{taps: ...}}}}")
    given: dict[object, dict[str, object]] = {}
    of_each = any(name in options for name in names)
    for name in names:
        own = options.get(name, {}) if of_each else options
        if not isinstance(own, Mapping):
            return section  # refused with the key by the checks of the options
        found = dict(own) if taps is None else {**own, TAPS: taps}
        if is_reference(name):
            module = read_module(str(name))
            name = module["name"]
            found[MODULE] = module
        if name in given:
            raise ValueError(f"network: two networks have the name {name!r}; rename a function")
        given[name] = found
    if isinstance(network, list | tuple):
        return {**section, "network": list(given), "options": given}
    ((name, found),) = given.items()
    return {**section, "network": name, "options": found}


def read_module(reference: str) -> dict[str, str]:
    """Read the file of `FILE.py:function` without executing it; only its name is kept of its path.

    Raises:
        ValueError: the file or the function is missing, or the file is not valid Python.
    """
    found = REFERENCE.fullmatch(reference)
    assert found is not None  # see `is_reference`
    file, name = found["file"], found["class_name"]
    if name is None:
        raise ValueError(f"network: {file}: the name of the function is missing; write {file}:FUNCTION")
    try:
        text = read_source(file)
    except ConfigError as error:
        raise ValueError(f"network: {error}") from None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"network: {file}{line}: is not valid Python ({message}); correct it") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    if name not in defined + assigned:
        hint = did_you_mean(name, defined) if defined else "the file defines no function"
        raise ValueError(f"network: {file}: there is no function or class {name!r}; {hint}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"file": PurePath(file).name, "name": name, "sha256": digest, "text": text}
