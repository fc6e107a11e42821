"""Names that MLflow, its databases and model URIs accept."""

from __future__ import annotations

import re
import unicodedata

LONGEST_NAME = 250
"""Maximum length of a name in characters; MLflow's columns hold 256."""

LONGEST_ALIAS = 100
"""Maximum length of an alias, so that the names of tags that contain it stay below MLflow's 250 characters."""

_IN_URIS = "/:@?#%&'\"`\\"
"""Characters that end or quote a name in `models:/NAME@ALIAS`, in the address of a page, or in a filter of MLflow."""


def text_fault(name: str) -> str | None:
    """Return why a text cannot be a name; None if it can."""
    if not name or name != name.strip():
        return "expected a name without blanks at its ends"
    if len(name) > LONGEST_NAME:
        return f"expected at most {LONGEST_NAME} characters"
    if unprintable(name):
        return "expected a name without control characters"
    return None


def model_name_fault(name: str) -> str | None:
    """Return why a registered model cannot have a name; None if it can."""
    if name in (".", "..") or set(name) & set(_IN_URIS):
        return f"expected a name without {' '.join(_IN_URIS)} that is not '.' or '..'"
    return text_fault(name)


def alias_fault(alias: str) -> str | None:
    """Return why a version of a model cannot have an alias; None if it can."""
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_ALIAS}}}", alias):
        return f"expected at most {LONGEST_ALIAS} letters, digits, '_' or '-'"
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        return "expected another name than latest and v1, v2, ..., which MLflow reserves"
    return None


def unprintable(text: str) -> bool:
    """Whether a text holds line breaks, other control characters, or bytes that are not UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)
