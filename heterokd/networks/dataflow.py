"""Dataflow of a forward: what its modules give, and which outputs are all that the rest of the network reads.

A forward is recorded on the meta device (shapes without memory). An output is a *cut* if every path from the images to
the logits passes through it: the network can be run from there on. Nothing depends on the names of a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from heterokd.errors import NetworkError
from heterokd.networks.operations import Operation, Recorder, operations

BATCH = 2
"""Number of images of a recorded forward."""


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a module.

    Attributes:
        module: dotted name.
        parents: dotted names of the modules that called it, outermost first.
        start: number of operations before it.
        end: number of operations at its end.
        given: its first argument, if it is a tensor.
        value: its output: a tensor, or tensors and other values in tuples, lists and dicts.
        labels: labels of the tensors in its output, in order.
    """

    module: str
    parents: tuple[str, ...]
    start: int
    end: int
    given: Tensor | None
    value: object
    labels: tuple[str, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in its output."""
        return tuple(leaf for leaf in tree_leaves(self.value) if isinstance(leaf, Tensor))


@dataclass(frozen=True, eq=False)
class Flow:
    """A recorded forward.

    Attributes:
        operations: in order.
        modules: calls of modules, in the order in which they end.
        result: label of the output; None if it is no tensor of an operation.
        features_end: number of operations before `forward_head`; of all operations if the body has none.
        output: the output.
    """

    operations: list[Operation]
    modules: list[ModuleCall]
    result: str | None
    features_end: int
    output: object

    @cached_property
    def dependent(self) -> set[int]:
        """Numbers of the operations whose results depend on the images; 0 stands for the images."""
        found = {0}
        for number, operation in enumerate(self.operations, start=1):
            if any(_number(operand) in found for operand in operation[1:]):
                found.add(number)
        return found

    @cached_property
    def cuts(self) -> set[str]:
        """Labels of the tensors that every path from the images to the output passes through."""
        last_read = [0] * (len(self.operations) + 1)  # of the results of each operation
        split = set()  # operations with several results that are read
        for number, operation in enumerate(self.operations, start=1):
            for operand in operation[1:]:
                made = _number(operand)
                if made in self.dependent:
                    last_read[made] = number
                    if made and not operand.endswith(".0"):
                        split.add(made)
        found, latest = set(), last_read[0]
        for number in range(1, len(self.operations) + 1):
            if latest <= number and number in self.dependent - split:
                found.add(f"#{number}.0")
            latest = max(latest, last_read[number])
        return found

    def depends(self, label: str) -> bool:
        """Whether a tensor depends on the images."""
        return _number(label) in self.dependent

    def is_overwritten(self, label: str) -> bool:
        """Whether an operation changes the tensor in place, as `ReLU(inplace=True)` does."""
        return any(
            operation[1:2] == (label,) and operation[0].split(".")[1].endswith("_") for operation in self.operations
        )

    def signature(self, label: str) -> int:
        """Return a hash of how the output is computed from the tensor `label`: equal hashes mean equal operations."""
        hashes: dict[int, int] = {}

        def operand_hash(operand: str) -> str:
            if operand == label:
                return "entered"
            number = _number(operand)
            return operand if number is None or number == 0 else f"{hashes[number]}.{operand.rpartition('.')[2]}"

        for number, operation in enumerate(self.operations, start=1):
            hashes[number] = hash((operation[0], *map(operand_hash, operation[1:])))
        return hash(operand_hash(self.result or ""))


def _number(label: str) -> int | None:
    """Return the number of the operation that made a tensor, 0 for the images, None for weights and other values."""
    if label == "given":
        return 0
    return int(label[1:].partition(".")[0]) if label.startswith("#") else None


def record_forward(body: nn.Module, images: Tensor) -> Flow:
    """Record the forward of a body in evaluation mode.

    The body has run before, so that it holds what it keeps for further calls, such as position biases.

    Raises:
        Exception: any exception of the body.
    """
    whole = record(body, images, lambda: logits_of(body(images)))
    features = getattr(body, "forward_features", None)
    if not callable(features) or not callable(getattr(body, "forward_head", None)):
        return whole
    try:
        part = operations(body, images, lambda: features(images))
    except Exception:  # noqa: BLE001 - `forward` may call it in another way, with any exception here
        return whole
    return replace(whole, features_end=len(part)) if part == whole.operations[: len(part)] else whole


def logits_of(output: object) -> Tensor:
    """Return the logits in the output of a forward.

    That is the output, its attribute `logits` (HF transformers), or its item "out" (torchvision's segmentation).

    Raises:
        NetworkError: the output is something else.
    """
    logits = output.get("out", output) if isinstance(output, dict) else output
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        raise NetworkError(f"the network gives {type(output).__name__}, a tensor of logits [B, K] is needed")
    return logits


def record(body: nn.Module, given: Tensor, run: Callable[[], object], *, with_modules: bool = True) -> Flow:
    """Record `run`, which runs `body` or a part of it on `given`; without `with_modules`, operations alone."""
    recorder = Recorder(body, given)
    running: list[tuple[str, int]] = []
    modules: list[ModuleCall] = []

    def label(tensor: Tensor) -> str:
        recorder.kept.append(tensor)
        return recorder.labels.get(id(tensor), "new")

    def enter(name: str, _module: nn.Module, _given: tuple[object, ...]) -> None:
        running.append((name, len(recorder.calls)))

    def leave(name: str, _module: nn.Module, given: tuple[object, ...], value: object) -> None:
        _, start = running.pop()
        first = given[0] if given and isinstance(given[0], Tensor) else None
        labels = tuple(label(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        parents = tuple(parent for parent, _ in running)
        modules.append(ModuleCall(name, parents, start, len(recorder.calls), first, value, labels))

    hooks = []
    for name, module in body.named_modules() if with_modules else ():
        if name:
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        with torch.no_grad(), recorder:
            output = run()
    finally:
        for hook in hooks:
            hook.remove()
    result = recorder.labels.get(id(output)) if isinstance(output, Tensor) else None
    return Flow(recorder.calls, modules, result, len(recorder.calls), output)
