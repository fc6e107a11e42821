"""Sections of an experiment that may be files of their own: the search space, and a table of measured costs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from heterokd.config.costs import COSTS
from heterokd.config.sentences import SPACE, Source
from heterokd.config.yaml_files import read_yaml
from heterokd.errors import ConfigError, did_you_mean

STUDENT_COLUMN = "student"


def inline_files(content: Mapping[str, object], file: Path, source: Source) -> dict[str, str]:
    """Replace the paths of a search space and of a table of costs by the content of these files.

    Args:
        content: of an experiment's file, which is changed.
        file: that file.
        source: of its keys.

    Returns:
        Paths of the files, by key.
    """
    search, found = content.get("search"), dict[str, str]()
    if not isinstance(search, dict):
        return found
    for key in (SPACE, COSTS):
        section = key.partition(".")[2]
        name = search.get(section)
        if not isinstance(name, str):
            continue
        place = _existing(name, key, file, source)
        search[section] = read_costs(place) if key == COSTS and place.suffix == ".csv" else read_yaml(place)
        found[key] = str(place)
    return found


def _existing(name: str, key: str, file: Path, source: Source) -> Path:
    # As written, then in the experiment's folder, then in the folder above: `search_spaces/x.yaml` works from anywhere.
    places = [Path(name), *(folder / name for folder in file.resolve().parents[:2])]
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return found
    pattern = "*.csv" if name.endswith(".csv") else "*.y*ml"
    near = {path.name for place in places if place.parent.is_dir() for path in place.parent.glob(pattern)}
    near -= {file.name}
    hint = did_you_mean(Path(name).name, near) if near else "check the path"
    raise ConfigError(
        f"{source.place(key)}: there is no file {name!r} in the current folder, next to {file} or in the folder above; "
        f"{hint}"
    )


def read_costs(file: Path) -> dict[str, dict[str, object]]:
    """Read a CSV file with a column `student`, and a column for each cost; empty cells are left out.

    Raises:
        ConfigError: no such columns, or unreadable.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: cannot be read as CSV ({error}); give a CSV file in UTF-8") from None
    if not rows or STUDENT_COLUMN not in rows[0]:
        raise ConfigError(
            f"{file}: has no rows with a column {STUDENT_COLUMN!r}; begin it with `student,student/latency_ms`"
        )
    found: dict[str, dict[str, object]] = {}
    for row in rows:
        student = row[STUDENT_COLUMN]
        if None in row:
            raise ConfigError(f"{file}: the row of {student} has more cells than the first row; quote commas")
        for key, cell in row.items():
            if key == STUDENT_COLUMN or not cell:
                continue
            values = found.setdefault(key, {})
            if student in values:
                raise ConfigError(f"{file}: {key}: names {student} twice; remove a row")
            values[student] = cell
            with suppress(ValueError):  # otherwise the check of the experiment says that it is no number
                values[student] = float(cell)
    return found
