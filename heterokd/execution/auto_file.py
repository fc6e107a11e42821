"""The YAML file of `heterokd auto`: its sections with a comment each, and the reasons above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from heterokd.storage.files import write_text

COMMENTS = {
    "data": "where the images lie and how they are read",
    "teacher": "network and weights; or start_from: FILE, pretrained: true, fit: auto | head | head_then_all | all",
    "student": "a name, or a list from which the search chooses; timm, torchvision:NAME, ./nets.py:make_student",
    "training": "of each trial; keys that are searched are in search.space.shared",
    "search": "methods and domains; trials or budget: {hours, gpu_hours, trainings, money}; combine: 2 adds pairs",
    "promotion": "limits that `heterokd promote` checks; also min_gain, min_recall",
}
"""A line above each section of the file, as a start for changes."""

Section = dict[str, object]
"""Part of the experiment's YAML."""


def write_experiment(target: Path, content: Mapping[str, object], reasons: Sequence[str]) -> None:
    """Write an experiment with the reasons as comments; empty sections are left out."""
    lines = [f"Written by heterokd; run it with `heterokd search {target.name}`.", *reasons]
    text = "".join(f"# {line}\n" for line in lines)
    for key, value in content.items():
        if value != {}:
            comment = f"\n# {COMMENTS[key]}\n" if key in COMMENTS else "\n"
            text += comment + yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=110)
    write_text(target, text)
