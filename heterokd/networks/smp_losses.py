"""Losses of segmentation_models_pytorch by name."""

from __future__ import annotations

from torch import nn

from heterokd.outputs import IGNORE


def smp_loss(name: str) -> nn.Module:
    """Return `dice`, `focal` or `lovasz` of logits [B, K, H, W] and label maps [B, H, W]; `IGNORE` counts nowhere."""
    from segmentation_models_pytorch import losses  # lazily: most trainings have no such loss

    kinds = {"dice": losses.DiceLoss, "focal": losses.FocalLoss, "lovasz": losses.LovaszLoss}
    module: nn.Module = kinds[name]("multiclass", ignore_index=IGNORE)
    return module
