"""The teachers: one fit each, on every training image, and what they say of the students' views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.search_efficiency.digits import Digits, augment
from benchmarks.search_efficiency.methods import Shown
from benchmarks.search_efficiency.networks import Network, Weights

EPOCHS = 60
BATCH = 64
LEARNING_RATE = 3e-3


def fit(network: Network, digits: Digits, seed: int = 0, epochs: int = EPOCHS) -> Weights:
    """A teacher's weights: AdamW with a cosine, fresh views of all training images in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value.requires_grad_() for name, value in network.init(generator).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.05)
    count = len(digits.teacher_labels)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // BATCH))
    levels_NHW = digits.teacher_levels
    for _ in range(epochs):
        for index in torch.randperm(count, generator=generator).split(BATCH):
            images = augment(levels_NHW[index], generator)
            loss = F.cross_entropy(
                network.outputs(weights, images)[1], digits.teacher_labels[index], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: value.detach() for name, value in weights.items()}


@torch.no_grad()
def show(network: Network, weights: Weights, digits: Digits) -> Shown:
    """What it says of every view."""
    views = [network.outputs(weights, images) for images in digits.views]
    maps = tuple(torch.stack([view[0][stage] for view in views]) for stage in range(4))
    logits, embedding = (torch.stack([view[place] for view in views]) for place in (1, 2))
    return Shown(logits, embedding, maps, weights)


@torch.no_grad()
def score(network: Network, weights: Weights, images_NX: Tensor, labels_N: Tensor) -> float:
    """Share of right answers."""
    return float((network.outputs(weights, images_NX)[1].argmax(1) == labels_N).float().mean())
