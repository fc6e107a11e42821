"""Write docs/methods/: a page for each distillation method, from its file.

python docs/method_pages.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from equations import equation_table

from heterokd.cli.catalogue import MethodCard, cell, describe, learned_unlabelled, prose
from heterokd.method import Verification
from heterokd.methods import BASELINE, METHODS
from heterokd.study.published import PublishedSetting, settings_of

FOLDER = Path(__file__).parent / "methods"


def pages() -> dict[str, str]:
    """Return the text of every page by the method's name."""
    return {name: _page(describe(name), METHODS[name].verification) for name in METHODS}


def _page(known: MethodCard, verification: Verification | None) -> str:
    name = known["name"]
    names = [parameter["name"] for parameter in known["parameters"]]
    lines = [
        f"# {name}",
        "",
        "Made by `make docs` from the method's file. [All methods](../methods.md)",
    ]
    for number, paragraph in enumerate(re.split(r"\n\s*\n", known["text"])):
        if paragraph.startswith("    "):
            lines += ["", *equation_table([line[4:] for line in paragraph.splitlines()], names)]
        else:
            text = _linked(prose(" ".join(paragraph.split())))
            lines += ["", f"**{text}**" if number == 0 else text]
    lines += ["", *_use(known), "", *_parameters(known), *_published(name), *_verification(verification)]
    return "\n".join(lines).rstrip() + "\n"


def _linked(text: str) -> str:
    """Return Markdown whose addresses are links."""
    return re.sub(r"https?://[^\s,;)]*[^\s,;).]", r"<\g<0>>", text)


def _use(known: MethodCard) -> list[str]:
    name = known["name"]
    lines = [
        "| reads of the student | reads of the teacher | cacheable | tasks | learns from images without labels |",
        "|---|---|---|---|---|",
        f"| {cell(known['student_needs'])} | {cell(known['teacher_needs'])} | {'yes' if known['cacheable'] else 'no'} "
        f"| {known['tasks']} | {learned_unlabelled(name)} |",
    ]
    if known["step_cost"]:
        costs = ", ".join(f"{cost:.2f} ({pair})" for pair, cost in known["step_cost"].items())
        lines += ["", f"Time of a training step relative to `kd`, by pair (`python benchmarks/steps.py`): {costs}."]
    if name != BASELINE:
        lines += ["", "```sh", f"heterokd distill EXPERIMENT --method {name}     # a single training", "```"]
    return lines


def _parameters(known: MethodCard) -> list[str]:
    if not known["parameters"]:
        return ["## Parameters", "", "None."]
    lines = ["## Parameters", "", "| parameter | default | domain | meaning |", "|---|---|---|---|"]
    for parameter in known["parameters"]:
        cells = (str(parameter["default"]), parameter["domain"] or "not searched", parameter["description"])
        lines.append(f"| `{parameter['name']}` | {' | '.join(cell(text) for text in cells)} |")
    return lines


def _published(name: str) -> list[str]:
    found = settings_of(name)
    if not found:
        return []
    lines = [
        "",
        "## Published settings",
        "",
        "The first trials of a search on such a pair. Published results were selected on test sets.",
        "",
        "| data set | teachers | students | settings | source |",
        "|---|---|---|---|---|",
    ]
    return lines + [_setting(setting) for setting in found]


def _setting(setting: PublishedSetting) -> str:
    values = dict(setting.values)
    if setting.task_weight is not None:
        values["training.task_weight"] = setting.task_weight
    text = ", ".join(f"{key} {value}" for key, value in values.items()) or "defaults"
    source = setting.source if setting.reading is None else f"{setting.source}; read: {setting.reading}"
    source += "" if setting.top1 is None else f"; top-1 {setting.top1}"
    networks = [", ".join(names) or "any" for names in (setting.teachers, setting.students)]
    return f"| {' | '.join(cell(each) for each in (setting.dataset, *networks, text, source))} |"


def _verification(known: Verification | None) -> list[str]:
    if known is None:
        return []
    lines = ["", "## Compared with", ""]
    if known.program:
        url = f"https://github.com/{known.program}/tree/{known.commit}"
        lines += [
            f"The authors' function in {prose(known.file)} of [{prose(known.program)}]({url}), commit {known.commit},",
            "ran in float64 on the same random inputs (`tests/methods/test_golden_authors.py`). Largest relative "
            f"difference: {known.value:.0e} of the loss, {known.gradient:.0e} of its gradient.",
        ]
    else:
        lines.append("No program could be run; the equation is computed a second time, independently, in its tests.")
    if known.open_readings:
        lines += ["", f"Not covered, or read: {prose(known.open_readings)}."]
    return [*lines, "", f"Source of the defaults: {prose(known.defaults)}."]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("*.md"):
        file.unlink()
    for method, text in pages().items():
        (FOLDER / f"{method}.md").write_text(text, encoding="utf-8")
