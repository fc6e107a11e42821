"""Run a network from the output of one of its modules on: what comes before is replaced, not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from heterokd.networks.dataflow import BATCH, Flow, ModuleCall, logits_of, record
from heterokd.networks.points import Point


@dataclass(frozen=True, eq=False)
class Entry:
    """A place where a network is entered.

    Attributes:
        module: dotted name of the module whose output is replaced.
        value: its output on the meta device, for `BATCH` images.
        before: names and outputs of the calls of modules that are replaced by zeros.
    """

    module: str
    value: object
    before: tuple[tuple[str, object], ...]


def entry_of(body: nn.Module, flow: Flow, point: Point, images: Tensor) -> Entry | None:
    """Return how a network is entered after a map; None if the rest would then compute anything else."""
    around = {"", *point.call.parents}

    def is_replaced(call: ModuleCall) -> bool:
        """Whether a module runs before the map, on images, and is no part of another that does."""
        outside = (call.parents or ("",))[-1] in around and call.module not in around
        return outside and call.module != point.call.module and call.end <= point.call.start and _on_images(call)

    def _on_images(call: ModuleCall) -> bool:
        return bool(call.labels) and all(flow.depends(label) for label in call.labels)

    before = tuple((call.module, call.value) for call in flow.modules if is_replaced(call))
    entry = Entry(point.call.module, point.call.value, before)
    tensor = point.call.tensors[point.call.labels.index(point.label)]
    entered = torch.empty_like(tensor)
    try:
        again = record(
            body, entered, lambda: logits_of(enter(body, entry, entered, images.shape[1:])), with_modules=False
        )
    except Exception:  # noqa: BLE001 - a forward that needs what was replaced raises any exception
        return None
    return entry if again.signature("given") == flow.signature(point.label) else None


def enter(body: nn.Module, entry: Entry, x: Tensor, shape: torch.Size) -> object:
    """Run a body with `x` as the output of the entry's module; `shape` is [C, H, W] of its images.

    The modules before it are not run: their statistics, random numbers and gradients are unchanged.
    """

    def zeros(value: Tensor) -> Tensor:
        return x.new_zeros((value.shape[0] * len(x) // BATCH, *value.shape[1:]))

    outputs: dict[str, list[object]] = {}
    for name, value in entry.before:
        outputs.setdefault(name, []).append(tree_map_only(Tensor, zeros, value))
    outputs[entry.module] = [tree_map_only(Tensor, lambda _: x, entry.value)]
    with _replaced(body, outputs):
        return body(x.new_zeros((len(x), *shape)))


@contextmanager
def _replaced(body: nn.Module, outputs: dict[str, list[object]]) -> Iterator[None]:
    """Let the first calls of the named modules return `outputs`; further calls run as usual."""
    attributes = [vars(body.get_submodule(name)) for name in outputs]
    before = [dict(each) for each in attributes]

    def returning(values: list[object], usual: Callable[..., object]) -> Callable[..., object]:
        left = iter(values)

        def forward(*args: object, **options: object) -> object:
            for value in left:
                return value
            return usual(*args, **options)

        return forward

    for (name, values), each in zip(outputs.items(), attributes, strict=True):
        each["forward"] = returning(values, body.get_submodule(name).forward)
    try:
        yield
    finally:
        for each, held in zip(attributes, before, strict=True):
            del each["forward"]
            each.update({key: value for key, value in held.items() if key == "forward"})
