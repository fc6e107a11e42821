"""docs/methods.md lists every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterokd.cli.catalogue import describe_all, method_page, prose
from heterokd.methods import BASELINE, METHODS

FILE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture(scope="module")
def page() -> str:
    return method_page()


def test_the_page_is_current(page: str) -> None:
    assert FILE.read_text(encoding="utf-8") == page, "run: make docs"


def test_stars_and_bars_stay_what_they_are() -> None:
    assert prose("a * b_c | d, `x_y`, https://arxiv.org/abs/1_2") == (
        "a \\* b\\_c \\| d, `x_y`, https://arxiv.org/abs/1_2"
    )


def test_what_a_cache_can_serve() -> None:
    cacheable = {row["name"]: row["cacheable"] for row in describe_all()}
    assert cacheable["kd"]
    assert cacheable["rsd"], "embeddings are stored too"
    assert not cacheable["fbt"], "reads maps of a CNN teacher"
    assert all("maps" not in row["teacher_needs"] for row in describe_all() if row["cacheable"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != BASELINE])
def test_what_a_method_was_compared_with_is_in_the_page(page: str, method: str) -> None:
    known = METHODS[method].verification
    assert known is not None
    assert known.defaults
    assert bool(known.program) == bool(known.commit) == bool(known.file) == (known.value is not None)
    assert known.program or known.open_readings, "why it was compared with no program"
    table = page.split("\n## Compared with the authors' programs\n")[1].split("\n## ")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| [`{method}`]")]
    assert known.commit in row
