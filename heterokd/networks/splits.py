"""Split a timm classifier into a stem, four stages and a finish, by structure, not by name.

A network is built on the meta device (shapes without memory), its parts are looked up by attribute name in `SHAPES`,
and the split is accepted only if running the parts in order performs exactly the operations of the network's forward,
on the same weights and in the same order. A network with another structure runs as it is, see `taps`.

`bodies` builds the network, `operations` records its operations, `parts` describes the parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from heterokd.errors import NetworkError
from heterokd.networks.bodies import UnknownOption, create_body, first_line, options_as_json
from heterokd.networks.body_types import TimmBody
from heterokd.networks.dataflow import BATCH, logits_of, record_forward
from heterokd.networks.mapped import MapParts, describe_maps
from heterokd.networks.modules import TAPS, is_built_elsewhere, takes
from heterokd.networks.operations import operations, same_operations
from heterokd.networks.parts import Cut, NetworkParts, NotSplit, describe_parts, run_parts
from heterokd.networks.points import twelfths
from heterokd.networks.taps import TapParts, describe_taps, read_tap_names


@dataclass(frozen=True)
class Shape:
    """Attribute names of the parts of a family of networks.

    Attributes:
        stem: modules before the first stage, in order.
        stages: four modules, or a sequence with four stages or many blocks, or (`features`) a sequence of stem, stages
            and finish.
        finishes: alternatives for the modules between the last stage and `forward_head`; the first match is used.
    """

    stem: tuple[str, ...]
    stages: tuple[str, ...]
    finishes: tuple[tuple[str, ...], ...]


SHAPES = (
    Shape(("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4"), ((),)),  # ResNet
    Shape((), ("stem", "layer1", "layer2", "layer3"), ((),)),  # ResNet of three stages
    Shape(("conv1",), ("maxpool", "stage2", "stage3", "stage4"), (("conv5",),)),  # ShuffleNetV2
    Shape(("stem",), ("s1", "s2", "s3", "s4"), (("final_conv",),)),  # RegNet
    Shape(("conv_stem", "bn1"), ("blocks",), (("conv_head", "bn2"), ())),  # MobileNet, EfficientNet
    Shape(("patch_embed",), ("layers",), (("norm",),)),  # Swin
    Shape(  # ConvNeXt, MetaFormer, MambaOut, NFNet, MaxViT
        ("stem",), ("stages",), (("norm_pre",), ("norm",), ("final_conv", "final_act"), ("final_conv",), ())
    ),
    Shape(("patch_embed",), ("stages",), ((),)),  # PVT
    Shape(("patch_embed", "_pos_embed", "patch_drop", "norm_pre"), ("blocks",), (("norm",),)),  # ViT, DeiT, DINOv2
    Shape(("stem",), ("blocks",), (("norm",),)),  # Mixer, ResMLP
    Shape((), ("features",), ((),)),  # VGG, DenseNet
)


def split_network(
    name: str, num_classes: int, options: Mapping[str, object] | None, image_size: int | None
) -> NetworkParts | TapParts | MapParts:
    """Determine the parts of a network from its structure; cached, without weights or memory.

    Returns:
        Stem, stages and finish of a network that matches one of `SHAPES`, of others the taps of its modules; of a
        user's segmentation network the modules that give its maps.

    Raises:
        NetworkError: the name or an option is unknown, or the network does not give logits for images of this size.
    """
    return _split(name, num_classes, options_as_json(name, num_classes, options, image_size), image_size)


@lru_cache(maxsize=256)
def _split(name: str, num_classes: int, options: str, image_size: int | None) -> NetworkParts | TapParts | MapParts:
    given = json.loads(options)
    taps = given.pop(TAPS, None)
    body, arguments = meta_body(name, num_classes, given, image_size)
    size = arguments.get("img_size")
    size = size[0] if isinstance(size, list) else size
    side = size if isinstance(size, int) else image_size or _default_size(body)
    channels = arguments.get("in_chans", 3)
    if channels not in (1, 3):
        raise NetworkError(f"network {name!r}: in_chans must be 3 (colour images) or 1 (grey images), got {channels}")
    images = torch.empty(BATCH, int(channels), side, side, device="meta")
    try:
        native = operations(body, images, lambda: body(images))
    except Exception as error:  # any layer may raise on this size
        raise NetworkError(f"network {name!r} does not run on {side} x {side} images: {first_line(error)}") from error
    drop = getattr(body, "patch_drop", None)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        raise NetworkError(
            f"network {name!r} drops patches while training, so its maps have holes; set patch_drop_rate: 0"
        )
    is_timms = hasattr(body, "forward_head") and hasattr(body, "feature_info")
    for shape in SHAPES if is_timms and taps is None else ():
        if not all(hasattr(body, part) for part in shape.stem + shape.stages):
            continue
        for cut in _cuts(body, shape):
            if same_operations(native, body, images, partial(_run_whole, body, cut, images)):
                with suppress(NotSplit):
                    return describe_parts(body, images, cut, num_classes, arguments)
    named = read_tap_names(name, taps)
    flow = record_forward(body, images) if is_built_elsewhere(name, given) else None
    if flow is not None and logits_of(flow.output).dim() == 4:
        return describe_maps(name, body, images, flow, num_classes, arguments, named)
    return describe_taps(name, body, images, num_classes, arguments, named)


def _default_size(body: nn.Module) -> int:
    """Return the image size of timm's weights; 224 for other modules."""
    config = getattr(body, "pretrained_cfg", None) or {}
    return int(config["input_size"][-1]) if "input_size" in config else 224


