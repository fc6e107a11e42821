"""The section `data.masks`: classes of label maps and how the images are split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_VALUE = 2**16 - 1
"""Largest number in a label map of 16 bits."""

Number = Annotated[int, Field(ge=0, le=LARGEST_VALUE)]
Value = Number | str
"""Number of a class in label maps, or its colour: "#rrggbb" or "r,g,b"."""

Share = Annotated[float, Field(gt=0, le=0.9)]


class MaskClass(BaseModel):
    """A class of label maps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="name of the class")
    values: tuple[Value, ...] = Field(
        (), description="its numbers or colours; default: its position in the list, counted from the data set's first"
    )

    @field_validator("values", mode="before")
    @classmethod
    def _several(cls, values: object) -> object:
        return (values,) if isinstance(values, int | str) else values

    @field_validator("values")
    @classmethod
    def _colours_are_valid(cls, values: tuple[Value, ...]) -> tuple[Value, ...]:
        for value in values:
            if isinstance(value, str):
                colour_code(value)
        return values


class MaskSettings(BaseModel):
    """Classes of label maps, and how images without split folders are split."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    classes: str | tuple[MaskClass, ...] | None = Field(
        None,
        description="names in the order of their numbers; or for each name its number, its colour, or several; or a "
        "file below data.root. Default: the data set's; for mask_folder a class list in data.root, or the values found",
    )
    ignore: tuple[Value, ...] | None = Field(
        None, description="numbers or colours of ignored pixels; default: 255 unless it is a class"
    )
    merge: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="for each new class the names of the classes that it replaces"
    )
    drop: tuple[str, ...] = Field((), description="names of classes whose pixels are ignored")
    val_share: Share | None = Field(
        None, description="share of the images that becomes val, if val is no folder or list; default: the data set's"
    )
    test_share: Share | None = Field(None, description="mask_folder: the same of test")
    lists: dict[Literal["train", "val", "test"], str] = Field(
        default_factory=dict,
        description="mask_folder: for each split a text file below data.root with the name of an image per line",
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("classes", mode="before")
    @classmethod
    def _listed(cls, content: object) -> object:
        if isinstance(content, Mapping):
            return [{"name": name, "values": values} for name, values in content.items()]
        if isinstance(content, Iterable) and not isinstance(content, str):
            return [{"name": entry} if isinstance(entry, str) else entry for entry in content]
        return content

    @field_validator("ignore", mode="before")
    @classmethod
    def _several(cls, values: object) -> object:
        return (values,) if isinstance(values, int | str) else values

    @model_validator(mode="after")
    def _names_are_unique(self) -> MaskSettings:
        names = [entry.name for entry in self.classes] if isinstance(self.classes, tuple) else []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"classes: {twice[0]!r} is listed twice; give one entry with all its values")
        for value in self.ignore or ():
            if isinstance(value, str):
                colour_code(value)
        return self


def colour_code(text: str) -> int:
    """Return a colour, "#rrggbb" or "r,g,b", as red * 65536 + green * 256 + blue.

    Raises:
        ValueError: the text is not a colour.
    """
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:], 16)
    parts = text.split(",")
    if len(parts) == 3 and all(re.fullmatch(r"\s*\d{1,3}\s*", part) for part in parts):
        red, green, blue = (int(part) for part in parts)
        if max(red, green, blue) < 256:
            return red << 16 | green << 8 | blue
    raise ValueError(f"{text!r} is no colour; write '#rrggbb' or 'r,g,b' with numbers from 0 to 255")


def colour_name(code: int) -> str:
    """Return a colour as "#rrggbb"."""
    return f"#{code:06x}"
