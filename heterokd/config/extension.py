"""Extension: a class in a user's Python file, stored in the settings that name it.

    methods: [kd, ./my_method.py:MyKD]   ->  methods: [kd, mykd], extensions: {mykd: {file, class_name, sha256, text}}
    dataset: ./my_data.py:MyData         ->  dataset: mydata,     extension: {file, class_name, sha256, text}

The settings contain the text of the file, so every node, resumed study and recipe has it. Its SHA-256 is part of a
recipe's identity, its path is not. The extension's name is the class name in lower case. A file is parsed when the
settings are read, and executed when the class is first needed.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection

from pydantic import Field, model_validator

from heterokd.config.settings import Settings
from heterokd.errors import ConfigError, did_you_mean
from heterokd.extensions import class_of_text, read_source

REFERENCE = re.compile(r"(?P<file>.+\.py)(?::(?P<class_name>\w+))?")
RESERVED = ("all", "method", "student", "teacher", "training")
"""First words of other keys in samples and search spaces."""
UNIDENTIFIED = {"file", "text"}
"""Keys that are not part of an extension's identity: `sha256` stands for the text, and the path has no effect."""


class Extension(Settings):
    """A class from a Python file outside of heterokd and installed packages."""

    file: str = Field(description="path that it was read from")
    class_name: str
    sha256: str = Field(description="of the text")
    text: str = Field(description="of the file")

    @model_validator(mode="after")
    def _unchanged(self) -> Extension:
        if hashlib.sha256(self.text.encode()).hexdigest() != self.sha256:
            raise ValueError(f"text: differs from the original text of {self.file} (SHA-256); restore it")
        return self

    @property
    def name(self) -> str:
        """Name of the extension: the class name in lower case."""
        return self.class_name.lower()

    def load(self, base: str) -> type:
        """Import the class, a subclass of `base` (`package.module:Class`).

        Raises:
            ConfigError: the file cannot be imported, or the class is not a subclass of `base`.
        """
        return class_of_text(self.file, self.text, self.class_name, base)


def is_reference(name: object) -> bool:
    """Whether a name has the form `FILE.py:Class`."""
    return isinstance(name, str) and REFERENCE.fullmatch(name) is not None


def read_extension(reference: str, taken: Collection[str]) -> Extension:
    """Read the file of `FILE.py:Class` without executing it.

    Args:
        reference: the name; a path is relative to the current directory.
        taken: names of other classes, which are refused.

    Raises:
        ConfigError: the file or the class is missing, the file is not valid Python, or the name is taken.
    """
    found = REFERENCE.fullmatch(reference)
    assert found is not None  # see `is_reference`
    file, class_name = found["file"], found["class_name"]
    if class_name is None:
        raise ConfigError(f"{file}: the name of the class is missing; write {file}:Class")
    text = read_source(file)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"{file}{line}: is not valid Python ({message}); correct it") from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if class_name not in classes:
        hint = did_you_mean(class_name, classes) if classes else "the file defines no class"
        raise ConfigError(f"{file}: there is no class {class_name!r}; {hint}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    extension = Extension(file=file, class_name=class_name, sha256=digest, text=text)
    if extension.name in (*taken, *RESERVED):
        raise ConfigError(
            f"{file}: class {class_name} would have the name {extension.name!r}, which is taken; rename the class"
        )
    return extension