def _run_whole(body: TimmBody, cut: Cut, images: Tensor) -> Tensor:
    return body.forward_head(run_parts(body, cut.parts, images))


def meta_body(
    name: str, num_classes: int, options: dict[str, object], image_size: int | None
) -> tuple[TimmBody, dict[str, object]]:
    """Build a body on the meta device in eval mode, without its parts; `img_size` is passed if the network takes it.

    Args:
        name: of a single network for classification, or of a user's module.
        num_classes: K of the logits.
        options: the network's, without its taps.
        image_size: height and width of an image, in pixels.

    Returns:
        The body, and the arguments that it was built with.

    Raises:
        NetworkError: the name or an option is unknown.
    """
    with torch.device("meta"):
        if is_built_elsewhere(name, options):
            if image_size is not None and "img_size" not in options and takes(name, options, "img_size"):
                options = {**options, "img_size": image_size}
            return create_body(name, num_classes, options).eval(), options
        if image_size is not None and "img_size" not in options:
            sized = {**options, "img_size": image_size}
            try:
                return create_body(name, num_classes, sized).eval(), sized
            except UnknownOption as error:
                if error.option != "img_size":
                    raise
        return create_body(name, num_classes, options).eval(), options


def _cuts(body: TimmBody, shape: Shape) -> list[Cut]:
    """Return the cuts to try for a shape: one for each finish whose modules exist; none if it has not four stages."""
    if shape.stages == ("features",):
        cut = _cut_sequence(body)
        return [] if cut is None else [cut]
    stages = _stages(body, shape.stages)
    finishes = [finish for finish in shape.finishes if all(hasattr(body, part) for part in finish)]
    return [] if stages is None else [Cut(shape.stem, stages, finish) for finish in finishes]


def _stages(body: TimmBody, parts: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
    """Return the dotted names of the modules of each of the four stages; None if there are fewer, or other ones."""
    if len(parts) == 4:
        return tuple((part,) for part in parts)
    (part,) = parts
    blocks = [f"{part}.{i}" for i in range(len(getattr(body, part)))]
    if part != "blocks":
        return tuple((block,) for block in blocks) if len(blocks) == 4 else None
    info = [entry for entry in body.feature_info if entry["module"].startswith("blocks.")]
    if len({entry["reduction"] for entry in info}) > 1:
        last_of = {entry["reduction"]: int(entry["module"].split(".")[1]) + 1 for entry in info}
        ends = sorted(last_of.values())[-4:-1]  # a resolution before the last four belongs to the first stage
        if len(last_of) < 4:
            return None
    else:
        if len(blocks) < 4:
            return None
        ends = twelfths(len(blocks))
    edges = [0, *ends, len(blocks)]
    return tuple(tuple(blocks[a:b]) for a, b in pairwise(edges))


def _cut_sequence(body: TimmBody) -> Cut | None:
    """Cut the sequence `features` after the modules in `feature_info`; None if it has too few.

    A pooling belongs to the part after it, a last pooling (VGG) or norm (DenseNet) to the finish.
    """
    children = dict(body.get_submodule("features").named_children())
    parts = [f"features.{child}" for child in children]
    last = len(parts)
    while last and isinstance(children[parts[last - 1].partition(".")[2]], nn.MaxPool2d | nn.BatchNorm2d):
        last -= 1
    named = {entry["module"] for entry in body.feature_info}
    ends = [*(end for end in range(1, last) if parts[end - 1] in named), last][-5:]
    if len(ends) < 5:
        return None
    return Cut(tuple(parts[: ends[0]]), tuple(tuple(parts[a:b]) for a, b in pairwise(ends)), tuple(parts[last:]))
