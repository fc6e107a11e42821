"""NetworkTail: a classifier from a stage to its logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from heterokd.errors import PairError
from heterokd.networks.parts import MapLayout
from heterokd.outputs import Outputs, OutputSpec, Signal


class Resumable(Protocol):
    """A network that can be run from each stage on; y is the body's tensor, in the body's layout."""

    name: str
    spec: OutputSpec

    def prefix_tokens_at(self, stage: int) -> int:
        """Return the number of class tokens in the output of a stage (0: the stem)."""
        ...

    def to_map(self, y: Tensor, stage: int) -> Tensor:
        """Convert the body's tensor after a stage to a map [B, C, H, W] without class tokens."""
        ...

    def from_map(self, x: Tensor, stage: int, prefix: Tensor | None) -> Tensor:
        """Invert `to_map`; without a `prefix` the class tokens are the network's parameters."""
        ...

    def run_stage(self, y: Tensor, j: int) -> Tensor:
        """Run stage j on the output of stage j - 1."""
        ...

    def run_from(self, y: Tensor, j: int, needs: Signal) -> Outputs:
        """Run stages j to 4 and the head on the output of stage j - 1."""
        ...


class NetworkTail:
    """A network from stage j to its logits: see `heterokd.outputs.Tail`.

    The network's weights and mode (train, eval) are not changed; the gradient reaches `x` also if they are frozen.
    """

    def __init__(self, network: Resumable, maps: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Bind the tail to a forward: `maps` are its maps, each with its class tokens."""
        self.network = network
        self._maps = list(maps) if network.spec.prefix_tokens else []

    def __call__(self, x: Tensor, j: int) -> Tensor:
        """Compute logits [B, K] from the output of stage j - 1."""
        return self._finish(x, j, Signal.LOGITS).logits

    def outputs(self, x: Tensor, j: int) -> Outputs:
        """Compute logits [B, K] and embedding [B, D] from the output of stage j - 1."""
        return self._finish(x, j, Signal.LOGITS | Signal.EMBEDDING)

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        """Run only stage j and return its map, see `heterokd.outputs.Tail`."""
        network = self.network
        if j not in (1, 2, 3, 4):
            raise PairError(f"network {network.name!r}: tail.step(x, j={j}): j is 1, 2, 3 or 4, one of the four stages")
        if j == 1 and network.spec.stem is None:
            raise PairError(f"network {network.name!r}: tail.step(x, j=1): its stem's output is not a square map")
        y, usual = self._enter(x, j, f"tail.step(x, j={j})", like)
        with self._explain_size(x, j, usual):
            y = network.run_stage(y, j)
        stage_map = network.to_map(y, j)
        if network.spec.prefix_tokens:
            self._maps.append((stage_map, y[:, : network.prefix_tokens_at(j)]))
        return stage_map

    def _finish(self, x: Tensor, j: int, needs: Signal) -> Outputs:
        network = self.network
        if j not in (2, 3, 4, 5):
            raise PairError(
                f"network {network.name!r}: tail(x, j={j}): j is 2, 3 or 4 for a stage, "
                "or 5 for the final norm and classifier alone"
            )
        y, usual = self._enter(x, j, f"tail(x, j={j})")
        with self._explain_size(x, j, usual):
            return network.run_from(y, j, needs)

    @contextmanager
    def _explain_size(self, x: Tensor, j: int, usual: bool) -> Iterator[None]:
        """Raise PairError if a stage with a fixed input size fails on a map of another size."""
        try:
            yield
        except (RuntimeError, AssertionError, ValueError) as error:
            if usual:
                raise
            side = self.network.spec.side(j - 1)
            raise PairError(
                f"network {self.network.name!r}: its stage {j} takes a map of {side} x {side} and no other "
                f"(got shape {tuple(x.shape)})"
            ) from error

    def _enter(self, x: Tensor, j: int, call: str, like: Tensor | None = None) -> tuple[Tensor, bool]:
        """Convert `x` to the body's input of stage j, with class tokens; return also whether its size is usual."""
        network, spec = self.network, self.network.spec
        where = f"network {network.name!r}: {call}"
        before, side = spec.at(j - 1), spec.side(j - 1)
        source = f"stage {j - 1}" if j > 1 else "the stem"
        if x.dim() not in (3, 4) or x.shape[1 if x.dim() == 4 else 2] != before.channels:
            raise PairError(
                f"{where} needs the output of {source}, a map [B, {before.channels}, {side}, {side}] or tokens "
                f"[B, {side**2}, {before.channels}]; got shape {tuple(x.shape)}"
            )
        positions = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]
        origin = x if like is None else like
        prefix = next((tokens for stage_map, tokens in self._maps if stage_map is origin), None)
        if x.dim() == 3:
            known = network.prefix_tokens_at(j - 1)
            if known and positions != side**2 and (positions == side**2 + known or not _is_square(positions)):
                positions -= known
                prefix, x = x[:, :known], x[:, known:]
            if not _is_square(positions):
                raise PairError(f"{where}: {positions} tokens are not a square map ({source} has {side**2})")
            x = square(x)
        if positions != side**2 and any(stage.kind == "mlp" for stage in spec.stages[j - 1 :]):
            raise PairError(f"{where} mixes exactly {side**2} tokens by linear layers; got {positions}")
        return network.from_map(x, j - 1, prefix), x.shape[2] == x.shape[3] == side


def as_map(y: Tensor, layout: MapLayout, prefix_tokens: int) -> Tensor:
    """Convert a body's tensor to a map [B, C, H, W] without class tokens."""
    if layout == "NCHW":
        return y
    return y.permute(0, 3, 1, 2) if layout == "NHWC" else square(y[:, prefix_tokens:])


def from_map(x: Tensor, layout: MapLayout, prefix: Sequence[Tensor]) -> Tensor:
    """Convert a map [B, C, H, W] to a body's tensor, with the class tokens `prefix`, [B, N, C] each."""
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        return x.permute(0, 2, 3, 1)
    return torch.cat([*prefix, x.flatten(2).transpose(1, 2)], dim=1)


def square(tokens: Tensor) -> Tensor:
    """Arrange tokens [B, N, C] as a square map [B, C, H, W]."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
