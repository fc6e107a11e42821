"""Folders that timm opens alone: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads their config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import model_entrypoint
from torch import nn

from heterokd.networks.network import AnyNetwork, Network

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
"""timm's own names of the two files."""


def timm_config(network: AnyNetwork, class_names: Sequence[str]) -> dict[str, Any] | None:
    """What config.json says of a network, in timm's format; None for one that is not in timm's list."""
    if not isinstance(network, Network):
        return None
    architecture = network.name.partition(".")[0]
    if not model_entrypoint(architecture).__module__.startswith("timm."):
        return None  # of `heterokd.networks.architectures`: in the list of this process alone
    known, side = network.body.pretrained_cfg, network.spec.image_size
    config = {
        "input_size": [3, side, side],
        "fixed_input_size": bool(known.get("fixed_input_size", False)),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "num_classes": network.spec.num_classes,
        "classifier": known.get("classifier"),
        "first_conv": known.get("first_conv"),
    }
    return {
        "architecture": architecture,
        "num_classes": network.spec.num_classes,
        "num_features": network.spec.embedding_dim,
        "model_args": dict(network.split.arguments),
        "pretrained_cfg": config,
        "label_names": list(class_names),
    }


def open_timm_folder(folder: Path) -> nn.Module:
    """The network of such a folder, as timm alone opens it, in evaluation mode.

    Raises:
        Exception: whatever timm says of a folder that it cannot open.
    """
    network: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    return network.eval()
