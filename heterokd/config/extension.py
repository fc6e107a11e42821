"""Extension: a class in a user's Python file, as kept by the settings that name it.

    methods: [kd, ./my_method.py:MyKD]   ->  methods: [kd, mykd], extensions: {mykd: {file, class_name, sha256, text}}
    dataset: ./my_data.py:MyData         ->  dataset: mydata,     extension: {file, class_name, sha256, text}

The text of the file travels with the settings, so that every node, every resumed study and every recipe has it; what
identifies a recipe is its SHA-256, not where the file lay. The name is the class's in lower case. A file is read and
parsed when its name is read; it is run when the class is first needed.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Sized

from pydantic import Field, model_validator

from heterokd.config.settings import Settings
from heterokd.errors import ConfigError, did_you_mean
from heterokd.extensions import class_of_text, read_source

REFERENCE = re.compile(r"(?P<file>.+\.py)(?::(?P<class_name>\w+))?")
RESERVED = ("all", "method", "student", "teacher", "training")
"""Words that keys of samples and search spaces begin with."""
UNIDENTIFIED = {"file", "text"}
"""Keys of an extension that do not decide what it does: the text does by its hash, under whatever name."""


class Extension(Settings):
    """A class of a Python file that is no part of heterokd or of an installed package."""

    file: str = Field(description="where it was read from")
    class_name: str
    sha256: str = Field(description="of the text")
    text: str = Field(description="of the file")

    @model_validator(mode="after")
    def _unchanged(self) -> Extension:
        if hashlib.sha256(self.text.encode()).hexdigest() != self.sha256:
            raise ValueError(f"text: is not the text of {self.file} any more (its SHA-256 differs); restore it")
        return self

    @property
    def name(self) -> str:
        """Name that the class goes by."""
        return self.class_name.lower()

    def load(self, base: str) -> type:
        """Return the class, a subclass of `base` (`package.module:Class`).

        Raises:
            ConfigError: the file cannot be imported, or its class is none of that kind.
        """
        return class_of_text(self.file, self.text, self.class_name, base)


def is_none(value: object) -> bool:
    """Whether a section writes nothing of its extension."""
    return value is None


def is_empty(value: Sized) -> bool:
    """Whether a section writes nothing of its extensions."""
    return len(value) == 0


def is_reference(name: object) -> bool:
    """Whether a name is that of a class in a file."""
    return isinstance(name, str) and REFERENCE.fullmatch(name) is not None


def read_extension(reference: str, taken: Collection[str]) -> Extension:
    """Read the file that `FILE.py:Class` names, without running it.

    Args:
        reference: the name; a relative path begins at the current directory.
        taken: names that its class may not have.

    Raises:
        ConfigError: there is no such file or class in it, the file is not Python, or the name is taken.
    """
    found = REFERENCE.fullmatch(reference)
    assert found is not None  # see `is_reference`
    file, class_name = found["file"], found["class_name"]
    if class_name is None:
        raise ConfigError(f"{file}: name its class as well, {file}:Class")
    text = read_source(file)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"{file}{line}: is not valid Python ({message}); correct it") from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if class_name not in classes:
        hint = did_you_mean(class_name, classes) if classes else "it defines none at all"
        raise ConfigError(f"{file}: defines no class {class_name!r}; {hint}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    extension = Extension(file=file, class_name=class_name, sha256=digest, text=text)
    if extension.name in (*taken, *RESERVED):
        raise ConfigError(
            f"{file}: class {class_name} would go by the name {extension.name!r}, which is taken; rename the class"
        )
    return extension
