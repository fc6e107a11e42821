"""Writes the experiments of the papers' tables beside itself, one for each pair of data set, teacher and student.

    python experiments/papers/generate.py

The numbers come from heterokd/published/; `classification.py` and `segmentation.py` know the schedules.
"""

from __future__ import annotations

from pathlib import Path

import classification
import segmentation

FOLDER = Path(__file__).parent


def files() -> dict[str, str]:
    """Every file by its path in this folder, with its text."""
    return classification.files() | segmentation.files()


def main() -> None:
    """Write what has changed, and remove what belongs to no pair any more."""
    found = files()
    for path in [*FOLDER.glob("*.yaml"), *FOLDER.glob("teachers/*.yaml")]:
        if path.relative_to(FOLDER).as_posix() not in found:
            path.unlink()
    for place, text in found.items():
        (FOLDER / place).parent.mkdir(exist_ok=True)
        (FOLDER / place).write_text(text, encoding="utf-8")
    print(f"{len(found)} files in {FOLDER}")


if __name__ == "__main__":
    main()
