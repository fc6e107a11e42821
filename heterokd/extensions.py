"""Look up classes by name: in heterokd's folders, installed packages, `module:Name`, or a user's file.

Names are found without importing the classes, which are imported on first use. The class of a user's file
(`./my_method.py:MyKD`) is created from the file's text, which is part of the settings: `heterokd.config.extension`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeGuard, TypeVar, cast

from heterokd.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Implementations(Mapping[str, type[T]], Generic[T]):
    """Subclasses of a class by name: those in the modules of a folder, sorted, then those of entry points.

    Args:
        package: dotted name of the folder; modules with a leading underscore are ignored.
        base: common base class, `package.module:Class`.
        group: entry points of installed packages.
    """

    def __init__(self, package: str, base: str, group: str) -> None:
        self._package, self._base, self._group = package, base, group
        self._loaded: dict[str, type[T]] = {}

    @cached_property
    def builtin(self) -> tuple[str, ...]:
        """Names in the folder, which do not depend on installed packages."""
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
        """Import a class.

        Raises:
            KeyError: unknown name.
            ConfigError: the entry point of an installed package is no such class, or its name is taken.
        """
        base = _named(self._base)
        entries = self._installed.get(name, [])
        if len(entries) + (name in self.builtin) > 1:
            owners = [_owner(entry) for entry in entries]
            raise ConfigError(
                f"{self._group}: {' and '.join(['heterokd'] * (name in self.builtin) + owners)} both define {name!r}; "
                f"uninstall {owners[-1]}, or rename its entry point"
            )
        if name in self.builtin:
            return cast("type[T]", the_subclass(importlib.import_module(f"{self._package}.{name}"), base))
        if not entries:
            raise KeyError(name)
        entry = entries[0]
        try:
            found = entry.load()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(
                f"{self._group}: {name!r} of {_owner(entry)} cannot be imported ({reason}); correct or uninstall that "
                "package"
            ) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(
                f"{self._group}: {name!r} of {_owner(entry)} ({entry.value}) is not a subclass of "
                f"{self._base.replace(':', '.')}; correct or uninstall that package"
            )
        return cast("type[T]", found)


def the_subclass(module: ModuleType, base: type) -> type:
    """Return the only concrete subclass of `base` that a module defines."""
    found: list[type] = [
        value
        for value in vars(module).values()
        if _is_defined_in(value, module) and issubclass(value, base) and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise ImportError(f"{module.__file__} must define exactly 1 {base.__name__}, found {len(found)}")
    return found[0]


def _owner(entry: EntryPoint) -> str:
    return "an installed package" if entry.dist is None else str(entry.dist.name)


def load_named(reference: str, key: str, known: Collection[str] = ()) -> Any:
    """Import the object that `package.module:Name` or `FILE.py:Name` names.

    Args:
        reference: the name; a file is looked up from the current directory.
        key: of the experiment that names it, for errors.
        known: short names that are also valid, for errors.

    Raises:
        ConfigError: the reference has another form, or its module cannot be imported or has no such name.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        forms = ", ".join((*known, "package.module:Name", "./file.py:Name"))
        raise ConfigError(f"{key}: {reference!r} is not a valid name; give one of {forms}")
    if place.endswith(".py"):
        try:
            module = _module_of_text(place, read_source(place))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(f"{key}: {place} cannot be imported ({reason}); correct it") from error
    if not hasattr(module, name):
        defined = [each for each, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{key}: {place} has no {name!r}; {did_you_mean(name, defined)}")
    return getattr(module, name)


def read_source(file: str) -> str:
    """Read a Python file; a relative path starts at the current directory.

    Raises:
        ConfigError: the file does not exist or cannot be read.
    """
    path = Path(file)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading could block, or never end
            raise ConfigError(f"{file}: is a device or a pipe; give a Python file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}; relative paths start at the current directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a Python file") from None


def class_of_text(file: str, text: str, class_name: str, base: str) -> type:
    """Return a class that a Python file defines; the same text returns the same class within a process.

    Args:
        file: path of the text, for messages and tracebacks.
        text: of the file.
        class_name: of the class.
        base: required base class, `package.module:Class`.

    Raises:
        ConfigError: the text is not valid Python, fails on import, or defines no such class.
    """
    module = _module_of_text(file, text)
    found = vars(module).get(class_name)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if _is_defined_in(value, module)]
        hint = did_you_mean(class_name, classes) if classes else f"write a subclass of {base.replace(':', '.')}"
        raise ConfigError(f"{file}: there is no class {class_name!r}; {hint}")
    if not issubclass(found, _named(base)):
        raise ConfigError(f"{file}: {class_name} is not a subclass of {base.replace(':', '.')}; change its base class")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(f"{file}: {class_name} does not define {missing}; add it")
    return found


def object_of_text(file: str, text: str, name: str) -> object:
    """Return what a Python file calls `name`; the same text returns the same object within a process.

    Raises:
        ConfigError: the text is not valid Python, fails on import, or has no such name.
    """
    module = _module_of_text(file, text)
    if name not in vars(module):
        defined = [each for each, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ConfigError(f"{file}: there is no {name!r}; {did_you_mean(name, defined)}")
    return vars(module)[name]


class _TextLoader(importlib.abc.SourceLoader):
    """Loader that imports a module from a text and returns its lines to tracebacks and `inspect.getsource`."""

    def __init__(self, file: str, text: str) -> None:
        self._file, self._text = file, text

    def get_filename(self, fullname: str) -> str:
        return self._file

    def get_data(self, path: str | bytes) -> bytes:
        if path != self._file:
            raise OSError(path)  # bytecode files are not cached
        return self._text.encode()


def _module_of_text(file: str, text: str) -> ModuleType:
    """Import a text once per process."""
    name = f"heterokd_file_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _TextLoader(file, text)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # a loader is given
    module = importlib.util.module_from_spec(spec)
    # Set before it runs, because pydantic and dataclasses look up annotations in the module of their class.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError) and error.filename == file:
            raise ConfigError(f"{file}:{error.lineno}: is not valid Python ({error.msg}); correct it") from None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{file}: cannot be imported ({reason}); correct it") from error
    return module


def _is_defined_in(value: object, module: ModuleType) -> TypeGuard[type]:
    return isinstance(value, type) and value.__module__ == module.__name__


def _named(path: str) -> type:
    module, _, name = path.partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found
