"""A page for each method says what its file says, with a typeset equation."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from heterokd.cli.catalogue import describe
from heterokd.methods import BASELINE, METHODS
from heterokd.study.published import settings_of

DOCS = Path(__file__).parents[1] / "docs"
TAGS = re.compile(r"</?(?:i|sub|sup|code|td|tr|table)(?: class=\"equation\")?>")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    found: dict[str, str] = runpy.run_path(str(DOCS / "method_pages.py"))["pages"]()
    return found


@pytest.fixture(scope="module")
def equations() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "equations.py"))


def test_the_pages_are_current(pages: dict[str, str]) -> None:
    assert {file.stem for file in (DOCS / "methods").glob("*.md")} == set(pages)
    for name, text in pages.items():
        assert (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8") == text, "run: make docs"


@pytest.mark.parametrize("method", METHODS)
def test_a_page_has_everything(pages: dict[str, str], method: str) -> None:
    page, known = pages[method], describe(method)
    parameters = page.split("\n## Parameters\n")[1].split("\n## ")[0]
    for parameter in known["parameters"]:
        (row,) = [line for line in parameters.splitlines() if line.startswith(f"| `{parameter['name']}` |")]
        assert f"| {parameter['default']} |".replace("_", "\\_") in row
        assert row.replace("\\|", "").count("|") == 5, "a table of four columns"
    if method != BASELINE:
        assert re.search(r"<https?://\S+>", page), "its paper"
        assert '<table class="equation">' in page
        assert "\n## Compared with\n" in page
    assert ("\n## Published settings\n" in page) == bool(settings_of(method))
    for setting in settings_of(method):
        assert all(f"{name} {value}".replace("_", "\\_") in page for name, value in setting.values.items())


@pytest.mark.parametrize("method", METHODS)
def test_equations_are_whole_and_well_formed(pages: dict[str, str], equations: dict[str, Any], method: str) -> None:
    """No word of the file is lost, and every tag is closed."""
    block = "\n".join(re.findall(r'<table class="equation">.*?</table>', pages[method], re.DOTALL))
    for tag in ("i", "sub", "sup", "code", "td", "tr", "table"):
        assert len(re.findall(rf"<{tag}\b", block)) == block.count(f"</{tag}>")
    assert not re.search(r"<(?!/?(?:i|sub|sup|code|td|tr|table)\b)", block), "a bare <"
    shown = TAGS.sub("", block)
    text = "\n".join(part for part in re.split(r"\n\s*\n", describe(method)["text"]) if part.startswith("    "))
    for word in re.findall(r"(?<![\w'])[a-z]{5,}(?![\w'])", text):
        assert word in shown or {word, word.removeprefix("d")} & set(equations["GREEK"]), word
    assert not re.search(r"[_^]\{|\|\|", shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tau^2 * KL(p || q)", "<i>τ</i><sup>2</sup> · KL(<i>p</i> ∥ <i>q</i>)"),
        ("sum_{i<j} w_ij", "∑<sub><i>i</i>&lt;<i>j</i></sub> <i>w</i><sub><i>ij</i></sub>"),
        ("kd_weight * non_target", "<code>kd_weight</code> · <i>non_target</i>"),
        ("L_path_kl - fhat'", "<i>L</i><sub>path kl</sub> − <i>f\u0302</i>′"),
        ("the image's map, a map", "the image’s map, a map"),
        ("a x_i + 1x1", "<i>a</i> <i>x</i><sub><i>i</i></sub> + 1×1"),
        ("p_t,y, x -> y", "<i>p</i><sub><i>t</i>,<i>y</i></sub>, <i>x</i> → <i>y</i>"),
    ],
)
def test_notation(equations: dict[str, Any], text: str, shown: str) -> None:
    assert equations["typeset"](text, ("kd_weight",)) == shown


def test_rows_of_an_equation(equations: dict[str, Any]) -> None:
    lines = [
        "L = a                          a note,    Eq. 1",
        "                                   and its end",
        "  + b",
        "code form     L = c",
    ]
    table = equations["equation_table"](lines)
    assert [re.sub("</?i>", "", row) for row in table] == [
        '<table class="equation">',
        "<tr><td>L = a + b</td><td>a note, and its end</td><td>Eq. 1</td></tr>",
        "<tr><td>code form L = c</td><td></td><td></td></tr>",
        "</table>",
    ]
