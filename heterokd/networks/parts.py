"""Parts of a split timm classifier: their names, how they run, and the shapes of their outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor, nn

from heterokd.networks.body_types import TimmBody, classifier_of
from heterokd.networks.operations import Operation, Recorder, operations, same_operations
from heterokd.outputs import EVERY_NETWORK, Kind, OutputSpec, Signal, StageSpec

MapLayout = Literal["NCHW", "NHWC", "NLC"]


class NotSplit(Exception):
    """A network does not consist of the parts that were looked for; it is then read by `taps`."""


@dataclass(frozen=True)
class Cut:
    """Dotted names of the callables of a body, run in order.

    Attributes:
        stem: callables before the first stage.
        stages: callables of each of the four stages.
        finish: callables between the last stage and `forward_head`.
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    finish: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """All names, in order."""
        return (*self.stem, *chain(*self.stages), *self.finish)


@dataclass(frozen=True)
class NetworkParts(Cut):
    """Parts of a network, and their outputs.

    Attributes:
        layout: layout of the body's tensors between its stages: maps [B, C, H, W] or [B, H, W, C], or tokens [B, N, C].
        stem_layout: layout of the first stage's input.
        activations: dotted names of each stage's last ReLU and of the BatchNorm before it; empty unless all four have
            them.
        prefix: names of the parameters of the class, distillation and register tokens, in order.
        one_head: whether the logits are the classifier of the embedding (False for two-headed networks).
        arguments: timm's arguments, with the image size if the network takes it.
        spec: shapes of the outputs.
    """

    layout: MapLayout
    stem_layout: MapLayout
    activations: tuple[tuple[str, str], ...]
    prefix: tuple[str, ...]
    one_head: bool
    arguments: Mapping[str, object]
    spec: OutputSpec


