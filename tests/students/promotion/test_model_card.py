"""A model card shows names of any kind as text."""

from __future__ import annotations

import html
import re

import fabricated
import markdown
import pytest

from heterokd.students.promotion.model_card import Lineage, _fenced, _origins, escaped

NAMES = (
    "<img src=x onerror=alert(1)>",
    "</p><script>alert(1)</script>",
    "[a](javascript:alert(1))",
    "![a](http://host/x.png)",
    "`code` and ``more``",
    "a | b",
    "*a* **b** _c_ __d__ ~~e~~",
    "$\\frac{a}{b}$",
    "a & b &lt; c",
    "back\\slash \\<b>",
    "two_words_in_one",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    shown = markdown.markdown(f"Classes: {escaped(name)}, and others.", extensions=["tables"])
    assert re.findall(r"<[^>]*>", shown) == ["<p>", "</p>"]
    text = html.unescape(shown).removeprefix("<p>").removesuffix("</p>")
    # CommonMark's escapes that this library does not know.
    assert re.sub(r"\\([~$|])", r"\1", text) == f"Classes: {name}, and others."


def test_a_name_is_a_single_line() -> None:
    assert escaped("a\n\n## Limits\r\x00b") == "a  ## Limits  b"


@pytest.mark.parametrize("text", ["a: b\n", "a: '```'\n", "x````\n"])
def test_a_code_block_ends_at_its_end(text: str) -> None:
    first, *inside, last = _fenced(text, "yaml").splitlines()
    assert first == f"{last}yaml"
    assert last not in "\n".join(inside)


def test_a_teacher_of_several_networks_is_described() -> None:
    """Which networks answer, what was kept, and how sure the answers are on train and on val."""
    measured = {"temperature": 1.5, "train_confidence": 0.61, "val_confidence": 0.6, "reason": "the mean of 2"}
    card = fabricated.card("ensemble(a, b)", members=("a 0.8000", "b 0.7000"), **measured)
    teacher = {"ensemble": ["test_resnet", "test_vit"]}
    recipe = fabricated.experiment(teacher=teacher).recipe({"method": "kd"})
    lines = _origins(recipe, Lineage(card, None, "", None, "")).splitlines()
    assert lines[2].startswith("- teacher: ensemble(test_resnet, test_vit), the networks in its name")
    assert lines[3] == (
        "- the teacher: the mean of 2; mean confidence 0.610 on training images and 0.600 on val, where temperature "
        "1.50 calibrates it; members on val: a 0.8000, b 0.7000"
    )
    without = _origins(recipe.model_copy(update={"method": "scratch", "params": {}}), Lineage(card, None, "", None, ""))
    assert "members" not in without
