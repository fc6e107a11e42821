"""Choose four stages among the maps inside a network, by their resolutions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from heterokd.networks.dataflow import Flow, ModuleCall
from heterokd.networks.parts import MapLayout


@dataclass(frozen=True, eq=False)
class Point:
    """A map inside a network: the output of a module that is called once.

    Attributes:
        call: the outermost module that gives it.
        label: its label in the recorded forward.
        names: dotted names of all modules that give it.
        layout: its layout.
        prefix_tokens: number of class tokens before the tokens of the map.
        channels: C of the map.
        side: height = width of the map, in map pixels.
    """

    call: ModuleCall
    label: str
    names: frozenset[str]
    layout: MapLayout
    prefix_tokens: int
    channels: int
    side: int

    @property
    def depth(self) -> int:
        """Number of dots of the name."""
        return self.call.module.count(".")


def map_points(body: nn.Module, flow: Flow, named: Collection[str]) -> list[Point]:
    """Return the maps before the head that are cuts of the forward, in order.

    Args:
        body: the network.
        flow: its recorded forward.
        named: names of modules that are preferred to others with the same output.
    """
    counts: dict[str, int] = {}
    for call in flow.modules:
        counts[call.module] = counts.get(call.module, 0) + 1
    given: dict[str, list[ModuleCall]] = {}
    for call in flow.modules:
        depending = [label for label in call.labels if flow.depends(label)]
        if counts[call.module] == 1 and len(depending) == 1 and depending[0] in flow.cuts:
            given.setdefault(depending[0], []).append(call)
    end = flow.features_end
    if end == len(flow.operations):  # without `forward_head`, the head begins with the pooling
        pooled = [
            call.start
            for call in flow.modules
            if isinstance(body.get_submodule(call.module), _POOLINGS) and flow.cuts.intersection(call.labels)
        ]
        end = min(pooled, default=end)
    points = []
    for label, calls in given.items():
        made = int(label[1:].partition(".")[0])
        call = min(calls, key=lambda call: (call.module not in named, call.module.count(".")))
        shape = _map_shape(call.tensors[call.labels.index(label)], int(getattr(body, "num_prefix_tokens", 1)))
        is_norm = re.search(r"Norm\d?d?$", type(body.get_submodule(call.module)).__name__)
        if made <= end and shape is not None and not is_norm:
            points.append(Point(call, label, frozenset(call.module for call in calls), *shape))
    return sorted(points, key=lambda point: int(point.label[1:].partition(".")[0]))


_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def _map_shape(tensor: Tensor, known_prefix: int) -> tuple[MapLayout, int, int, int] | None:
    """Return layout, class tokens, channels and side of a tensor; None if it is no square map."""
    shape = tuple(tensor.shape)
    if len(shape) == 4:
        if shape[2] == shape[3]:
            return "NCHW", 0, shape[1], shape[2]
        return ("NHWC", 0, shape[3], shape[1]) if shape[1] == shape[2] else None
    if len(shape) != 3:
        return None
    for prefix in (0, known_prefix):
        side = math.isqrt(max(shape[1] - prefix, 0))
        if side and side**2 == shape[1] - prefix:
            return "NLC", prefix, shape[2], side
    return None


def module_point(body: nn.Module, flow: Flow, call: ModuleCall) -> Point | None:
    """Return the map that a module gives, whether or not it is a cut; None if it gives none."""
    for label, tensor in zip(call.labels, call.tensors, strict=True):
        shape = _map_shape(tensor, int(getattr(body, "num_prefix_tokens", 1)))
        if shape is not None and flow.depends(label):
            return Point(call, label, frozenset({call.module}), *shape)
    return None


def choose_points(points: Sequence[Point], named: Collection[str]) -> list[Point]:
    """Choose the ends of four stages; none if the maps are too few.

    Args:
        points: the maps, in order.
        named: dotted names of the modules that timm's `feature_info` lists; four of them are preferred to others.
    """
    listed = [point for point in points if point.names & set(named)]
    if len(listed) >= 4:
        return [listed[i] for i in stage_ends([point.side for point in listed])]
    for depth in (1, 2, 3, 4):
        pool = [point for point in points if point.depth <= depth]
        resolutions = len({point.side for point in pool})
        if len(pool) >= (4 if resolutions > 2 else MANY):
            chosen = [pool[i] for i in stage_ends([point.side for point in pool])]
            ends = _extended(chosen, points)
            return [point if point in listed else end for point, end in zip(chosen, ends, strict=True)]
    return []


MANY = 8
"""Least number of maps of one or two resolutions, not listed by timm, that are taken for the outputs of blocks."""


def _extended(chosen: Sequence[Point], points: Sequence[Point]) -> list[Point]:
    """Move the end of each resolution to its last map of the same shape, which may be deeper in the tree of modules."""
    extended = []
    for number, point in enumerate(chosen):
        following = chosen[number + 1] if number < 3 else None
        like = [point]
        for other in points[points.index(point) + 1 :]:
            if other is following or other.side != point.side:
                break
            if other.channels == point.channels and (following is None or following.side != point.side):
                like.append(other)
        extended.append(like[-1])
    return extended


def stage_ends(sides: Sequence[int]) -> list[int]:
    """Return the positions of the four maps that end the stages.

    Of four or more resolutions, the last map of each of the last four. Of fewer, the resolutions with most maps are
    divided; a single one in proportion to 2-2-6-2 of twelve.

    Args:
        sides: sides of at least four maps, shallow to deep.

    >>> stage_ends([32, 16, 16, 8, 4, 2]), stage_ends([8] * 12), stage_ends([8, 8, 4, 4, 4, 4, 2])
    ([2, 3, 4, 5], [1, 3, 9, 11], [1, 3, 5, 6])
    """
    runs: list[list[int]] = []
    for position, side in enumerate(sides):
        if position and side == sides[position - 1]:
            runs[-1].append(position)
        else:
            runs.append([position])
    if len(runs) >= 4:
        return [run[-1] for run in runs[-4:]]
    if len(runs) == 1:
        return [end - 1 for end in (*twelfths(len(sides)), len(sides))]
    parts = [1] * len(runs)
    while sum(parts) < 4:
        parts[max(range(len(runs)), key=lambda i: len(runs[i]) / parts[i])] += 1
    ends = []
    for run, count in zip(runs, parts, strict=True):
        ends += [run[len(run) * part // count - 1] for part in range(1, count + 1)]
    return ends


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
