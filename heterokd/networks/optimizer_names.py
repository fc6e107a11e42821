"""Names of timm's optimizers."""

from __future__ import annotations

from functools import lru_cache

import timm.optim as timm_optim


@lru_cache(maxsize=1)
def optimizer_names() -> tuple[str, ...]:
    """Names that `training.optimizer` may have."""
    return tuple(str(name) for name in timm_optim.list_optimizers())  # type: ignore[attr-defined]
