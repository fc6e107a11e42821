"""MappedNetwork: a user's module that gives logits at every pixel, read from its modules while it runs.

It runs as it is. Its stages are the outputs of the modules that `taps` names; its embedding is the input of its last
convolution to the classes, or the output of the module that `taps` names, where that has the size of the logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from heterokd.errors import NetworkError
from heterokd.networks.bodies import first_line
from heterokd.networks.body_network import BodyNetwork, standardised
from heterokd.networks.body_types import Normalisation
from heterokd.networks.dataflow import Flow, logits_of
from heterokd.networks.parts import kind_of
from heterokd.networks.segmentation import pad_to_multiple
from heterokd.networks.taps import TapNames, named_call
from heterokd.outputs import Outputs, OutputSpec, Signal, StageSpec

MULTIPLE = 32
"""Pixels to whose multiples the sides of images are padded, as the encoders of smp need."""


@dataclass(frozen=True, eq=False)
class MapParts:
    """Where a module gives the outputs of a segmentation network.

    Attributes:
        classifier: dotted name of the last convolution to the classes; None if there is none.
        embedding: dotted name of the module whose output is the embedding; None: the classifier's input.
        stages: dotted names of the modules whose outputs are the four stages; empty if there are none.
        multiple: number of pixels to whose multiples the sides of images are padded.
        arguments: of the module's function, with the image size if it takes it.
        spec: shapes of the outputs.
    """

    classifier: str | None
    embedding: str | None
    stages: tuple[str, ...]
    multiple: int
    arguments: Mapping[str, object]
    spec: OutputSpec


# One parameter more than `describe_taps`: the forward that is recorded already.
def describe_maps(
    name: str,
    body: nn.Module,
    images: Tensor,
    flow: Flow,
    num_classes: int,
    arguments: Mapping[str, object],
    named: TapNames,
) -> MapParts:
    """Describe a module whose recorded forward on the meta device gives logits [B, K, h, w].

    Raises:
        NetworkError: the logits have other classes, a stride that is no whole number, or another size of images is not
            accepted; a named module gives no map.
    """
    side, logits = images.shape[-1], logits_of(flow.output)
    if logits.shape[1] != num_classes:
        raise NetworkError(f"network {name!r} gives {logits.shape[1]} maps of logits, {num_classes} are needed")
    stages = tuple(_stage(name, body, _map_of(name, flow, module, "stages"), module, images) for module in named.stages)
    strides = [stage.stride for stage in stages]
    if strides != sorted(strides):
        raise NetworkError(
            f"network {name!r}: taps.stages: strides {strides} are not shallow to deep; order the modules"
        )
    classifier = _classifier(body, flow, num_classes)
    given = None if classifier is None else next(call.given for call in flow.modules if call.module == classifier)
    embedding = given if named.embedding is None else _map_of(name, flow, named.embedding, "embedding")
    if embedding is not None and embedding.shape[2:] != logits.shape[2:]:
        if named.embedding is not None:
            raise NetworkError(
                f"network {name!r}: taps.embedding: {named.embedding!r} gives maps of {list(embedding.shape[2:])}, the "
                f"logits have {list(logits.shape[2:])}; return the logits before they are upsampled"
            )
        embedding = None
    serves = Signal.LOGITS | (Signal.STAGES if stages else Signal.NONE)
    spec = OutputSpec(
        num_classes,
        0 if embedding is None else int(embedding.shape[1]),
        stages,
        side,
        serves=serves if embedding is None else serves | Signal.EMBEDDING,
        logits_stride=_stride(name, images, logits, "the logits"),
        body_kind=kind_of([body]),
    )
    multiple = math.lcm(MULTIPLE, *strides)
    other = images.new_empty((*images.shape[:2], side + multiple, side))
    try:
        with torch.no_grad():
            logits_of(body(other))
    except Exception as error:  # any layer may raise on a size
        raise NetworkError(
            f"network {name!r} does not run on images of any size (tried {side + multiple} x {side}): "
            f"{first_line(error)}"
        ) from error
    return MapParts(classifier, named.embedding, named.stages, multiple, arguments, spec)


def _map_of(name: str, flow: Flow, module: str, key: str) -> Tensor:
    found = named_call(name, flow, module, key).tensors[0]
    if found.dim() != 4:
        raise NetworkError(
            f"network {name!r}: taps.{key}: {module!r} gives {list(found.shape)}, a map [B, C, H, W] is needed"
        )
    return found


def _stage(name: str, body: nn.Module, y: Tensor, module: str, images: Tensor) -> StageSpec:
    return StageSpec(int(y.shape[1]), _stride(name, images, y, module), kind_of([body.get_submodule(module)]))


def _stride(name: str, images: Tensor, y: Tensor, what: str) -> int:
    stride, rest = divmod(images.shape[-1], y.shape[-1])
    if rest or y.shape[-1] * stride != images.shape[-1] or y.shape[-2] != y.shape[-1]:
        raise NetworkError(
            f"network {name!r}: {what}: maps of {list(y.shape[2:])} for images of {list(images.shape[2:])}; a whole "
            "number of pixels per position is needed"
        )
    return int(stride)


def _classifier(body: nn.Module, flow: Flow, num_classes: int) -> str | None:
    found = [
        call.module
        for call in flow.modules
        if isinstance(body.get_submodule(call.module), nn.Conv2d) and call.tensors[0].shape[1] == num_classes
    ]
    return found[-1] if found else None


class MappedNetwork(BodyNetwork):
    """A user's module for semantic segmentation, with LOGITS, and EMBEDDING and STAGES where it has them."""

    NO_SIGNAL = "it gives logits, an embedding of the same size, and stages that options.taps names"

    def __init__(
        self, name: str, body: nn.Module, parts: MapParts, options: Mapping[str, object], normalisation: Normalisation
    ) -> None:
        super().__init__(name, body, parts.spec, options, normalisation)
        self.parts, self.multiple = parts, parts.multiple

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Run a single forward and return the signals in `needs`, see `SegmentationNetwork.forward`."""
        self.require(needs)
        height, width = images.shape[-2:]
        with self._reading(needs) as read:
            logits = logits_of(self.body(pad_to_multiple(self.normalise(images), self.multiple)))

        def cropped(y: Tensor, stride: int) -> Tensor:
            return y[..., : -(-height // stride), : -(-width // stride)]

        stride = self.spec.logits_stride or 1
        stages = zip(self.parts.stages, self.spec.stages, strict=True)
        return Outputs(
            logits=cropped(logits, stride) if Signal.LOGITS in needs else None,
            embedding=cropped(read["embedding"], stride) if Signal.EMBEDDING in needs else None,
            stages=tuple(cropped(read[module], stage.stride) for module, stage in stages)
            if Signal.STAGES in needs
            else None,
        )

    @contextmanager
    def _reading(self, needs: Signal) -> Iterator[dict[str, Tensor]]:
        """Record the maps of stages and embedding."""
        read: dict[str, Tensor] = {}

        def keep(key: str, _module: nn.Module, _given: object, output: object) -> None:
            # A later layer may work in place.
            read[key] = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).clone()

        def keep_input(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            read["embedding"] = given[0]

        named = {module: module for module in self.parts.stages} if Signal.STAGES in needs else {}
        hooks = [
            self.body.get_submodule(module).register_forward_hook(partial(keep, key)) for key, module in named.items()
        ]
        if Signal.EMBEDDING in needs and self.parts.embedding is not None:
            hooks.append(
                self.body.get_submodule(self.parts.embedding).register_forward_hook(partial(keep, "embedding"))
            )
        elif Signal.EMBEDDING in needs:
            hooks.append(self.head.register_forward_pre_hook(keep_input))
        try:
            yield read
        finally:
            for hook in hooks:
                hook.remove()

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images [B, 3, H, W] in [0, 1] to mean 0 and deviation 1, without resizing; padding (NaN) is 0."""
        return standardised(images, self.mean, self.std)

    def exports_any_size(self, size: tuple[int, int]) -> bool:
        """Return False: what a user's module computes from the size of its images is fixed in an exported graph."""
        return False

    @property
    def head(self) -> nn.Module:
        """The last convolution to the classes; the body if there is none."""
        return self.body if self.parts.classifier is None else self.body.get_submodule(self.parts.classifier)


class DeployableMaps(nn.Module):
    """Images [B, 3, H, W] in [0, 1], of any size, to logits [B, K, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: MappedNetwork) -> None:
        super().__init__()
        self.body = copy.deepcopy(network.body)
        self.multiple, self.stride = network.multiple, network.spec.logits_stride or 1
        self.register_buffer("mean", network.mean.clone())
        self.register_buffer("std", network.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, K, H, W], upsampled bilinearly to the images' size; see `DeployableSegmentation`."""
        height, width = images.shape[-2:]
        rows, columns = (height + self.multiple - 1) // self.multiple, (width + self.multiple - 1) // self.multiple
        bottom, right = rows * self.multiple - height, columns * self.multiple - width
        logits = logits_of(self.body(F.pad((images - self.mean) / self.std, (0, right, 0, bottom))))
        for side, size in ((2, height), (3, width)):
            seen = torch.arange((size + self.stride - 1) // self.stride, device=logits.device)
            logits = logits.index_select(side, seen)
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
