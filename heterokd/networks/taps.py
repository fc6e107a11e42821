"""Taps: the places where a network that is not split by structure gives its stages and its embedding.

The network runs as it is, and the outputs of its modules are read. Stages are the cuts of its dataflow (`dataflow`),
from which it can also be run (`entry`), or the maps of timm's `forward_intermediates`. A network without four maps
gives logits and embedding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from heterokd.errors import NetworkError, did_you_mean
from heterokd.networks.body_types import TimmBody
from heterokd.networks.dataflow import Flow, ModuleCall, logits_of, record, record_forward
from heterokd.networks.entry import Entry, entry_of
from heterokd.networks.parts import MapLayout, kind_of
from heterokd.networks.points import Point, choose_points, map_points, module_point, stage_ends
from heterokd.outputs import Kind, OutputSpec, Signal, StageSpec

PREFIXES = ("cls_token", "dist_token", "reg_token")
"""Names of the parameters of class, distillation and register tokens, in order."""


@dataclass(frozen=True, eq=False)
class Tap:
    """The end of a stage.

    Attributes:
        module: dotted name of the module whose output is the stage's map.
        tensor: position of the map among the tensors of the output.
        layout: its layout.
        prefix_tokens: number of class tokens before its tokens.
        is_overwritten: whether the network changes the map in place afterwards.
        entry: how the network is run from there on; None if it cannot be.
    """

    module: str
    tensor: int
    layout: MapLayout
    prefix_tokens: int
    is_overwritten: bool
    entry: Entry | None


@dataclass(frozen=True, eq=False)
class TapParts:
    """Where a network gives its outputs.

    Attributes:
        classifiers: dotted names of the last classifiers, whose concatenated inputs are the embedding.
        taps: ends of the four stages; empty if `intermediates` gives the stages, or if there are none.
        intermediates: numbers of the four maps of `forward_intermediates`.
        prefix: names of the parameters of the class tokens.
        arguments: timm's arguments, with the image size if the network takes it.
        spec: shapes of the outputs.
        embedding: dotted name of a module whose output is the embedding instead; None if there is none.
        one_head: whether the logits are the output of the only classifier, and its input the embedding.
    """

    classifiers: tuple[str, ...]
    taps: tuple[Tap, ...]
    intermediates: tuple[int, ...]
    prefix: tuple[str, ...]
    arguments: Mapping[str, object]
    spec: OutputSpec
    embedding: str | None = None
    one_head: bool = False


@dataclass(frozen=True)
class TapNames:
    """Modules that the option `taps` names.

    Attributes:
        stages: dotted names of four modules, whose outputs are the stages; empty: they are looked for.
        embedding: dotted name of the module whose output is the embedding; None: it is looked for.
    """

    stages: tuple[str, ...] = ()
    embedding: str | None = None


NO_NAMES = TapNames()


def read_tap_names(name: str, taps: object) -> TapNames:
    """Check the option `taps` of a network.

    Raises:
        NetworkError: it has other keys or values.
    """
    if taps is None:
        return NO_NAMES
    content = dict(taps) if isinstance(taps, Mapping) else {"": taps}
    stages, embedding = content.pop("stages", []), content.pop("embedding", None)
    is_list = isinstance(stages, list) and len(stages) in (0, 4) and all(isinstance(each, str) for each in stages)
    if content or not is_list or not isinstance(embedding, str | None):
        raise NetworkError(
            f"network {name!r}: taps: write {{stages: [four names of modules], embedding: NAME}}; either can be omitted"
        )
    return TapNames(tuple(cast(list[str], stages)), embedding)


def describe_taps(
    name: str,
    body: nn.Module,
    images: Tensor,
    num_classes: int,
    arguments: Mapping[str, object],
    named: TapNames = NO_NAMES,
) -> TapParts:
    """Run a network on the meta device and find its taps, except those that are `named`.

    Raises:
        NetworkError: it does not give logits [B, K], or a named module gives no map or embedding.
    """
    try:
        flow = record_forward(body, images)
    except NetworkError as error:
        raise NetworkError(f"network {name!r}: {error}") from None
    logits = logits_of(flow.output)
    if tuple(logits.shape) != (len(images), num_classes):
        raise NetworkError(
            f"network {name!r} gives a tensor of shape {tuple(logits.shape)} for {len(images)} images, logits "
            f"{[len(images), num_classes]} are needed"
        )
    classifiers = _classifiers(body, flow, num_classes)
    embedded = [call.given for call in flow.modules if call.module in classifiers and call.given is not None]
    if named.embedding is not None:
        embedded = [named_call(name, flow, named.embedding, "embedding").tensors[0]]
    dim = sum(as_embedding(given).shape[1] for given in embedded)
    serves = Signal.LOGITS | (Signal.EMBEDDING if dim else Signal.NONE)
    spec = OutputSpec(num_classes, dim, (), images.shape[-1], serves=serves, body_kind=kind_of([body]))
    last = [call for call in flow.modules if call.module in classifiers]
    one_head = named.embedding is None and [call.labels for call in last] == [(flow.result,)]
    parts = TapParts(classifiers, (), (), (), arguments, spec, named.embedding, one_head and embedded[0].dim() == 2)
    if named.stages:
        return _with_taps(body, images, flow, parts, _named_points(name, body, flow, named.stages))
    return _with_stages(body, images, flow, parts)


def named_call(name: str, flow: Flow, module: str, key: str) -> ModuleCall:
    """Return the call of a module that `taps` names.

    Raises:
        NetworkError: no such module runs once and gives a tensor.
    """
    calls = [call for call in flow.modules if call.module == module]
    if not calls:
        known = {call.module for call in flow.modules}
        raise NetworkError(f"network {name!r}: taps.{key}: no module {module!r} runs; {did_you_mean(module, known)}")
    if len(calls) > 1 or not calls[0].tensors:
        reason = f"runs {len(calls)} times" if len(calls) > 1 else "gives no tensor"
        raise NetworkError(f"network {name!r}: taps.{key}: module {module!r} {reason}; name another module")
    return calls[0]


def _named_points(name: str, body: nn.Module, flow: Flow, modules: tuple[str, ...]) -> list[Point]:
    """Return the maps of the modules that `taps` names.

    Raises:
        NetworkError: a module gives no square map, or the modules are not in order.
    """
    points = []
    for module in modules:
        point = module_point(body, flow, named_call(name, flow, module, "stages"))
        if point is None:
            raise NetworkError(f"network {name!r}: taps.stages: module {module!r} gives no square map or tokens")
        points.append(point)
    order = [point.call.end for point in points]
    if order != sorted(set(order)):
        raise NetworkError(f"network {name!r}: taps.stages: {', '.join(modules)} do not run in this order")
    return points


def as_embedding(given: Tensor) -> Tensor:
    """Return a classifier's input as an embedding [B, D]: maps and tokens are averaged over their positions."""
    if given.dim() == 4:
        return given.mean(dim=(2, 3))
    return given.mean(dim=1) if given.dim() == 3 else given


