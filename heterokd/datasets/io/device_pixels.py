"""Pixels of a split on the device: direct from memory, resident, or prefetched by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.io.image_files import are_photos, read_photo_crops
from heterokd.datasets.io.images import ArrayImages, image_shape, sources_of
from heterokd.datasets.io.shared_pixels import SharedImages
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.mixing import Mix
from heterokd.outputs import Batch

# Maximum size of a split that is read once and kept on the device as uint8.
RESIDENT_BYTES = 2**28
# On a GPU: maximum share of the free memory.
RESIDENT_SHARE = 1 / 4
# Number of batches that are prefetched.
PREFETCHED = 2


@dataclass(frozen=True, eq=False)
class Chosen:
    """Images and views of a batch.

    Attributes:
        index: [B] positions in the split.
        view: [B] view numbers; None for plain images.
        mix: partners of mixed views.
        crops: [4, B] crops of photos, or [4, 2 B] with the partners; see `FileImages.read_crops`.
    """

    index: NDArray[np.int64]
    view: NDArray[np.int64] | None = None
    mix: Mix | None = None
    crops: NDArray[np.float64] | None = None

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions of all images to read: [B], or [2 B] with the partners."""
        return self.index if self.mix is None else np.concatenate((self.index, self.mix.index))


@dataclass(frozen=True, eq=False)
class _Read:
    """Pixels and label maps that are being copied to the device; on a GPU `arrived` marks the end of the copy."""

    pixels: Tensor
    maps: Tensor | None
    arrived: torch.cuda.Event | None = None

    def get(self) -> tuple[Tensor, Tensor | None]:
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.arrived)
            for tensor in (self.pixels, self.maps):
                if tensor is not None:
                    tensor.record_stream(stream)  # their memory belongs to the stream that copied them
        return self.pixels, self.maps


class SplitPixels:
    """Pixels and label maps of a split on a device.

    They are read directly from memory, kept on the device if they fit, or prefetched by a thread.

    Args:
        split: images to read.
        device: target device.
        max_bytes: maximum size of a resident split; on a GPU, unless 0, a share of its free memory instead.
    """

    def __init__(self, split: Split, device: torch.device | str, max_bytes: int = RESIDENT_BYTES) -> None:
        # With its index: in another thread, "cuda" may mean another GPU.
        self.split, self.device, self._max_bytes = split, torch.empty(0, device=device).device, max_bytes
        # Images that are in host memory, or mapped into it, are not copied again.
        given = (images for images in (split.images, split.label_maps) if images is not None)
        kinds = {type(source) for images in given for source in sources_of(images)}
        on_host = self.device.type == "cpu"
        self._direct = on_host and kinds == {ArrayImages}
        self._may_be_resident = not (on_host and kinds <= {ArrayImages, SharedImages}) and not are_photos(split.images)
        self._resident: tuple[Tensor, Tensor | None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def batches(self, wanted: Iterable[Chosen]) -> Iterator[tuple[Chosen, Tensor, Tensor | None]]:
        """Yield each batch with its pixels [B, H, W, 3] and label maps [B, H, W], both uint8."""
        if self._direct or self._is_resident():
            for chosen in wanted:
                yield chosen, *self.at(chosen)
            return
        pending: deque[tuple[Chosen, Future[_Read]]] = deque()
        remaining = iter(wanted)
        with ThreadPoolExecutor(1) as reader:  # a single thread: sources of images need not be thread-safe

            def submit(count: int) -> None:
                for chosen in islice(remaining, count):
                    pending.append((chosen, reader.submit(self._read, chosen.positions, chosen.crops)))

            try:
                submit(PREFETCHED)
                while pending:
                    chosen, read = pending.popleft()
                    pixels, maps = read.result().get()
                    submit(1)
                    yield chosen, pixels, maps
            finally:
                for _, read in pending:
                    read.cancel()

    def at(self, wanted: Chosen) -> tuple[Tensor, Tensor | None]:
        """Read the pixels and label maps of a batch to the device."""
        positions = wanted.positions
        if not self._direct and self._is_resident():
            assert self._resident is not None  # set by `_is_resident`
            pixels, maps = self._resident
            chosen = torch.from_numpy(positions).to(self.device, non_blocking=True)
            return pixels[chosen], None if maps is None else maps[chosen]
        return self._read(positions, wanted.crops).get()

    def batch(
        self,
        images: Tensor,
        index: NDArray[np.int64],
        view: NDArray[np.int64] | None,
        labels: Tensor | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> Batch:
        """Build a batch on the device, with the split's class numbers unless labels are given."""
        if labels is None:
            labels = torch.from_numpy(self.split.labels[index])

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        return Batch(
            images=images,
            labels=move(labels if labels.is_floating_point() else labels.long()),
            index=move(torch.from_numpy(index.copy())),
            shown=None if view is None else torch.from_numpy(np.stack((index, view), axis=1)),
            weights=None if weights is None else move(torch.from_numpy(weights)),
        )

    def _is_resident(self) -> bool:
        """Whether the split is resident on the device; the first call copies it."""
        if self._resident is None and self._may_be_resident and len(self.split):
            limit = self._max_bytes
            if self.device.type == "cuda" and limit:
                limit = int(torch.cuda.mem_get_info(self.device)[0] * RESIDENT_SHARE)
            if len(self.split) * prod(image_shape(self.split.images)) <= limit:
                self._resident = self._read(np.arange(len(self.split))).get()
            else:
                self._may_be_resident = False
        return self._resident is not None

    def _read(self, positions: NDArray[np.int64], crops: NDArray[np.float64] | None = None) -> _Read:
        images = self.split.images
        pixels = torch.from_numpy(
            images.read(positions) if crops is None else read_photo_crops(images, positions, crops)
        )
        maps = None if self.split.label_maps is None else torch.from_numpy(self.split.label_maps.read(positions))
        if self.device.type != "cuda":
            return _Read(pixels.to(self.device), None if maps is None else maps.to(self.device))
        # In a separate stream, so that the copy overlaps with the training's kernels.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            moved = [
                None if tensor is None else tensor.pin_memory().to(self.device, non_blocking=True)
                for tensor in (pixels, maps)
            ]
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        assert moved[0] is not None
        return _Read(moved[0], moved[1], arrived)
