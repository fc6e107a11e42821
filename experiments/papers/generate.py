"""Write the experiments of the papers' tables to this folder, a file for each pair of data set, teacher and student.

    python experiments/papers/generate.py

The numbers come from heterokd/published/; `classification.py` and `segmentation.py` contain the schedules.
"""

from __future__ import annotations

from pathlib import Path

import classification
import segmentation

FOLDER = Path(__file__).parent


def files() -> dict[str, str]:
    """Return the text of every file by its path in this folder."""
    return classification.files() | segmentation.files()


def main() -> None:
    """Write all files, and remove files that no longer belong to a pair."""
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
