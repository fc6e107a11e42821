"""Split a timm classifier into a stem, four stages and a finish, by structure, not by name.

A network is built on the meta device (shapes without memory), its parts are looked up by attribute name in `SHAPES`,
and the split is accepted only if running the parts in order performs exactly the operations of the network's forward,
on the same weights and in the same order. So a network with an unknown structure is refused, never silently changed.

`bodies` builds the network, `operations` records its operations, `parts` describes the parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from heterokd.errors import NetworkError
from heterokd.networks.bodies import create_body, first_line, options_as_json
from heterokd.networks.body_types import TimmBody
from heterokd.networks.operations import operations, same_operations
from heterokd.networks.parts import Cut, NetworkParts, describe_parts, run_parts


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
INSTEAD = (
    "use a ResNet, MobileNet, EfficientNet, ConvNeXt, VGG, DenseNet, Swin, PVTv2, MetaFormer, ViT, DeiT, Mixer or "
    "ResMLP instead"
)


def split_network(
    name: str, num_classes: int, options: Mapping[str, object] | None, image_size: int | None
) -> NetworkParts:
    """Determine the parts of a network from its structure; cached, without weights or memory.

    Raises:
        NetworkError: the name or an option is unknown, or the structure matches none of `SHAPES`.
    """
    return _split(name, num_classes, options_as_json(name, num_classes, options, image_size), image_size)


@lru_cache(maxsize=256)
def _split(name: str, num_classes: int, options: str, image_size: int | None) -> NetworkParts:
    body, arguments = _build(name, num_classes, json.loads(options), image_size)
    size = arguments.get("img_size")
    size = size[0] if isinstance(size, list) else size
    side = size if isinstance(size, int) else image_size or body.pretrained_cfg["input_size"][-1]
    images = torch.empty(2, 3, side, side, device="meta")
    try:
        native = operations(body, images, lambda: body(images))
    except Exception as error:  # any layer may raise on this size
        raise NetworkError(f"network {name!r} does not run on {side} x {side} images: {first_line(error)}") from error

    fitting = [shape for shape in SHAPES if all(hasattr(body, part) for part in shape.stem + shape.stages)]
    if not fitting:
        parts = ", ".join(name for name, _ in body.named_children())
        raise NetworkError(
            f"network {name!r} has none of the known structures (looked for layer1..4, s1..4, layers, stages, "
            f"blocks or features; it has {parts}): {INSTEAD}"
        )
    for shape in fitting:
        for cut in _cuts(name, body, shape):
            if same_operations(native, body, images, partial(_run_whole, body, cut, images)):
                return describe_parts(name, body, images, cut, num_classes, arguments)
    raise NetworkError(
        f"network {name!r} does more than run its stem, stages and head in order (looked at "
        f"{', '.join(fitting[0].stem + fitting[0].stages)}), so it cannot be split: {INSTEAD}"
    )


def _run_whole(body: TimmBody, cut: Cut, images: Tensor) -> Tensor:
    return body.forward_head(run_parts(body, cut.parts, images))


def _build(
    name: str, num_classes: int, options: dict[str, object], image_size: int | None
) -> tuple[TimmBody, dict[str, object]]:
    """Build the body on the meta device in eval mode; `img_size` is passed if the network takes it."""
    with torch.device("meta"):
        if image_size is not None and "img_size" not in options:
            sized = {**options, "img_size": image_size}
            try:
                return create_body(name, num_classes, sized).eval(), sized
            except NetworkError as error:
                if "has no option 'img_size'" not in str(error):
                    raise
        return create_body(name, num_classes, options).eval(), options


def _cuts(name: str, body: TimmBody, shape: Shape) -> list[Cut]:
    """Return the cuts to try for a shape: one for each finish whose modules exist."""
    if shape.stages == ("features",):
        return [_cut_sequence(name, body)]
    stages = _stages(name, body, shape.stages)
    return [Cut(shape.stem, stages, finish) for finish in shape.finishes if all(hasattr(body, part) for part in finish)]


def _stages(name: str, body: TimmBody, parts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the dotted names of the modules of each of the four stages."""
    if len(parts) == 4:
        return tuple((part,) for part in parts)
    (part,) = parts
    blocks = [f"{part}.{i}" for i in range(len(getattr(body, part)))]
    if part != "blocks":
        if len(blocks) != 4:
            raise NetworkError(f"network {name!r} has {len(blocks)} {part}, four are needed: {INSTEAD}")
        return tuple((block,) for block in blocks)
    info = [entry for entry in body.feature_info if entry["module"].startswith("blocks.")]
    if len({entry["reduction"] for entry in info}) > 1:
        last_of = {entry["reduction"]: int(entry["module"].split(".")[1]) + 1 for entry in info}
        ends = sorted(last_of.values())[-4:-1]  # a resolution before the last four belongs to the first stage
        if len(last_of) < 4:
            raise NetworkError(f"network {name!r} has {len(last_of)} resolutions, four are needed: {INSTEAD}")
    else:
        if len(blocks) < 4:
            raise NetworkError(f"network {name!r} has {len(blocks)} blocks, four stages need at least four")
        ends = twelfths(len(blocks))
    edges = [0, *ends, len(blocks)]
    return tuple(tuple(blocks[a:b]) for a, b in pairwise(edges))


def _cut_sequence(name: str, body: TimmBody) -> Cut:
    """Cut the sequence `features` after the modules in `feature_info`.

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
        raise NetworkError(f"network {name!r} has {len(ends)} parts, a stem and four stages are needed: {INSTEAD}")
    return Cut(tuple(parts[: ends[0]]), tuple(tuple(parts[a:b]) for a, b in pairwise(ends)), tuple(parts[last:]))


def twelfths(depth: int) -> list[int]:
    """Return the ends of stages 1 to 3 of `depth` equal blocks: in proportion to 2-2-6-2 of twelve, none empty.

    >>> twelfths(12), twelfths(6), twelfths(4)
    ([2, 4, 10], [1, 2, 5], [1, 2, 3])
    """
    ends: list[int] = []
    for i, share in enumerate((2, 4, 10)):
        least, most = (ends[-1] if ends else 0) + 1, depth - 3 + i
        ends.append(min(max(round(depth * share / 12), least), most))
    return ends
