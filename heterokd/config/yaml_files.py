"""Read and write YAML as plain data: no tags, anchors or repeated keys; `1e-3` is a number, a date is a string."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from heterokd.config.sentences import given
from heterokd.errors import ConfigError, did_you_mean

LARGEST = 2**64
"""Maximum integer: larger ones are typing mistakes, and Python does not print those of thousands of digits."""


class _Loader(yaml.SafeLoader):
    """Loader that reads `1e-3` as a number, which YAML 1.1 reads as a string, and a date as a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_yaml_int(node))
    if abs(value) > LARGEST:
        raise yaml.MarkedYAMLError(problem="a whole number is too large", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(file: Path) -> dict[str, object]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: missing or unreadable file, invalid YAML (with its line), a repeated key, no mapping.
    """
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # reading could block
            raise ConfigError(f"{file}: is a device or a pipe; give a YAML file")
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
    """Parse a YAML text; repeated keys and aliases are YAML errors, too."""
    try:
        _refuse_aliases(yaml.compose(text, Loader=_Loader), set())
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    # `!!int x`, or a number of more digits than Python reads: PyYAML does not catch these.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise yaml.MarkedYAMLError(problem=f"a value does not fit its tag ({error})") from None


def _refuse_aliases(node: yaml.Node | None, visited: set[int]) -> None:
    if id(node) in visited:  # PyYAML composes an alias as the node that it refers to
        raise yaml.MarkedYAMLError(problem="anchors (&) and aliases (*) are not supported; write the value twice")
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_aliases(item, visited)
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if str(key.value) in keys:
                problem = f"the key {key.value!r} appears twice; remove it once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(str(key.value))
            _refuse_aliases(value, visited)


class _Dumper(yaml.SafeDumper):
    """Dumper that writes strings of several lines, such as a method's file, as block literals."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump_yaml(content: Mapping[str, object]) -> str:
    """Format plain values as YAML, in their order."""
    text: str = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
