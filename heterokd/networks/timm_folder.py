"""Folders for `timm.create_model("local-dir:FOLDER", pretrained=True)`, which reads their config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import timm
from timm.models import model_entrypoint
from torch import nn

from heterokd.networks.bodies import timm_name
from heterokd.networks.body_types import TimmBody
from heterokd.networks.classifier import Network
from heterokd.networks.modules import is_built_elsewhere
from heterokd.networks.network import AnyNetwork
from heterokd.networks.tapped import TappedNetwork

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
"""timm's names of the two files."""


def timm_config(network: AnyNetwork, class_names: Sequence[str]) -> dict[str, object] | None:
    """Return the content of a network's config.json, in timm's format; None if timm does not know the network."""
    if not isinstance(network, Network | TappedNetwork):
        return None
    if is_built_elsewhere(network.name, network.options):
        return None
    architecture = timm_name(network.name).partition(".")[0]
    if not model_entrypoint(architecture).__module__.startswith("timm."):
        return None  # from `heterokd.networks.architectures`, which only this package registers
    known, side = cast(TimmBody, network.body).pretrained_cfg, network.spec.image_size
    config = {
        "input_size": [network.mean.shape[1], side, side],
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
    """Open a folder with timm only; the network is in evaluation mode.

    Raises:
        Exception: any error of timm.
    """
    network: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    return network.eval()
