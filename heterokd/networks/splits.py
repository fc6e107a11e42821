"""Split a timm classifier into a stem, four stages and a finish, by structure, not by name.

A network is built on the meta device (shapes without memory), its parts are looked up by attribute name in `SHAPES`,
and the split is accepted only if running the parts in order performs exactly the operations of the network's forward,
on the same weights and in the same order. So a network with an unknown structure is refused, never silently changed.

`bodies` builds the network, `operations` records its operations.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heterokd.errors import NetworkError
from heterokd.networks.bodies import create_body
from heterokd.networks.operations import Recorder, operations, same_operations
from heterokd.outputs import EVERY_NETWORK, Kind, OutputSpec, Signal, StageSpec

MapLayout = Literal["NCHW", "NHWC", "NLC"]


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


@dataclass(frozen=True)
class NetworkParts:
    """Parts of a network.

    Attributes:
        stem, finish: dotted names of callables of the body, run in order.
        stages: dotted names for each of the four stages.
        layout: layout of the body's tensors between its stages: maps [B, C, H, W] or [B, H, W, C], or tokens [B, N, C].
        stem_layout: layout of the first stage's input.
        activations: dotted names of each stage's last ReLU and of the BatchNorm before it; empty unless all four have
            them.
        prefix: names of the parameters of the class, distillation and register tokens, in order.
        one_head: whether the logits are `get_classifier()` of the embedding (False for two-headed networks).
        arguments: timm's arguments, with the image size if the network takes it.
        spec: shapes of the outputs.
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    finish: tuple[str, ...]
    layout: MapLayout
    stem_layout: MapLayout
    activations: tuple[tuple[str, str], ...]
    prefix: tuple[str, ...]
    one_head: bool
    arguments: Mapping[str, Any]
    spec: OutputSpec


