"""ServingModel: a registered graph that takes every image of a test split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heterokd.tasks import Inference
from heterokd.training.task_modules import Task, build_task


class ServingModel(nn.Module):
    """A loaded graph, which torch.export has fixed in evaluation mode.

    If the task's networks do not resize images, a graph for a single size slides over larger images, and smaller images
    are padded at the right and bottom with the network's mean.
    """

    def __init__(self, graph: nn.Module, task: Task, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.graph, self.size = graph, None if task.facts.resizes else size
        self.sliding = build_task(task.facts.name, task.num_classes, inference=Inference(window=self.size))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [0, 1] to logits [B, K], or [B, K, H, W] in segmentation.

        Pixels of a canvas without an image are NaN: they become the network's mean, too.
        """
        if images.isnan().any():
            images = torch.where(images.isnan(), self.graph.get_buffer("mean"), images)
        height, width = images.shape[-2:]
        if self.size is None or self.size == (height, width):
            logits: Tensor = self.graph(images)
            return logits
        rows, columns = max(height, self.size[0]), max(width, self.size[1])
        padded = self.graph.get_buffer("mean").expand(len(images), 3, rows, columns).clone()
        padded[..., :height, :width] = images
        return self.sliding.logits(self.graph, padded)[..., :height, :width]

    def train(self, mode: bool = True) -> ServingModel:
        """Return the model unchanged."""
        return self