def _classifiers(body: nn.Module, flow: Flow, num_classes: int) -> tuple[str, ...]:
    """Return the classifiers that timm names, or else the last linear layer or convolution to the classes."""
    known = getattr(body, "get_classifier", None)
    found = nn.ModuleList(_modules(known())) if callable(known) else nn.ModuleList()
    members = {id(module) for module in found}
    called = [call for call in flow.modules if call.given is not None and call.labels]
    ours = [call for call in called if id(body.get_submodule(call.module)) in members]
    # two heads on the same tensor (distilled LeViT) give it once
    named = list({id(call.given): call.module for call in reversed(ours)}.values())[::-1]
    if named:
        return tuple(named)
    linear = [
        call.module
        for call in called
        if isinstance(body.get_submodule(call.module), nn.Linear | nn.Conv2d)
        and num_classes in call.tensors[0].shape[1:]
    ]
    return tuple(linear[-1:])


def _modules(classifier: object) -> list[nn.Module]:
    if isinstance(classifier, nn.ModuleList | tuple | list):
        return [module for module in classifier if isinstance(module, nn.Module)]
    return [classifier] if isinstance(classifier, nn.Module) else []


def _with_stages(body: nn.Module, images: Tensor, flow: Flow, parts: TapParts) -> TapParts:
    """Add the stages that the network gives, and its tail if it can be run from all of them."""
    named = [str(entry.get("module")) for entry in getattr(body, "feature_info", None) or ()]
    points = choose_points(map_points(body, flow, named), named)
    reordered = hasattr(body, "reroll")  # Hiera's tokens are in the order of its mask units
    if reordered or not points or _largest_share(points, flow) > LARGEST_SHARE:
        points = []
        found = _intermediates(body, images, flow)
        if found is not None:
            indices, maps = found
            kinds = [parts.spec.body_kind] * 4
            shapes = [(stage_map.shape[1], stage_map.shape[2]) for stage_map in maps]
            return replace(parts, intermediates=indices, spec=_spec(parts.spec, shapes, kinds))
    return _with_taps(body, images, flow, parts, points) if points else parts


