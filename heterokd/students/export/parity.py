"""Compare an exported file with the trained student on real images, in batches of one and five."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Split
from heterokd.errors import ExportError
from heterokd.networks.network import AnyNetwork
from heterokd.students.export.format import ExportFormat, Opened
from heterokd.tasks import task_of
from heterokd.training.meters import upsample

PARITY = 1e-4
"""Maximum difference between logits of the file and of the student, relative to the largest logit, or to 1 if it is
smaller. Other kernels add in another order: float32 has seven digits, of which tens of layers cost two."""
BATCHES = (1, 5)


@dataclass(frozen=True, eq=False)
class Written:
    """An exported student that was opened again.

    Attributes:
        kind: its format.
        size: the only height and width of images that it takes; None: any.
        opened: the opened files.
    """

    kind: ExportFormat
    size: tuple[int, int] | None
    opened: Opened


@dataclass(frozen=True)
class Parity:
    """Difference between the logits of a file and of the student.

    Attributes:
        difference: the largest difference; infinite if a logit is not finite.
        by_batch: the largest difference of each batch size.
        tolerance: the allowed difference, see `PARITY`.
        sizes: compared heights and widths, in pixels.
    """

    difference: float
    by_batch: dict[str, float]
    tolerance: float
    sizes: tuple[tuple[int, int], ...]

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


def parity_images(split: Split) -> Tensor:
    """Return the first images of a split, [N, 3, H, W] in [0, 1]: at most the size of the largest batch."""
    return next(iter(EvalLoader(replace(split, extents=None), max(BATCHES)))).images


def compare_with_student(network: AnyNetwork, written: Written, images: Tensor) -> Parity:
    """Compare the logits of a file and of the student for the same images.

    Args:
        network: the trained student, in evaluation mode.
        written: the opened file.
        images: [N, 3, H, W] real images; repeated if there are fewer than a batch holds.

    Raises:
        ExportError: the file gives logits of another shape.
    """
    by_batch = dict.fromkeys((f"batch_{count}" for count in BATCHES), 0.0)
    largest, sizes = 1.0, []
    for resized in _at_sizes(network, written, images):
        sizes.append((int(resized.shape[-2]), int(resized.shape[-1])))
        for count in BATCHES:
            batch = resized[torch.arange(count) % len(resized)].contiguous()
            with torch.inference_mode():
                expected = network(batch).logits
                if expected.dim() == 4:
                    expected = upsample(expected, batch.shape[-2:])
                logits = written.opened.run(batch)
            if logits.shape != expected.shape:
                raise ExportError(
                    f"{written.kind.files[0]}: gives logits of shape {tuple(logits.shape)} for {count} image(s), the "
                    f"student gives {tuple(expected.shape)}; the file was deleted, use another --format"
                )
            difference = (expected - logits).abs().max()
            # NaN would compare as small.
            value = float(difference) if torch.isfinite(difference) else float("inf")
            by_batch[f"batch_{count}"] = max(value, by_batch[f"batch_{count}"])
            largest = max(largest, float(expected.abs().max()))
    return Parity(max(by_batch.values()), by_batch, PARITY * largest, tuple(sizes))


def _at_sizes(network: AnyNetwork, written: Written, images: Tensor) -> Iterator[Tensor]:
    """Yield the images at each size to compare: the file's only size, or the images' size and an odd size."""
    height, width = images.shape[-2:]
    if written.size is not None and task_of(network.spec).resizes:
        # As the student resizes images of another size.
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
