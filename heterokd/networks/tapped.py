"""TappedNetwork: a classifier that runs as it is, and gives `Outputs` from the outputs of its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from heterokd.errors import PairError
from heterokd.networks.body_network import BodyNetwork
from heterokd.networks.body_types import Normalisation, TimmBody
from heterokd.networks.dataflow import logits_of
from heterokd.networks.entry import enter
from heterokd.networks.tail import NetworkTail, as_map, from_map
from heterokd.networks.taps import Tap, TapParts, as_embedding
from heterokd.outputs import Outputs, Signal


class TappedNetwork(BodyNetwork):
    """A classifier whose modules are read while it runs, see `taps`."""

    def __init__(
        self,
        name: str,
        body: nn.Module,
        split: TapParts,
        options: Mapping[str, object],
        normalisation: Normalisation,
    ) -> None:
        super().__init__(name, body, split.spec, options, normalisation, split.arguments.get("in_chans", 3))
        self.split = split

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Run a single forward and return the signals in `needs`, see `Network.forward`."""
        self.require(needs)
        x = self.normalise(images)
        if Signal.STAGES in needs and self.split.intermediates:
            return self._with_intermediates(x, needs)
        taps = self.split.taps if needs & (Signal.STAGES | Signal.TAIL) else ()
        with _reading(self.body, taps) as read, _embedding(self, active=Signal.EMBEDDING in needs) as embedding:
            logits = logits_of(self.body(x))
        maps = [(self.to_map(y, j), y[:, : self.prefix_tokens_at(j)]) for j, y in enumerate(read, start=1)]
        return Outputs(
            logits=logits if Signal.LOGITS in needs else None,
            embedding=torch.cat(embedding, dim=1) if Signal.EMBEDDING in needs else None,
            stages=tuple(stage_map for stage_map, _ in maps) if Signal.STAGES in needs else None,
            tail=NetworkTail(self, maps) if Signal.TAIL in needs else None,
        )

    def _with_intermediates(self, x: Tensor, needs: Signal) -> Outputs:
        """Return the outputs of a network whose stages are timm's `forward_intermediates`."""
        with _embedding(self, active=Signal.EMBEDDING in needs) as embedding:
            body, indices = cast(TimmBody, self.body), list(self.split.intermediates)
            last, maps = body.forward_intermediates(x, indices=indices, output_fmt="NCHW")
            logits = logits_of(body.forward_head(last))
        return Outputs(
            logits=logits if Signal.LOGITS in needs else None,
            embedding=torch.cat(embedding, dim=1) if Signal.EMBEDDING in needs else None,
            stages=tuple(maps),
        )

    @property
    def tail(self) -> NetworkTail:
        """The network from stage j to its logits, not bound to a forward."""
        return NetworkTail(self)

    @property
    def head(self) -> nn.Module:
        """The last classifier; a list if there are several, or if its output is not the logits."""
        modules = [self.body.get_submodule(name) for name in self.split.classifiers]
        return modules[0] if self.split.one_head else nn.ModuleList(modules or [self.body])

    def prefix_tokens_at(self, stage: int) -> int:
        """Return the number of class tokens in the output of a stage."""
        return self.split.taps[stage - 1].prefix_tokens

    def to_map(self, y: Tensor, stage: int) -> Tensor:
        """Convert the body's tensor after a stage to a map [B, C, H, W] without class tokens."""
        tap = self.split.taps[stage - 1]
        return as_map(y, tap.layout, tap.prefix_tokens)

    def from_map(self, x: Tensor, stage: int, prefix: Tensor | None) -> Tensor:
        """Invert `to_map`; without a `prefix` the class tokens are the network's parameters."""
        tap = self.split.taps[stage - 1]
        fresh: list[Tensor] = []
        if tap.prefix_tokens:
            parameters = [self.body.get_parameter(key) for key in self.split.prefix]
            fresh = [token.reshape(1, -1, token.shape[-1]).to(x.dtype).expand(len(x), -1, -1) for token in parameters]
            fresh = fresh if prefix is None else [prefix]
        return from_map(x, tap.layout, fresh)

    def run_stage(self, y: Tensor, j: int) -> Tensor:
        """Run stage j on the output of stage j - 1."""
        with _reading(self.body, self.split.taps[j - 1 : j], stop=True) as read, suppress(_StageEnded):
            self._enter(y, j)
        return read[0]

    def run_from(self, y: Tensor, j: int, needs: Signal) -> Outputs:
        """Run stages j to 4 and the head on the output of stage j - 1."""
        with _embedding(self, active=Signal.EMBEDDING in needs) as embedding:
            logits = logits_of(self._enter(y, j))
        return Outputs(
            logits=logits if Signal.LOGITS in needs else None,
            embedding=torch.cat(embedding, dim=1) if Signal.EMBEDDING in needs else None,
        )

    def _enter(self, y: Tensor, j: int) -> object:
        tap = self.split.taps[j - 2]
        if tap.entry is None:
            raise PairError(f"network {self.name!r} cannot be run from its stage {j} on")
        side = self.spec.image_size
        shape = torch.Size((self.mean.shape[1], side, side))
        return enter(self.body, tap.entry, y.clone() if tap.is_overwritten else y, shape)


class _StageEnded(Exception):
    """Stops a forward after a stage, so that no later layer counts the batch."""


@contextmanager
def _reading(body: nn.Module, taps: tuple[Tap, ...], stop: bool = False) -> Iterator[list[Tensor]]:
    """Record the tensors of taps, in order; the list is filled on exit."""
    kept: dict[str, Tensor] = {}
    read: list[Tensor] = []

    def keep(tap: Tap, _module: nn.Module, _given: object, output: object) -> None:
        tensor = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)][tap.tensor]
        kept[tap.module] = tensor.clone() if tap.is_overwritten else tensor
        if stop:
            raise _StageEnded

    hooks = [body.get_submodule(tap.module).register_forward_hook(partial(keep, tap)) for tap in taps]
    try:
        yield read
        read.extend(kept[tap.module] for tap in taps)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _embedding(network: TappedNetwork, active: bool) -> Iterator[list[Tensor]]:
    """Record the inputs of the classifiers, as embeddings [B, D]; the list is filled on exit."""
    kept: dict[str, Tensor] = {}
    embedding: list[Tensor] = []

    def keep(name: str, _module: nn.Module, given: tuple[object, ...]) -> None:
        kept[name] = as_embedding(cast(Tensor, given[0]))

    def keep_output(name: str, _module: nn.Module, _given: object, output: object) -> None:
        kept[name] = as_embedding(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    named = network.split.embedding
    names = (network.split.classifiers if named is None else (named,)) if active else ()
    hooks = []
    for name in names:
        module = network.body.get_submodule(name)
        if named is None:
            hooks.append(module.register_forward_pre_hook(partial(keep, name)))
        else:
            hooks.append(module.register_forward_hook(partial(keep_output, name)))
    try:
        yield embedding
        embedding.extend(kept[name] for name in names)
    finally:
        for hook in hooks:
            hook.remove()
