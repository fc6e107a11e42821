"""Names of classes in figures: any alphabet that a font of this machine has, and no formulas."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

FAMILY = "DejaVu Sans"
"""The font of all figures; it comes with matplotlib."""

# Fonts with Chinese, Japanese and Korean characters, as systems ship them; they draw what `FAMILY` lacks.
OTHER_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """Return the fonts of figures that are installed here, in the order in which they are tried."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return (FAMILY, *(name for name in OTHER_FAMILIES if name in installed))


def shortened(name: str, length: int) -> str:
    """Cut a name to at most `length` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def class_label(name: str, number: int, length: int, *, by_browser: bool = False) -> str:
    """Return a class's name as matplotlib draws it; `class 3` for the fourth class if no font has its characters.

    Args:
        name: name of the class.
        number: its number.
        length: maximum number of characters.
        by_browser: whether the text stays text, in an SVG: a browser has fonts for every script.
    """
    short = shortened(" ".join(name.split()), length)
    if by_browser:
        short = "".join(character for character in short if character.isprintable())
        # A place for the wider characters of the browser's fonts; SVG ignores blanks at the beginning.
        short = " " * sum(2 * (not _is_drawn(character)) for character in short) + short
    if not short or not (by_browser or all(_is_drawn(character) for character in short)):
        return f"class {number}"
    plain = short.replace("$", r"\$")  # two dollars would be a formula
    return f" {plain}" if plain.startswith("_") else plain  # legends hide labels that start with `_`


def numbered_classes(class_names: Sequence[str], most: int = 50) -> str:
    """Return the legend of a picture's `class 3`: the names that no font of this machine has, at most `most`; or ""."""
    labels = ((number, name, class_label(name, number, 20)) for number, name in enumerate(class_names))
    found = [f"{label}: {name}" for number, name, label in labels if label == f"class {number}" != name]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f" ({', '.join(found[:most])}{more})" if found else ""


@lru_cache(maxsize=4096)
def _is_drawn(character: str) -> bool:
    """Whether matplotlib draws a character with the fonts of this machine."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family=family))) for family in families())
    if unicodedata.bidirectional(character) in ("R", "AL"):
        return False  # matplotlib does not join letters, and writes them from left to right
    return character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)
