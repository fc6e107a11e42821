"""Network: a timm classifier that gives `Outputs`, with its tail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from heterokd.networks.body_network import BodyNetwork
from heterokd.networks.body_types import Normalisation, TimmBody, classifier_of
from heterokd.networks.parts import NetworkParts, run_parts
from heterokd.networks.tail import NetworkTail, as_map, from_map
from heterokd.outputs import Outputs, PreActivations, Signal


class Network(BodyNetwork):
    """A timm classifier, split into a stem, four stages, a finish and a head.

    Attributes:
        body: the plain timm module; its state dict loads in timm.
        name: timm's name.
        options: timm's arguments in addition to the name.
    """

    body: TimmBody

    def __init__(
        self,
        name: str,
        body: TimmBody,
        split: NetworkParts,
        options: Mapping[str, object],
        normalisation: Normalisation,
    ) -> None:
        super().__init__(name, body, split.spec, options, normalisation, split.arguments.get("in_chans", 3))
        self.split = split

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Run a single forward and return the signals in `needs`.

        Args:
            images: [B, 3, H, W] float in [0, 1], of any size; resized only if it differs from the network's size.
            needs: signals to return. Stage maps are raw (before the final norm) and without class tokens. Two-headed
                networks (distilled DeiT) return the mean of both heads' logits, in training mode too.
        """
        split = self.split
        self.require(needs)
        x = run_parts(self.body, split.stem, self.normalise(images))
        maps: list[tuple[Tensor, Tensor]] = []  # each map with its class tokens
        stem = None
        if Signal.STEM in needs:
            stem = self.to_map(x, 0)
            maps.append((stem, x[:, : self.spec.prefix_tokens]))
        stages: list[Tensor] = []
        with _before_activations(self, active=Signal.PRE_ACTIVATIONS in needs) as before:
            for number, stage in enumerate(split.stages, start=1):
                x = run_parts(self.body, stage, x)
                if Signal.STAGES in needs:
                    stages.append(self.to_map(x, number))
                    maps.append((stages[-1], x[:, : self.spec.prefix_tokens]))
        logits = embedding = class_maps = None
        if needs & (Signal.LOGITS | Signal.EMBEDDING | Signal.CLASS_MAPS):
            x = run_parts(self.body, split.finish, x)
            logits, embedding = self._head(x, needs)
            if Signal.CLASS_MAPS in needs:
                positions = self.to_map(x, 4).permute(0, 2, 3, 1)
                class_maps = self.head(positions).permute(0, 3, 1, 2)
        return Outputs(
            logits=logits,
            embedding=embedding,
            stages=tuple(stages) if Signal.STAGES in needs else None,
            tail=NetworkTail(self, maps) if Signal.TAIL in needs else None,
            stem=stem,
            class_maps=class_maps,
            pre_activations=PreActivations(tuple(before), self.margins()) if Signal.PRE_ACTIVATIONS in needs else None,
        )

    @torch.no_grad()
    def margins(self) -> tuple[Tensor, ...]:
        """Return four vectors [C]: see `heterokd.outputs.PreActivations`."""
        weights = self.body.get_parameter
        return tuple(
            expected_negative(weights(f"{norm}.bias").float(), weights(f"{norm}.weight").float())
            for _, norm in self.split.activations
        )

    @property
    def tail(self) -> NetworkTail:
        """The network from stage j to its logits, not bound to a forward."""
        return NetworkTail(self)

    @property
    def head(self) -> nn.Module:
        """The last classifier (both in a two-headed network), without the encoder."""
        return classifier_of(self.body)

    def _head(self, x: Tensor, needs: Signal) -> tuple[Tensor | None, Tensor | None]:
        """Compute logits and embedding, None if not needed. The head runs once, so its dropout acts once."""
        if not needs & (Signal.LOGITS | Signal.EMBEDDING):
            return None, None
        if Signal.EMBEDDING not in needs:
            return self.body.forward_head(x), None
        embedding = self.body.forward_head(x, pre_logits=True)
        if Signal.LOGITS not in needs:
            return None, embedding
        return (self.head(embedding) if self.split.one_head else self.body.forward_head(x)), embedding

    def prefix_tokens_at(self, stage: int) -> int:
        """Return the number of class tokens in the output of a stage: the same in all."""
        return self.spec.prefix_tokens

    def to_map(self, y: Tensor, stage: int) -> Tensor:
        """Convert the body's tensor after a stage (0: the stem) to a map [B, C, H, W] without class tokens."""
        return as_map(y, self.split.layout if stage else self.split.stem_layout, self.spec.prefix_tokens)

    def from_map(self, x: Tensor, stage: int, prefix: Tensor | None) -> Tensor:
        """Invert `to_map`; without a `prefix` the class tokens are the network's parameters."""
        if prefix is None:
            fresh = [getattr(self.body, key).to(x.dtype).expand(len(x), -1, -1) for key in self.split.prefix]
        else:
            fresh = [prefix]
        return from_map(x, self.split.layout if stage else self.split.stem_layout, fresh)

    def run_stage(self, y: Tensor, j: int) -> Tensor:
        """Run stage j on the output of stage j - 1."""
        return run_parts(self.body, self.split.stages[j - 1], y)

    def run_from(self, y: Tensor, j: int, needs: Signal) -> Outputs:
        """Run stages j to 4 and the head on the output of stage j - 1."""
        for stage in self.split.stages[j - 1 :]:
            y = run_parts(self.body, stage, y)
        logits, embedding = self._head(run_parts(self.body, self.split.finish, y), needs)
        return Outputs(logits=logits, embedding=embedding)


@contextmanager
def _before_activations(network: Network, active: bool) -> Iterator[list[Tensor]]:
    """Record the input of the last ReLU of each stage; the list is filled on exit."""
    kept: dict[str, Tensor] = {}
    maps: list[Tensor] = []

    def keep(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        kept[name] = given[0]
        return given[0].clone()  # the ReLU may work in place

    names = [relu for relu, _ in network.split.activations] if active else []
    hooks = [network.body.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
    try:
        yield maps
        maps.extend(kept[name] for name in names)
    finally:
        for hook in hooks:
            hook.remove()


def expected_negative(mean: Tensor, std: Tensor) -> Tensor:
    """Compute E[x | x < 0] of x ~ N(mean, std^2), elementwise: OFD's margins.

    If less than a thousandth of the responses is negative, it is -3 standard deviations, as in the authors' code.

    Args:
        mean: [C], shift of a BatchNorm.
        std: [C], its scale; the sign is ignored.
    """
    std = std.abs()
    ratio = mean / std.clamp(min=torch.finfo(std.dtype).tiny)  # a scale of 0 gives min(mean, 0)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(negative > 0.001, mean - std * density / negative.clamp(min=0.001), -3 * std)
