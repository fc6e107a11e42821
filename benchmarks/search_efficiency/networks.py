"""Tiny networks as functions of their weights, so that many students are one product of matrices.

A network has four stages. `stage` takes the map that the stage before gave, [B, C, P] with P = side x side positions
(the image, [B, 64], for stage 1), and `head` the last one's. Weights are a flat dict; nothing here knows how many
students there are: `torch.func.vmap` adds that dimension.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.search_efficiency.digits import CLASSES, SIDE

Weights = dict[str, Tensor]
PIXELS = SIDE * SIDE


@dataclass(frozen=True)
class Network(ABC):
    """Four stages and a head.

    Attributes:
        channels: of each stage's map.
        sides: height = width of each stage's map.
    """

    channels: tuple[int, int, int, int]
    sides: tuple[int, int, int, int]
    kind: Literal["cnn", "attention", "mlp"]

    @property
    def embedding_dim(self) -> int:
        """What enters the classifier."""
        return self.channels[3]

    def size(self, stage: int) -> int:
        """Numbers in the map of a stage, 1 to 4."""
        return self.channels[stage - 1] * self.sides[stage - 1] ** 2

    def init(self, generator: torch.Generator) -> Weights:
        """Fresh weights."""
        weights: Weights = {}
        for stage in range(1, 5):
            weights |= {f"{stage}.{name}": value for name, value in self.init_stage(stage, generator).items()}
        return weights | linear_init("head", self.embedding_dim, CLASSES, generator)

    @abstractmethod
    def init_stage(self, stage: int, generator: torch.Generator) -> Weights:
        """Fresh weights of one stage."""

    @abstractmethod
    def stage(self, weights: Weights, stage: int, x: Tensor) -> Tensor:
        """The map of a stage, [B, C, P], from the one before."""

    def head(self, weights: Weights, map_BCP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and embedding [B, D] from the last map."""
        embedding = map_BCP.mean(2)
        return linear(weights, "head", embedding), embedding

    def tail(self, weights: Weights, map_BCP: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Logits and embedding from the map that enters stage `first`; 5 is the head alone."""
        for stage in range(first, 5):
            map_BCP = self.stage(weights, stage, map_BCP)
        return self.head(weights, map_BCP)

    def outputs(self, weights: Weights, images_BX: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The four maps, logits and embedding."""
        maps, x = [], images_BX
        for stage in range(1, 5):
            x = self.stage(weights, stage, x)
            maps.append(x)
        return maps, *self.head(weights, x)


class MLP(Network):
    """Fully connected layers; those after the first add to what comes in."""

    def init_stage(self, stage: int, generator: torch.Generator) -> Weights:
        inputs = PIXELS if stage == 1 else self.channels[stage - 2]
        return linear_init("fc", inputs, self.channels[stage - 1], generator)

    def stage(self, weights: Weights, stage: int, x: Tensor) -> Tensor:
        if stage == 1:
            return F.relu(linear(weights, "1.fc", x)).unsqueeze(2)
        return x + F.relu(linear(weights, f"{stage}.fc", x.squeeze(2))).unsqueeze(2)


class CNN(Network):
    """3x3 convolutions with ReLU; a stage whose map is smaller than the one before has a stride."""

    def _ends(self, stage: int) -> tuple[int, int, int]:
        """Channels and side that come in, and the stride."""
        channels, side = (1, SIDE) if stage == 1 else (self.channels[stage - 2], self.sides[stage - 2])
        return channels, side, side // self.sides[stage - 1]

    def init_stage(self, stage: int, generator: torch.Generator) -> Weights:
        channels, _, _ = self._ends(stage)
        kernel = torch.randn(self.channels[stage - 1], channels, 9, generator=generator) * math.sqrt(2 / (9 * channels))
        return {"kernel": kernel, "bias": torch.zeros(self.channels[stage - 1])}

    def stage(self, weights: Weights, stage: int, x: Tensor) -> Tensor:
        # Maps are so small that a convolution is fastest as one matrix from all inputs to all outputs.
        _, side, stride = self._ends(stage)
        kernel_OCT = weights[f"{stage}.kernel"]
        matrix = (kernel_OCT @ links(side, stride)).unflatten(2, (side * side, -1))  # [O, C, Q, P]
        matrix = matrix.permute(1, 2, 0, 3).flatten(2, 3).flatten(0, 1)  # [C Q, O P]
        out = (x.flatten(1) @ matrix).unflatten(1, (kernel_OCT.shape[0], -1))
        return F.relu(out + weights[f"{stage}.bias"].unsqueeze(1))


class Mixer(Network):
    """Patches; each stage mixes first the tokens, then the channels (Tolstikhin et al., 2021), by one layer each."""

    def init_stage(self, stage: int, generator: torch.Generator) -> Weights:
        width, tokens = self.channels[0], self.sides[0] ** 2
        weights = linear_init("embed", PIXELS // tokens, width, generator) if stage == 1 else {}
        weights |= linear_init("tokens", tokens, tokens, generator)
        return weights | linear_init("channels", width, width, generator)

    def stage(self, weights: Weights, stage: int, x: Tensor) -> Tensor:
        if stage == 1:
            x = linear(weights, "1.embed", patches(x, self.sides[0])).transpose(1, 2)
        x_BCP = x + F.relu(linear(weights, f"{stage}.tokens", x))
        return x_BCP + F.relu(linear(weights, f"{stage}.channels", x_BCP.transpose(1, 2))).transpose(1, 2)


class ViT(Network):
    """Patches with learned positions; each stage is one pre-norm transformer block."""

    heads = 3

    def init_stage(self, stage: int, generator: torch.Generator) -> Weights:
        width, tokens = self.channels[0], self.sides[0] ** 2
        weights: Weights = {}
        if stage == 1:
            weights |= linear_init("embed", PIXELS // tokens, width, generator)
            weights["positions"] = 0.02 * torch.randn(tokens, width, generator=generator)
        weights |= norm_init("attention.norm", width) | linear_init("attention.qkv", width, 3 * width, generator)
        weights |= linear_init("attention.out", width, width, generator) | norm_init("mlp.norm", width)
        weights |= linear_init("mlp.in", width, 2 * width, generator)
        return weights | linear_init("mlp.out", 2 * width, width, generator)

    def stage(self, weights: Weights, stage: int, x: Tensor) -> Tensor:
        if stage == 1:
            x_BND = linear(weights, "1.embed", patches(x, self.sides[0])) + weights["1.positions"]
        else:
            x_BND = x.transpose(1, 2)
        x_BND = x_BND + self._attend(weights, stage, norm(weights, f"{stage}.attention.norm", x_BND))
        x_BND = x_BND + two_layers(weights, f"{stage}.mlp", norm(weights, f"{stage}.mlp.norm", x_BND))
        return x_BND.transpose(1, 2)

    def _attend(self, weights: Weights, stage: int, x_BND: Tensor) -> Tensor:
        qkv = linear(weights, f"{stage}.attention.qkv", x_BND).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[3])
        mixed = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
        return linear(weights, f"{stage}.attention.out", mixed)


def linear_init(name: str, inputs: int, outputs: int, generator: torch.Generator) -> Weights:
    """He normal for its inputs, halved in variance (what follows is not always a ReLU); no bias."""
    weight = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer over the last dimension, as one product of two matrices."""
    return (x.flatten(0, -2) @ weights[f"{name}.weight"] + weights[f"{name}.bias"]).unflatten(0, x.shape[:-1])


def two_layers(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Two linear layers with a ReLU between them."""
    return linear(weights, f"{name}.out", F.relu(linear(weights, f"{name}.in", x)))


def norm_init(name: str, width: int) -> Weights:
    """A layer norm that does nothing yet."""
    return {f"{name}.scale": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:]) * weights[f"{name}.scale"] + weights[f"{name}.bias"]


def patches(images_BX: Tensor, cells: int) -> Tensor:
    """The image in cells x cells patches, row by row: [B, 64] -> [B, cells**2, 64 / cells**2]."""
    patch = SIDE // cells
    return images_BX.unflatten(1, (cells, patch, cells, patch)).transpose(2, 3).flatten(3).flatten(1, 2)


@lru_cache(maxsize=16)
def links(side: int, stride: int) -> Tensor:
    """Which entry of a padded 3x3 kernel takes input position Q to output position P: [9, Q P] of ones and zeros."""

    def along(length: int) -> Tensor:
        offset_QP = torch.arange(length).unsqueeze(1) - stride * torch.arange(length // stride) + 1
        return torch.stack([offset_QP == tap for tap in range(3)]).float()

    return torch.einsum("yhi,xwj->yxhwij", along(side), along(side)).reshape(9, -1)
