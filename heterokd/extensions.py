"""Implementations by name: modules of a folder of heterokd, entry points of installed packages, `module:Name`.

Names are found without importing anything, so that a help text can list them; a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from heterokd.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Implementations(Mapping[str, type[T]], Generic[T]):
    """The subclasses of one class by name: one a module of a folder, in the order of the alphabet, then entry points.

    Args:
        package: dotted name of the folder; its modules without a leading underscore are the names.
        base: `package.module:Class` of which all are subclasses.
        group: of the entry points by which installed packages add to the list.
    """

    def __init__(self, package: str, base: str, group: str) -> None:
        self._package, self._base, self._group = package, base, group
        self._loaded: dict[str, type[T]] = {}

    @cached_property
    def builtin(self) -> tuple[str, ...]:
        """Names of the folder alone: these do not depend on what else is installed."""
        folder = Path(__file__).parent.joinpath(*self._package.split(".")[1:])
        return tuple(
            sorted(
                module.name
                for module in pkgutil.iter_modules([str(folder)])
                if not module.ispkg and module.name[0] != "_"
            )
        )

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self._group), key=lambda entry: entry.name):
            found.setdefault(entry.name, []).append(entry)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self.builtin
        yield from (name for name in self._installed if name not in self.builtin)

    def __len__(self) -> int:
        return len({*self.builtin, *self._installed})

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self._installed

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> type[T]:
        """Import one class.

        Raises:
            KeyError: the name is not known.
            ConfigError: an installed package does not give what its entry point promises.
        """
        module_name, _, class_name = self._base.partition(":")
        base: type = getattr(importlib.import_module(module_name), class_name)
        entries = self._installed.get(name, [])
        if len(entries) + (name in self.builtin) > 1:
            owners = [_owner(entry) for entry in entries]
            raise ConfigError(
                f"{self._group}: {' and '.join(['heterokd'] * (name in self.builtin) + owners)} both define {name!r}; "
                f"uninstall {owners[-1]}, or ask its authors for another name"
            )
        if name in self.builtin:
            return cast("type[T]", the_subclass(importlib.import_module(f"{self._package}.{name}"), base))
        if not entries:
            raise KeyError(name)
        entry = entries[0]
        try:
            found = entry.load()
        except Exception as error:
            raise ConfigError(
                f"{self._group}: {name!r} of {_owner(entry)} cannot be imported ({type(error).__name__}: {error}); "
                "mend or uninstall that package"
            ) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(
                f"{self._group}: {name!r} of {_owner(entry)} ({entry.value}) is no subclass of {module_name}."
                f"{class_name}; mend or uninstall that package"
            )
        return cast("type[T]", found)


def the_subclass(module: ModuleType, base: type) -> type:
    """The one concrete subclass of `base` that a module defines."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise ImportError(f"{module.__file__} must define exactly one {base.__name__}, found {len(found)}")
    return found[0]


def _owner(entry: EntryPoint) -> str:
    return "an installed package" if entry.dist is None else str(entry.dist.name)


def load_named(reference: str, key: str, known: Collection[str] = ()) -> Any:
    """Import the object that `package.module:Name` or `FILE.py:Name` names.

    Args:
        reference: the name; a file is looked up from the current directory.
        key: of the experiment that names it, for errors.
        known: short names that may stand there, for errors.

    Raises:
        ConfigError: the reference has another form, the module cannot be imported, or has no such name.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        forms = ", ".join((*known, "package.module:Name", "./file.py:Name"))
        raise ConfigError(f"{key}: {reference!r} names nothing; give one of {forms}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ConfigError(f"{key}: {place} cannot be imported ({type(error).__name__}: {error}); correct it") from error
    if not hasattr(module, name):
        defined = [each for each, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{key}: {place} has no {name!r}; {did_you_mean(name, defined)}")
    return getattr(module, name)


def _import_file(file: Path) -> ModuleType:
    spec = spec_from_file_location(f"heterokd_extension_{file.stem}", file.resolve())
    assert spec is not None  # of a name that ends in .py
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
