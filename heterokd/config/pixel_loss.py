"""The key `training.pixel_loss`: a sum of losses over pixels, such as `ohem+0.5*dice`."""

from __future__ import annotations

from heterokd.errors import did_you_mean

PIXEL_LOSSES = ("cross_entropy", "ohem", "dice", "focal", "lovasz")
"""Losses of label maps, see `heterokd/training/pixel_losses.py`."""


def read_pixel_loss(text: str) -> dict[str, float]:
    """Return the factor of each loss.

    Raises:
        ValueError: an unknown loss, a factor that is no positive number, or a loss that is named twice.
    """
    factors: dict[str, float] = {}
    for term in text.split("+"):
        factor, star, name = (part.strip() for part in term.rpartition("*"))
        if name not in PIXEL_LOSSES:
            raise ValueError(f"there is no loss {name!r}; {did_you_mean(name, PIXEL_LOSSES)}")
        try:
            value = float(factor) if star else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise ValueError(f"{term.strip()!r}: expected NUMBER*{name} with a positive number")
        if name in factors:
            raise ValueError(f"{name!r} is named twice; name it once, with a factor")
        factors[name] = value
    return factors
