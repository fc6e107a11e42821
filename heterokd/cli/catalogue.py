"""Describe methods from their files; `python -m heterokd.cli.catalogue > docs/methods.md` describes all."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import yaml

from heterokd.config.extension import is_reference, read_extension
from heterokd.config.methods import method_class
from heterokd.domains import domains
from heterokd.errors import ConfigError, did_you_mean
from heterokd.method import Method, summary
from heterokd.methods import METHODS, VANILLA_KD
from heterokd.outputs import Signal

CACHEABLE = Signal.LOGITS | Signal.EMBEDDING | Signal.TAIL
"""Signals that a cache serves; the tail comes from the teacher's last stages, which stay loaded."""

STEP_COSTS = Path(__file__).with_name("step_costs.yaml")
"""Written by `python benchmarks/steps.py --keep`: each method's step over the plain student's, by pair."""

MethodRow = TypedDict(
    "MethodRow",
    {
        "name": str,
        "class": str,
        "title": str,
        "tasks": str,
        "student_needs": str,
        "teacher_needs": str,
        "cacheable": bool,
        "step_cost": dict[str, float],
    },
)
"""A method in a line: its title, the signals that it reads, whether a cache serves it, its measured step by pair."""


class ParameterCard(TypedDict):
    """A parameter of a method; the domain is None if it is not searched."""

    name: str
    default: object
    description: str
    domain: str | None


class MethodCard(MethodRow):
    """A method in full: the text of its file, and its parameters."""

    text: str
    parameters: list[ParameterCard]


@lru_cache(maxsize=1)
def step_costs() -> dict[str, dict[str, float]]:
    """Read each method's measured step over `kd`'s, by pair (`"224"`: ResNet18 from Swin-T at 224 pixels)."""
    pairs: dict[str, dict[str, dict[str, float]]] = yaml.safe_load(STEP_COSTS.read_text(encoding="utf-8"))["pairs"]
    return {
        pair: {name: found["time"] / methods[VANILLA_KD["classification"]]["time"] for name, found in methods.items()}
        for pair, methods in pairs.items()
    }


def describe_all() -> list[MethodRow]:
    """Describe every method in a line."""
    return [_row(name, method) for name, method in METHODS.items()]


def describe(name: str) -> MethodCard:
    """Describe a method in full.

    Args:
        name: of `METHODS`, or `FILE.py:Class`.

    Raises:
        ConfigError: there is no such method.
    """
    name, method = named_method(name)
    found = domains(method.Params)
    parameters: list[ParameterCard] = [
        {
            "name": key,
            "default": field.default,
            "description": field.description or "",
            "domain": str(found[key]) if key in found else None,
        }
        for key, field in method.Params.model_fields.items()
    ]
    module = inspect.getmodule(method)
    text = inspect.cleandoc((module.__doc__ if module else None) or "")
    return {**_row(name, method), "text": text or summary(method), "parameters": parameters}


def source_of(text: str) -> str:
    """Find the address of the paper, the first in the text of a method's file."""
    link = re.search(r"https?://[^\s,;)]+", text)
    return link[0] if link else "no published source"


def named_method(name: str) -> tuple[str, type[Method]]:
    """Find name and class of a method of `METHODS`, or of `FILE.py:Class`.

    Raises:
        ConfigError: there is no such method, or the file defines none that can be built.
    """
    extension = read_extension(name, METHODS) if is_reference(name) else None
    if extension is None and name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; {did_you_mean(name, METHODS)}")
    return name if extension is None else extension.name, method_class(name, extension)


def _row(name: str, method: type[Method]) -> MethodRow:
    return {
        "name": name,
        "class": method.__name__,
        "title": summary(method),
        "tasks": ", ".join(sorted(method.tasks)),
        "student_needs": signals(method.student_needs),
        "teacher_needs": signals(method.teacher_needs),
        "cacheable": not method.teacher_needs & ~CACHEABLE,
        "step_cost": {pair: round(costs[name], 2) for pair, costs in step_costs().items() if name in costs},
    }


def signals(needs: Signal) -> str:
    """Name signals, or `nothing`."""
    return ", ".join(str(signal.name).lower() for signal in needs) or "nothing"


def method_page() -> str:
    """Write docs/methods.md: every method with its paper, equation, signals, parameters and domains."""
    lines = [
        "# Methods",
        "",
        "Written by `make docs` from the methods' files; `heterokd methods NAME` describes a single method.",
        "Cacheable: a teacher's stored outputs can stand in for the teacher. Step: a training step's time over that of",
        "`kd` when the teacher's outputs are given (ResNet18 from Swin-T at 224 pixels; `python benchmarks/steps.py`).",
        "",
        "| method | what it does | reads of the student | reads of the teacher | cacheable | step |",
        "|---|---|---|---|---|---|",
    ]
    for row in describe_all():
        cost = row["step_cost"].get("224")
        cells = (
            row["title"],
            row["student_needs"],
            row["teacher_needs"],
            "yes" if row["cacheable"] else "no",
            "" if cost is None else f"{cost:.2f}",
        )
        lines.append(f"| [`{row['name']}`](#{row['name']}) | {' | '.join(_cell(cell) for cell in cells)} |")
    for name in METHODS:
        lines += ["", *_section(describe(name))]
    return "\n".join(lines) + "\n"


def _section(known: MethodCard) -> list[str]:
    title, *paragraphs = re.split(r"\n\s*\n", known["text"])
    lines = [f"## {known['name']}", "", f"**{_prose(_joined(title))}**"]
    for paragraph in paragraphs:
        lines.append("")
        if paragraph.startswith("    "):
            lines += ["```text", *(line[4:] for line in paragraph.splitlines()), "```"]
        else:
            lines.append(_prose(_joined(paragraph)))
    lines += [
        "",
        f"Reads of the student: {known['student_needs']}; of the teacher: {known['teacher_needs']}; "
        f"{'cacheable' if known['cacheable'] else 'not cacheable'}; tasks: {known['tasks']}.",
    ]
    if known["parameters"]:
        lines += ["", "| parameter | default | searched over | meaning |", "|---|---|---|---|"]
    for parameter in known["parameters"]:
        cells = (str(parameter["default"]), parameter["domain"] or "", parameter["description"])
        lines.append(f"| `{parameter['name']}` | {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _joined(paragraph: str) -> str:
    """Join a paragraph's lines, unless it is a list."""
    return paragraph if re.search(r"^\s*[-*\d]", paragraph, re.M) else " ".join(paragraph.split())


def _prose(text: str) -> str:
    """Escape Markdown's special characters, except in code and addresses."""
    parts = re.split(r"(`[^`]*`|https?://[^\s,;)]+)", text)
    return "".join(part if number % 2 else re.sub(r"([*_<>|\[\]])", r"\\\1", part) for number, part in enumerate(parts))


def _cell(text: str) -> str:
    """Escape the text of a table's cell."""
    return _prose(" ".join(text.split()))


if __name__ == "__main__":
    print(method_page(), end="")
