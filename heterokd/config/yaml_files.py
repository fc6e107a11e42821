"""Read and write YAML as plain data: no tags, anchors, merge keys or repeated keys; a date is a string.

Scalars mean what they look like: `1e-3` is a number, and what YAML 1.1 reads as something else (`010` as 8, `1:30` as
90, `no` as false) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from heterokd.config.sentences import given
from heterokd.errors import ConfigError, did_you_mean

LARGEST = 2**64
"""Maximum integer: larger integers are typing mistakes, and Python does not print those of thousands of digits."""


LONGEST_FILE = 16 * 1024**2
"""Maximum size of a file in bytes; a larger file is not an experiment."""

READ_DIFFERENTLY = ("\t", "!", "?")
"""Characters after which libyaml accepts texts that PyYAML's parser refuses."""

MOST_OPENED = 5000
"""Maximum number of characters that open a level, for libyaml: it ends the process at tens of thousands of levels."""

TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$")


class _Loader(yaml.SafeLoader):
    """Loader that reads `1e-3` as a number, which YAML 1.1 reads as a string, and a date or `=` as a string."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # where PyYAML has libyaml
    """The same with libyaml's parser, ten times as fast, whose messages name less."""


class AmbiguousYaml(yaml.MarkedYAMLError):
    """Valid YAML that does not mean what it looks like; the problem is a whole sentence."""


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_yaml_int(node))
    if abs(value) > LARGEST:
        raise yaml.MarkedYAMLError(problem="a whole number is too large", problem_mark=node.start_mark)
    return value


for _each in (_Loader, _FastLoader):
    _each.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{TAG}timestamp", f"{TAG}value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _each.add_implicit_resolver(f"{TAG}float", _FLOAT, list("-+0123456789."))
    _each.add_constructor(f"{TAG}int", _whole_number)


def read_yaml(file: Path) -> dict[str, object]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: missing or unreadable file, invalid YAML (with its line), a repeated key, no mapping.
    """
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # reading could block
            raise ConfigError(f"{file}: is a device or a pipe; give a YAML file")
        if file.is_file() and file.stat().st_size > LONGEST_FILE:
            raise ConfigError(f"{file}: has more than {LONGEST_FILE // 1024**2} MB; give a YAML file")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, near) if near else "check the path"
        raise ConfigError(f"{file}: there is no such file; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not text in UTF-8; give a YAML file") from None
    try:
        content = plain_yaml(text)
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        if isinstance(error, AmbiguousYaml):
            raise ConfigError(f"{file}{place}: {error.problem}") from None
        problem = "a tab cannot indent" if "'\\t'" in str(error.problem) else error.problem or error.context
        raise ConfigError(f"{file}{place}: is not valid YAML: {problem}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{file}: is not valid YAML: it contains control characters") from None
    if content is None:
        raise ConfigError(f"{file}: is empty; write keys and values (`name: ...`)")
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values (`name: ...`), got {given(content)}")
    return content


def plain_yaml(text: str) -> object:
    """Parse a YAML text; repeated keys, aliases, merge keys and ambiguous scalars are YAML errors, too."""
    try:
        is_deep = sum(map(text.count, "[{-")) > MOST_OPENED
        if is_deep or any(mark in text for mark in READ_DIFFERENTLY):
            return _plain(_Loader(text))
        try:
            return _plain(_FastLoader(text))
        except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, KeyError):
            return _plain(_Loader(text))  # for its message
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    # `!!int x`, or a number of more digits than Python reads: PyYAML does not catch these.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise yaml.MarkedYAMLError(problem=f"a value does not fit its tag ({error})") from None


def _plain(loader: yaml.SafeLoader) -> object:
    node = loader.get_single_node()
    _check(node, set(), "")
    return None if node is None else loader.construct_document(node)


def _check(node: yaml.Node | None, visited: set[int], key: str) -> None:
    """Refuse what is no plain data in a node, whose key in the file is `key`."""
    if id(node) in visited:  # PyYAML composes an alias as the node that it refers to
        raise yaml.MarkedYAMLError(problem="anchors (&) and aliases (*) are not supported; write the value twice")
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        advice = _ambiguity(node)
        if advice is not None:
            raise AmbiguousYaml(problem=f"{key}: {advice}" if key else advice, problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check(item, visited, f"{key}[{number}]")
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for name, value in node.value:
            if name.tag == f"{TAG}merge":
                problem = "merge keys (<<) are not supported; write the keys out, or quote it"
                raise AmbiguousYaml(problem=f"{key}: {problem}" if key else problem, problem_mark=name.start_mark)
            if str(name.value) in keys:
                problem = f"the key {name.value!r} appears twice; remove it once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            keys.add(str(name.value))
            inner = f"{key}.{name.value}" if key else str(name.value)
            _check(name, visited, inner)
            _check(value, visited, inner)


def _ambiguity(node: yaml.ScalarNode) -> str | None:
    """Return what is wrong with a scalar that YAML 1.1 reads differently from how it looks; None if nothing is."""
    kind, text = node.tag.removeprefix(TAG), str(node.value)
    if kind == "bool" and text.lower() not in ("true", "false"):
        meant = "true" if text.lower() in ("yes", "on") else "false"
        return f"{text} means {meant} in YAML 1.1; write {meant}, or quote it if it is text"
    if kind in ("int", "float") and ":" in text:
        return f"{text} is a number to base 60 in YAML 1.1; write it as a plain number, or quote it if it is text"
    if kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
        return f"{text} is an octal number in YAML 1.1; write it without the leading 0, or quote it if it is text"
    if kind == "float" and text.lstrip("+-").lower() in (".nan", ".inf"):
        return f"{text} is not a finite number; give a number, or quote it if it is text"
    return None


class _Dumper(yaml.SafeDumper):
    """Dumper that writes strings of several lines, such as a method's file, as block literals.

    It quotes strings that `_Loader`, or any reader of YAML 1.1, would read as something else.
    """


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(f"{TAG}float", _FLOAT, list("-+0123456789."))


def dump_yaml(content: Mapping[str, object]) -> str:
    """Format plain values as YAML, in their order."""
    text: str = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
