"""Record a network's operations on the meta device, to compare two ways of running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Operation = tuple[str, ...]
"""Name of an operation, and the weight or earlier operation of each operand."""


def same_operations(native: list[Operation], body: nn.Module, given: Tensor, run: Callable[[], object]) -> bool:
    """Return whether `run` performs exactly the operations `native`."""
    try:
        return native == operations(body, given, run)
    except Exception:  # noqa: BLE001 - mismatched parts raise any exception
        return False


def operations(body: nn.Module, given: Tensor, run: Callable[[], object]) -> list[Operation]:
    """Return the operations of `run` in order, each with its name and operands."""
    recorder = Recorder(body, given)
    with torch.no_grad(), recorder:
        run()
    return recorder.calls


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records each operation and executes it."""

    def __init__(self, body: nn.Module, given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = {id(given): "given"}
        self.labels |= {id(t): key for key, t in [*body.named_parameters(), *body.named_buffers()]}
        self.calls: list[Operation] = []
        self.kept: list[Tensor] = []  # an id is unique only while its tensor is alive

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Record and execute an operation."""
        self.calls.append((str(func), *(self._label(operand) for operand in _flat((args, kwargs or {})))))
        result = func(*args, **(kwargs or {}))
        for i, value in enumerate(_flat(result)):
            if isinstance(value, Tensor):
                self.labels[id(value)] = f"#{len(self.calls)}.{i}"  # no number looks like this
                self.kept.append(value)
        return result

    def _label(self, operand: object) -> str:
        if isinstance(operand, Tensor):
            self.kept.append(operand)
            return self.labels.get(id(operand), f"new {tuple(operand.shape)}")
        return repr(operand)


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key])
    else:
        yield value
