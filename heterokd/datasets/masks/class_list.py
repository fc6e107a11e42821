"""Class lists in files: names, with numbers or colours, as annotation programs write them.

cell                                                      names in the order of their numbers
0 background       0: background       background,0       with numbers (Roboflow's _classes.csv)
background:0,0,0::       car,64,0,128       64 0 128 car       #400080 car
                                                          with colours (CVAT, CamVid, DeepGlobe)
["background", "car"]    {"car": 3}    {"3": "car"}       JSON or YAML
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from heterokd.datasets.masks.settings import MaskClass, MaskSettings
from heterokd.errors import DataError

NAMES = (
    *("classes.txt", "class_names.txt", "labels.txt", "labelmap.txt", "label_colors.txt", "_classes.csv"),
    *("classes.csv", "class_dict.csv", "labels.csv", "classes.json", "classes.yaml", "classes.yml"),
)
"""File names that are class lists."""

COLOUR = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
# A line's forms, by the name of what follows from it; the first that fits decides.
FORMS = {
    "colour": (
        re.compile(rf"(?P<name>[^:]+):{COLOUR}(?::.*)?"),
        re.compile(rf"{COLOUR}[\s,;:]+(?P<name>\D.*)"),
        re.compile(rf"(?P<name>.*?\D)[\s,;:]+{COLOUR}"),
        re.compile(r"(?P<hex>#[0-9a-fA-F]{6})[\s,;:]+(?P<name>.+)"),
        re.compile(r"(?P<name>.+?)[\s,;:]+(?P<hex>#[0-9a-fA-F]{6})"),
    ),
    "number": (
        re.compile(r"(?P<number>\d+)[\s,;:]+(?P<name>.+)"),
        re.compile(r"(?P<name>.+?)\s*[,;:\t]\s*(?P<number>\d+)"),
    ),
    "name": (re.compile(r"(?P<name>.+)"),),
}
HEADER = re.compile(r"\W*(pixel value|name|class|label|id|index|value|r)\W.*\b(name|class|label|g|b|value|id)\W*", re.I)


def read_class_list(path: Path) -> tuple[MaskClass, ...]:
    """Read a class list.

    Raises:
        DataError: the file is missing, no text, or its lines have several forms.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError:
        raise DataError(f"data.masks.classes: there is no file {path}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text file; write a class per line") from None
    try:
        structured = path.suffix.lower() in (".json", ".yaml", ".yml")
        found = _structured(path, text) if structured else _lines(path, text.splitlines())
        classes = MaskSettings.model_validate({"classes": found}).classes
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"{path}: is no class list ({reason}); write a class per line") from None
    assert isinstance(classes, tuple)
    if not classes:
        raise DataError(f"{path}: lists no classes; write a class per line")
    return classes


def _structured(path: Path, text: str) -> object:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"{path}: is neither JSON nor YAML; write a list of names") from None
    if isinstance(content, Mapping) and all(re.fullmatch(r"\d+", str(key)) for key in content):
        return [{"name": str(name), "values": int(number)} for number, name in content.items()]
    if not isinstance(content, list | Mapping):
        raise DataError(f"{path}: holds no list of names; write [background, cell] or {{background: 0, cell: 1}}")
    return content


def _lines(path: Path, lines: list[str]) -> list[MaskClass]:
    found: dict[str, list[MaskClass]] = {}
    for number, line in enumerate(lines):
        line = line.strip().strip(",;").strip()
        if not line or (line.startswith("#") and not re.match(r"#[0-9a-fA-F]{6}\b", line)):
            continue
        if not found and HEADER.fullmatch(line) and not re.search(r"\d", line):
            continue
        form, entry = _parsed(line)
        found.setdefault(form, []).append(entry)
        if len(found) > 1:
            first = next(iter(found))
            raise DataError(f"{path}: line {number + 1} is a {form} ({line[:40]!r}), the lines before are {first}s")
    return next(iter(found.values()), [])


def _parsed(line: str) -> tuple[str, MaskClass]:
    for form, patterns in FORMS.items():
        for pattern in patterns:
            match = pattern.fullmatch(line)
            if match is None:
                continue
            name = match["name"].strip().strip("\"'")
            if form == "number":
                return form, MaskClass(name=name, values=(int(match["number"]),))
            if form == "name":
                return form, MaskClass(name=name)
            colour = match.groupdict().get("hex") or ",".join(g for g in match.groups() if g and g.isdigit())
            return form, MaskClass(name=name, values=(colour,))
    raise AssertionError(line)  # the last form matches every line
