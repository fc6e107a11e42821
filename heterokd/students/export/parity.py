"""Does a file do what the trained student does? Asked on real images, one and five at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Split
from heterokd.errors import ExportError
from heterokd.networks.network import AnyNetwork
from heterokd.students.export.format import ExportFormat, Opened
from heterokd.tasks import task_of
from heterokd.training.task_modules import upsample

PARITY = 1e-4
"""Largest difference between a logit of the file and of the student, where logits are at most 1; it grows with them.
Other kernels add in another order: float32 keeps seven digits, and tens of layers cost two of them."""
BATCHES = (1, 5)


@dataclass(frozen=True, eq=False)
class Written:
    """Files of a student, opened again.

    Attributes:
        kind: their format.
        size: height and width of the only images that they take; None: any.
        opened: what they give.
    """

    kind: ExportFormat
    size: tuple[int, int] | None
    opened: Opened


@dataclass(frozen=True)
class Parity:
    """How far a file's logits are from the student's.

    Attributes:
        difference: the largest, over all batches.
        by_batch: the largest of each batch size.
        tolerance: what is allowed: `PARITY` times the largest logit, or `PARITY` where that is below 1.
        sizes: heights and widths that were tried, in pixels.
    """

    difference: float
    by_batch: dict[str, float]
    tolerance: float
    sizes: tuple[tuple[int, int], ...]

    @property
    def agrees(self) -> bool:
        """Whether the difference is a number and within the tolerance."""
        return self.difference <= self.tolerance


def parity_images(split: Split) -> Tensor:
    """The first images of a split, [N, 3, H, W] in [0, 1]; as many as the largest batch, if there are so many."""
    return next(iter(EvalLoader(split, max(BATCHES)))).images


def compare_with_student(network: AnyNetwork, written: Written, images: Tensor) -> Parity:
    """The file's logits and the student's, for the same images in batches of one and five.

    Args:
        network: the trained student, in evaluation mode.
        written: the file.
        images: [N, 3, H, W] real images; repeated if they are fewer than a batch.
    """
    by_batch: dict[str, float] = {}
    largest, sizes = 1.0, []
    for seen in _at_sizes(network, written, images):
        sizes.append((int(seen.shape[-2]), int(seen.shape[-1])))
        for count in BATCHES:
            batch = seen[torch.arange(count) % len(seen)].contiguous()
            with torch.inference_mode():
                trained = network(batch).logits
                if trained.dim() == 4:
                    trained = upsample(trained, batch.shape[-2:])
                got = written.opened.run(batch)
            if got.shape != trained.shape:
                raise ExportError(
                    f"{written.kind.files[0]}: gives logits {tuple(got.shape)} for {count} image(s), the student "
                    f"{tuple(trained.shape)}; it is not kept"
                )
            apart = (trained - got).abs().max()
            # A number that is none must not pass as small.
            value = float(apart) if torch.isfinite(apart) else float("inf")
            key = f"batch_{count}"
            by_batch[key] = max(value, by_batch.get(key, 0.0))
            largest = max(largest, float(trained.abs().max()))
    return Parity(max(by_batch.values()), by_batch, PARITY * largest, tuple(sizes))


def _at_sizes(network: AnyNetwork, written: Written, images: Tensor) -> Iterator[Tensor]:
    """The images at each size to try: the file's only one, or that of the images and another one of odd sides."""
    height, width = images.shape[-2:]
    if written.size is not None and task_of(network.spec).resizes:
        # As the student itself does with images of another size.
        if (height, width) != written.size:
            images = F.interpolate(images, written.size, mode="bilinear", align_corners=False, antialias=True)
        yield images
    elif written.size is not None:
        rows, columns = written.size
        yield F.pad(images[..., :rows, :columns], (0, max(0, columns - width), 0, max(0, rows - height)))
    else:
        yield images
        odd = (height - height // 4) // 2 * 2 - 1, (width - width // 8) // 2 * 2 - 1
        if min(odd) > max(stage.stride for stage in network.spec.stages):
            yield images[..., : odd[0], : odd[1]]