def run_parts(body: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Run `x` through the named parts of `body`; they are looked up in each call, since SyncBN may replace them."""
    return reduce(lambda value, name: attrgetter(name)(body)(value), names, x)


def describe_parts(
    body: TimmBody, images: Tensor, cut: Cut, num_classes: int, arguments: Mapping[str, object]
) -> NetworkParts:
    """Run a cut network on the meta device and describe its parts.

    Raises:
        NotSplit: the parts give no maps, tokens or embedding that `Outputs` can hold.
    """
    with torch.no_grad():
        entered = x = run_parts(body, cut.stem, images)
        maps = [x := run_parts(body, stage, x) for stage in cut.stages]
        last = run_parts(body, cut.finish, x)
        embedding = body.forward_head(last, pre_logits=True)
    if embedding.dim() != 2:
        raise NotSplit(f"its embedding has {embedding.dim()} axes")
    head = operations(body, last, lambda: body.forward_head(last))
    one_head = same_operations(head, body, last, lambda: classifier_of(body)(body.forward_head(last, pre_logits=True)))
    prefix = tuple(
        key for key in ("cls_token", "dist_token", "reg_token") if isinstance(getattr(body, key, None), nn.Parameter)
    )
    prefix_tokens = int(getattr(body, "num_prefix_tokens", 0)) if maps[-1].dim() == 3 else 0
    if sum(getattr(body, key).shape[1] for key in prefix) != prefix_tokens:
        raise NotSplit(f"{prefix_tokens} class tokens, found {', '.join(prefix) or 'none'}")
    layout = _layout(maps)
    stem_layout = _stem_layout(body, cut.stem, images, entered, layout)
    stages = [
        _stage(body, parts, y, layout, prefix_tokens, images.shape[-1])
        for parts, y in zip(cut.stages, maps, strict=True)
    ]
    try:
        stem = _stage(body, (), entered, stem_layout, prefix_tokens, images.shape[-1])
    except NotSplit:  # not a square map: the stem is not served
        stem = None
    activations = _activations(body, cut.stages, entered)
    serves = EVERY_NETWORK if stem else EVERY_NETWORK & ~Signal.STEM
    if one_head and last.dim() == maps[-1].dim() and _averages(body, head, layout, last):
        serves |= Signal.CLASS_MAPS
    if activations:
        serves |= Signal.PRE_ACTIVATIONS
    spec = OutputSpec(num_classes, embedding.shape[1], tuple(stages), images.shape[-1], prefix_tokens, stem, serves)
    return NetworkParts(
        cut.stem, cut.stages, cut.finish, layout, stem_layout, activations, prefix, one_head, arguments, spec
    )


def _stage(
    body: TimmBody, parts: tuple[str, ...], y: Tensor, layout: MapLayout, prefix_tokens: int, side: int
) -> StageSpec:
    """Return the shape of a stage's map, or (no parts) of the first stage's input; `side` is the images'.

    Raises:
        NotSplit: it is not a square map with a whole stride.
    """
    if y.dim() not in (3, 4):
        raise NotSplit(f"an output of {y.dim()} axes")
    tokens = y.shape[1] - prefix_tokens if layout == "NLC" else y.shape[1 if layout == "NHWC" else 2] ** 2
    map_side = math.isqrt(tokens)
    # feature_info's stride if it fits the size, else the computed stride
    strides = {entry["reduction"] for entry in body.feature_info if (entry["module"],) == parts[-1:]}
    fits = [s for s in (*strides, -(-side // map_side)) if -(-side // s) == map_side]
    if not fits or map_side**2 != tokens:
        raise NotSplit(f"no whole stride at {side} pixels ({tokens} positions)")
    channels = y.shape[1] if layout == "NCHW" else y.shape[-1]
    return StageSpec(channels, int(fits[0]), kind_of([attrgetter(part)(body) for part in parts]))


def _layout(maps: list[Tensor]) -> MapLayout:
    if maps[-1].dim() == 3:
        return "NLC"
    # square images: H = W
    return "NHWC" if any(y.shape[1] == y.shape[2] != y.shape[3] for y in maps) else "NCHW"


def _stem_layout(
    body: TimmBody, stem: tuple[str, ...], images: Tensor, entered: Tensor, layout: MapLayout
) -> MapLayout:
    """Return the layout of the stem's output (PVTv2's differs from the stages'); if H = W = C, try a wider image."""
    if entered.dim() == 4 and len(set(entered.shape[1:])) == 1:
        try:
            with torch.no_grad():
                wide = run_parts(body, stem, torch.cat([images, images], dim=3))
        except Exception:  # noqa: BLE001 - a stem for a fixed size raises any exception
            return layout
        return "NHWC" if wide.shape[1] < wide.shape[2] else "NCHW"
    return _layout([entered])


def _averages(body: TimmBody, head: list[Operation], layout: MapLayout, x: Tensor) -> bool:
    """Return whether the head is a mean over positions and a linear layer, so that the two may be swapped."""
    if not isinstance(body.get_classifier(), nn.Linear):
        return False
    reshaping = ["view", "reshape", "flatten", "squeeze", "aten.t.", "transpose", "permute", "detach", "alias", "clone"]
    if layout == "NLC":
        reshaping.append("slice")  # the mean excludes class tokens
    calls = [call for call in head if not call[0].startswith("aten.") or not any(word in call[0] for word in reshaping)]
    if len(calls) != 2 or "mean" not in calls[0][0] or not calls[1][0].startswith(("aten.addmm", "aten.mm")):
        return False
    dims = {int(dim) % x.dim() for dim in calls[0][2:] if re.fullmatch(r"-?\d+", dim)}
    return dims == {"NCHW": {2, 3}, "NHWC": {1, 2}, "NLC": {1}}[layout]


def _activations(body: TimmBody, stages: tuple[tuple[str, ...], ...], x: Tensor) -> tuple[tuple[str, str], ...]:
    """Return each stage's last ReLU and the BatchNorm before it; empty if any stage ends differently."""
    found = []
    with torch.no_grad():
        for parts in stages:
            pair, x = _last_activation(body, parts, x)
            if pair is None:
                return ()
            found.append(pair)
    return tuple(found)


def _last_activation(body: TimmBody, parts: tuple[str, ...], x: Tensor) -> tuple[tuple[str, str] | None, Tensor]:
    """Return the dotted names, or None, and the stage's output."""
    recorder = Recorder(body, x)
    entered: dict[str, str] = {}  # operation before each ReLU; recorded on entry, since a ReLU may work in place
    called: list[tuple[str, object]] = []

    def enter(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        entered[name] = recorder.labels.get(id(given[0]), "")

    def leave(name: str, _module: nn.Module, _given: tuple[Tensor, ...], result: object) -> None:
        called.append((name, result))

    hooks = []
    for name, module in body.named_modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
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
    calls = {f"#{i}.0": call for i, call in enumerate(recorder.calls, start=1)}
    before = calls.get(entered[relu])
    if before is not None and before[0].startswith("aten.add"):
        # The residual branch is the first operand, the shortcut the second.
        before = next((calls[key] for key in before[1:] if "batch_norm" in calls.get(key, ("",))[0]), None)
    norm = before[2].rpartition(".")[0] if before is not None and "batch_norm" in before[0] else ""
    if not isinstance(dict(body.named_modules()).get(norm), nn.BatchNorm2d):
        return None, result
    return (relu, norm), result


def kind_of(modules: list[nn.Module]) -> Kind:
    """Return attention if any module has heads, mlp if linear layers are the only token mixing, else cnn."""
    inside = [module for top in modules for module in top.modules()]
    if any(hasattr(module, "num_heads") or isinstance(getattr(module, "heads", None), int) for module in inside):
        return "attention"
    spatial = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)
    if any(isinstance(m, nn.Linear) for m in inside) and not any(isinstance(m, spatial) for m in inside):
        return "mlp"
    return "cnn"
