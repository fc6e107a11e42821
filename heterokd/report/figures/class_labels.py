"""Names of classes in figures: any alphabet that a font of this machine has, and no formulas."""

from __future__ import annotations

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


def class_label(name: str, number: int, length: int) -> str:
    """Return a class's name as matplotlib draws it; `class 3` for the fourth class if no font has its characters.

    Args:
        name: name of the class.
        number: its number.
        length: maximum number of characters.
    """
    short = shortened(" ".join(name.split()), length)
    if not all(_is_drawn(character) for character in short):
        return f"class {number}"
    plain = short.replace("$", r"\$")  # two dollars would be a formula
    return f" {plain}" if plain.startswith("_") else plain  # legends hide labels that start with `_`


@lru_cache(maxsize=4096)
def _is_drawn(character: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family=family))) for family in families())
    return character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)