def _with_taps(body: nn.Module, images: Tensor, flow: Flow, parts: TapParts, points: list[Point]) -> TapParts:
    """Add the stages that end at some maps, and the tail if the network can be run from all of them."""
    taps = tuple(
        Tap(
            point.call.module,
            point.call.labels.index(point.label),
            point.layout,
            point.prefix_tokens,
            flow.is_overwritten(point.label),
            entry_of(body, flow, point, images) if point.label in flow.cuts else None,
        )
        for point in points
    )
    spec = _spec(parts.spec, [(point.channels, point.side) for point in points], _kinds(body, flow, points))
    spec = replace(spec, prefix_tokens=max(point.prefix_tokens for point in points))
    parameters = dict(body.named_parameters())
    prefix = tuple(key for name in PREFIXES for key in (name, f"embeds.{name}") if key in parameters)
    with_tokens = [point for point in points if point.prefix_tokens]
    tokens = [parameters[key] for key in prefix] if with_tokens else []
    has_tokens = all(
        sum(token.shape[-2] for token in tokens) == point.prefix_tokens
        and all(token.shape[-1] == point.channels for token in tokens)
        for point in with_tokens
    )
    if has_tokens and all(tap.entry is not None for tap in taps):
        spec = replace(spec, serves=spec.serves | Signal.TAIL)
    return replace(parts, taps=taps, prefix=prefix, spec=spec)


LARGEST_SHARE = 0.8
"""Largest share of a network's operations in a stage, or after the last stage, that is taken for a good division."""


def _largest_share(points: list[Point], flow: Flow) -> float:
    """Return the largest share of the operations before the head that lies in stage 2, 3 or 4 or after them."""
    ends = [int(point.label[1:].partition(".")[0]) for point in points] + [flow.features_end]
    return max(b - a for a, b in pairwise(ends)) / flow.features_end


def _intermediates(body: nn.Module, images: Tensor, flow: Flow) -> tuple[tuple[int, ...], list[Tensor]] | None:
    """Return the numbers of four maps of timm's `forward_intermediates`, and the maps; None if it has not four."""
    maps: list[Tensor] = []

    def run() -> object:
        last, found = cast(TimmBody, body).forward_intermediates(images, output_fmt="NCHW")
        maps.extend(found)
        return cast(TimmBody, body).forward_head(last)

    try:
        again = record(body, images, run, with_modules=False)
    except Exception:  # noqa: BLE001 - not every network has it, or it raises any exception
        return None
    if again.signature("given") != flow.signature("given") or len(maps) < 4:
        return None
    if any(each.dim() != 4 or each.shape[2] != each.shape[3] for each in maps):
        return None
    ends = stage_ends([each.shape[2] for each in maps])
    return tuple(ends), [maps[i] for i in ends]


def _kinds(body: nn.Module, flow: Flow, points: list[Point]) -> list[Kind]:
    """Return the kind of each stage, from the modules that run in it."""
    kinds: list[Kind] = []
    start = 0
    for point in points:
        end = int(point.label[1:].partition(".")[0])
        inside = [call.module for call in flow.modules if call.start >= start and call.end <= end]
        kinds.append(kind_of([body.get_submodule(module) for module in inside]))
        start = end
    return kinds


def _spec(spec: OutputSpec, shapes: list[tuple[int, int]], kinds: list[Kind]) -> OutputSpec:
    """Add stages, given as channels and sides."""
    stages = []
    for (channels, side), kind in zip(shapes, kinds, strict=True):
        stride = -(-spec.image_size // side)
        fits = -(-spec.image_size // stride) == side
        stages.append(
            StageSpec(channels, stride if fits else round(spec.image_size / side), kind, None if fits else side)
        )
    return replace(spec, stages=tuple(stages), serves=spec.serves | Signal.STAGES)