def run_parts(body: Any, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Run `x` through the named parts of `body`; they are looked up in each call, since SyncBN may replace them."""
    return reduce(lambda value, name: attrgetter(name)(body)(value), names, x)


def _run_whole(body: Any, parts: tuple[str, ...], images: Tensor) -> Any:
    return body.forward_head(run_parts(body, parts, images))


def split_network(
    name: str, num_classes: int, options: Mapping[str, Any] | None, image_size: int | None
) -> NetworkParts:
    """Determine the parts of a network from its structure; cached, without weights or memory.

    Raises:
        NetworkError: the name or an option is unknown, or the structure matches none of `SHAPES`.
    """
    if num_classes < 1 or (image_size is not None and image_size < 1):
        key, value = ("num_classes", num_classes) if num_classes < 1 else ("image_size", image_size)
        raise NetworkError(f"network {name!r}: {key} must be at least 1, got {value}")
    try:
        frozen = json.dumps(dict(options or {}), sort_keys=True)
    except TypeError as error:
        raise NetworkError(f"network {name!r}: options must be numbers, words and lists of them ({error})") from error
    return _split(name, num_classes, frozen, image_size)


@lru_cache(maxsize=256)
def _split(name: str, num_classes: int, options: str, image_size: int | None) -> NetworkParts:
    arguments: dict[str, Any] = json.loads(options)
    body, arguments = _lay_out(name, num_classes, arguments, image_size)
    fixed = arguments.get("img_size")
    side = fixed[0] if isinstance(fixed, list) else fixed or image_size or body.pretrained_cfg["input_size"][-1]
    images = torch.empty(2, 3, side, side, device="meta")
    try:
        native = operations(body, images, lambda: body(images))
    except Exception as error:  # any layer may raise on this size
        sentence = str(error).strip().split("\n", 1)[0]
        raise NetworkError(f"network {name!r} does not run on {side} x {side} images: {sentence}") from error

    fitting = [shape for shape in SHAPES if all(hasattr(body, part) for part in shape.stem + shape.stages)]
    if not fitting:
        parts = ", ".join(name for name, _ in body.named_children())
        raise NetworkError(
            f"network {name!r} has none of the known structures (looked for layer1..4, s1..4, layers, stages, "
            f"blocks or features; it has {parts}): {INSTEAD}"
        )
    for shape in fitting:
        stem, finishes = shape.stem, shape.finishes
        if shape.stages == ("features",):
            stem, stages, finishes = _cut(name, body.features, body.feature_info)
        else:
            stages = _stages(name, body, shape.stages)
        for finish in finishes:
            if not all(hasattr(body, part.partition(".")[0]) for part in finish):
                continue
            run = partial(_run_whole, body, (*stem, *chain(*stages), *finish), images)
            if same_operations(native, body, images, run):
                return _describe(name, body, images, stem, stages, finish, num_classes, arguments)
    raise NetworkError(
        f"network {name!r} does more than run its stem, stages and head in order (looked at "
        f"{', '.join(fitting[0].stem + fitting[0].stages)}), so it cannot be split: {INSTEAD}"
    )


def _lay_out(
    name: str, num_classes: int, options: dict[str, Any], image_size: int | None
) -> tuple[Any, dict[str, Any]]:
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


def _stages(name: str, body: Any, parts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
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


def _cut(
    name: str, features: Any, feature_info: Any
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Split a sequence into stem, stages and finish, after the modules in `feature_info`.

    A pooling belongs to the part after it, a last pooling (VGG) or norm (DenseNet) to the finish.
    """
    children = dict(features.named_children())
    parts = [f"features.{child}" for child in children]
    last = len(parts)
    while last and isinstance(children[parts[last - 1].partition(".")[2]], (nn.MaxPool2d, nn.BatchNorm2d)):
        last -= 1
    named = {entry["module"] for entry in feature_info}
    ends = [*(end for end in range(1, last) if parts[end - 1] in named), last][-5:]
    if len(ends) < 5:
        raise NetworkError(f"network {name!r} has {len(ends)} parts, a stem and four stages are needed: {INSTEAD}")
    stages = tuple(tuple(parts[a:b]) for a, b in pairwise(ends))
    return tuple(parts[: ends[0]]), stages, (tuple(parts[last:]),)


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


def _describe(
    name: str,
    body: Any,
    images: Tensor,
    stem: tuple[str, ...],
    stages: tuple[tuple[str, ...], ...],
    finish: tuple[str, ...],
    num_classes: int,
    arguments: dict[str, Any],
) -> NetworkParts:
    if isinstance(getattr(body, "patch_drop", None), nn.Module) and not isinstance(body.patch_drop, nn.Identity):
        raise NetworkError(f"network {name!r} drops patches while training, so its maps have holes: patch_drop_rate: 0")
    with torch.no_grad():
        entered = x = run_parts(body, stem, images)
        between = [x := run_parts(body, stage, x) for stage in stages]
        x = run_parts(body, finish, x)
        embedding = body.forward_head(x, pre_logits=True)
        if embedding.dim() != 2:
            raise NetworkError(f"network {name!r} gives an embedding of {embedding.dim()} axes, two are needed")
    head = operations(body, x, lambda: body.forward_head(x))
    one_head = same_operations(head, body, x, lambda: body.get_classifier()(body.forward_head(x, pre_logits=True)))
    prefix_tokens = int(getattr(body, "num_prefix_tokens", 0)) if between[-1].dim() == 3 else 0
    prefix = tuple(
        key for key in ("cls_token", "dist_token", "reg_token") if isinstance(getattr(body, key, None), nn.Parameter)
    )
    if sum(getattr(body, key).shape[1] for key in prefix) != prefix_tokens:
        raise NetworkError(f"network {name!r} has {prefix_tokens} class tokens, found {', '.join(prefix) or 'none'}")
    layout = _layout(between)
    stem_layout = _stem_layout(body, stem, images, entered, layout)
    specs = [
        _stage(name, body, number, parts, y, layout, prefix_tokens, images.shape[-1])
        for number, (parts, y) in enumerate(zip(stages, between, strict=True), start=1)
    ]
    try:
        stem_spec = _stage(name, body, 0, (), entered, stem_layout, prefix_tokens, images.shape[-1])
    except NetworkError:  # not a square map: the stem is not served
        stem_spec = None
    activations = _activations(body, stages, entered)
    serves = EVERY_NETWORK if stem_spec else EVERY_NETWORK & ~Signal.STEM
    if one_head and x.dim() == between[-1].dim() and _averages(body, head, layout, x):
        serves |= Signal.CLASS_MAPS
    if activations:
        serves |= Signal.PRE_ACTIVATIONS
    spec = OutputSpec(num_classes, embedding.shape[1], tuple(specs), images.shape[-1], prefix_tokens, stem_spec, serves)
    return NetworkParts(stem, stages, finish, layout, stem_layout, activations, prefix, one_head, arguments, spec)


def _stage(
    name: str,
    body: Any,
    number: int,
    parts: tuple[str, ...],
    y: Tensor,
    layout: MapLayout,
    prefix_tokens: int,
    side: int,
) -> StageSpec:
    """Return the shape of a stage's map, or (number 0, no parts) of the first stage's input; `side` is the images'."""
    if y.dim() not in (3, 4):
        raise NetworkError(f"network {name!r} holds {y.dim()} axes in stage {number}, a map or tokens are needed")
    tokens = y.shape[1] - prefix_tokens if layout == "NLC" else y.shape[1 if layout == "NHWC" else 2] ** 2
    map_side = math.isqrt(tokens)
    # feature_info's stride if it fits the size, else the computed stride
    strides = {entry["reduction"] for entry in body.feature_info if (entry["module"],) == parts[-1:]}
    fits = [s for s in (*strides, -(-side // map_side)) if -(-side // s) == map_side]
    if not fits or map_side**2 != tokens:
        raise NetworkError(
            f"network {name!r} at {side} pixels has no whole stride in stage {number} ({tokens} positions): "
            f"use an image_size that is a multiple of 32"
        )
    channels = y.shape[1] if layout == "NCHW" else y.shape[-1]
    return StageSpec(channels, int(fits[0]), _kind([attrgetter(part)(body) for part in parts]))


def _layout(maps: list[Tensor]) -> MapLayout:
    if maps[-1].dim() == 3:
        return "NLC"
    # square images: H = W
    return "NHWC" if any(y.shape[1] == y.shape[2] != y.shape[3] for y in maps) else "NCHW"


def _stem_layout(body: Any, stem: tuple[str, ...], images: Tensor, entered: Tensor, layout: MapLayout) -> MapLayout:
    """Return the layout of the stem's output (PVTv2's differs from the stages'); if H = W = C, try a wider image."""
    if entered.dim() == 4 and len(set(entered.shape[1:])) == 1:
        try:
            with torch.no_grad():
                wide = run_parts(body, stem, torch.cat([images, images], dim=3))
        except Exception:  # noqa: BLE001 - a stem for a fixed size raises any exception
            return layout
        return "NHWC" if wide.shape[1] < wide.shape[2] else "NCHW"
    return _layout([entered])


def _averages(body: Any, head: list[tuple[str, ...]], layout: MapLayout, x: Tensor) -> bool:
    """Return whether the head is a mean over positions and a linear layer, so that the two may be swapped."""
    classifier = body.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return False
    reshaping = ["view", "reshape", "flatten", "squeeze", "aten.t.", "transpose", "permute", "detach", "alias", "clone"]
    if layout == "NLC":
        reshaping.append("slice")  # the mean excludes class tokens
    calls = [call for call in head if not call[0].startswith("aten.") or not any(word in call[0] for word in reshaping)]
    if len(calls) != 2 or "mean" not in calls[0][0] or not calls[1][0].startswith(("aten.addmm", "aten.mm")):
        return False
    dims = {int(dim) % x.dim() for dim in calls[0][2:] if re.fullmatch(r"-?\d+", dim)}
    return dims == {"NCHW": {2, 3}, "NHWC": {1, 2}, "NLC": {1}}[layout]


def _activations(body: Any, stages: tuple[tuple[str, ...], ...], x: Tensor) -> tuple[tuple[str, str], ...]:
    """Return each stage's last ReLU and the BatchNorm before it; empty if any stage ends differently."""
    found = []
    with torch.no_grad():
        for parts in stages:
            pair, x = _last_activation(body, parts, x)
            if pair is None:
                return ()
            found.append(pair)
    return tuple(found)


def _last_activation(body: Any, parts: tuple[str, ...], x: Tensor) -> tuple[tuple[str, str] | None, Tensor]:
    """Return the dotted names, or None, and the stage's output."""
    recorder = Recorder(body, x)
    entered: dict[str, str] = {}  # operation before each ReLU; recorded on entry, since a ReLU may work in place
    called: list[tuple[str, Any]] = []

    def enter(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        entered[name] = recorder.labels.get(id(given[0]), "")

    def leave(name: str, _module: nn.Module, _given: tuple[Tensor, ...], result: Any) -> None:
        called.append((name, result))

    hooks = []
    for name, module in body.named_modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        with recorder:
            result = run_parts(body, parts, x)
    finally:
        for hook in hooks:
            hook.remove()
    if not called or called[-1][1] is not result:
        return None, result
    relu = called[-1][0]
    calls = {f"{i}.0": call for i, call in enumerate(recorder.calls, start=1)}
    before = calls.get(entered[relu])
    if before is not None and before[0].startswith(
        "aten.add"
    ):  # the residual branch is the first operand, the shortcut the second
        before = next((calls[key] for key in before[1:] if "batch_norm" in calls.get(key, ("",))[0]), None)
    norm = before[2].rpartition(".")[0] if before is not None and "batch_norm" in before[0] else ""
    if not isinstance(dict(body.named_modules()).get(norm), nn.BatchNorm2d):
        return None, result
    return (relu, norm), result


def _kind(modules: list[nn.Module]) -> Kind:
    """Return attention if any module has heads, mlp if linear layers are the only token mixing, else cnn."""
    inside = [module for top in modules for module in top.modules()]
    if any(hasattr(module, "num_heads") for module in inside):
        return "attention"
    spatial = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)
    if any(isinstance(m, nn.Linear) for m in inside) and not any(isinstance(m, spatial) for m in inside):
        return "mlp"
    return "cnn"
