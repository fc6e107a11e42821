"""Options that describe networks which answer together, see `combined`; read without torch.

{"ensemble": [{"network": NAME, "options": {...}}, ...], "average": "probabilities"}
{..., "cross_fit": {"folds": 5, "seed": 0, "features": false}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

ENSEMBLE, AVERAGE, CROSS_FIT = "ensemble", "average", "cross_fit"
PROBABILITIES = "probabilities"

NamedNetwork = tuple[str, dict[str, object]]
"""Name of a network, and its options."""


def member_networks(name: str, options: Mapping[str, object]) -> list[NamedNetwork]:
    """Return the networks that a combined network consists of; empty if the options describe a single network."""
    if ENSEMBLE in options:
        members = cast(Sequence[Mapping[str, object]], options[ENSEMBLE])
        return [(str(member["network"]), dict(cast(Mapping[str, object], member["options"]))) for member in members]
    if CROSS_FIT in options:
        plain = {key: value for key, value in options.items() if key != CROSS_FIT}
        return [(name, plain)] * int(str(fold_options(options)["folds"]))
    return []


def fold_options(options: Mapping[str, object]) -> Mapping[str, object]:
    """Return the number of folds, their seed, and whether all folds have the same features."""
    return cast(Mapping[str, object], options[CROSS_FIT])
