"""Network: a timm classifier that gives `Outputs`, with its tail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.errors import PairError
from heterokd.networks.body_types import Normalisation, TimmBody, classifier_of
from heterokd.networks.parts import MapLayout, NetworkParts, run_parts
from heterokd.outputs import Outputs, OutputSpec, PreActivations, Signal


class Network(nn.Module):
    """A timm classifier, split into a stem, four stages, a finish and a head.

    Attributes:
        body: the plain timm module; its state dict loads in timm.
        spec: shapes of the outputs.
        name: timm's name.
        options: timm's arguments in addition to the name.
        mean, std: normalisation of the images, [1, 3, 1, 1]; not part of the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        body: TimmBody,
        split: NetworkParts,
        options: Mapping[str, object],
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.name = name
        self.options = dict(options)
        self.body = body
        self.split = split
        self.spec: OutputSpec = split.spec
        for key, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Run a single forward and return the signals in `needs`.

        Args:
            images: [B, 3, H, W] float in [0, 1], of any size; resized only if it differs from the network's size.
            needs: signals to return. Stage maps are raw (before the final norm) and without class tokens. Two-headed
                networks (distilled DeiT) return the mean of both heads' logits, in training mode too.
        """
        split = self.split
        if needs & ~self.spec.serves:
            raise PairError(f"network {self.name!r} has no {needs & ~self.spec.serves}: its structure does not give it")
        x = run_parts(self.body, split.stem, self.normalise(images))
        maps: list[tuple[Tensor, Tensor]] = []  # each map with its class tokens
        stem = None
        if Signal.STEM in needs:
            stem = self._to_map(x, split.stem_layout)
            maps.append((stem, x[:, : self.spec.prefix_tokens]))
        stages: list[Tensor] = []
        with _before_activations(self, active=Signal.PRE_ACTIVATIONS in needs) as before:
            for stage in split.stages:
                x = run_parts(self.body, stage, x)
                if Signal.STAGES in needs:
                    stages.append(self._to_map(x, split.layout))
                    maps.append((stages[-1], x[:, : self.spec.prefix_tokens]))
        logits = embedding = class_maps = None
        if needs & (Signal.LOGITS | Signal.EMBEDDING | Signal.CLASS_MAPS):
            x = run_parts(self.body, split.finish, x)
            logits, embedding = self._head(x, needs)
            if Signal.CLASS_MAPS in needs:
                positions = self._to_map(x, split.layout).permute(0, 2, 3, 1)
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

    def normalise(self, images: Tensor) -> Tensor:
        """Resize and normalise images [B, 3, H, W] in [0, 1]: [B, 3, image_size, image_size], mean 0, deviation 1."""
        size = (self.spec.image_size, self.spec.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (images - self.mean) / self.std

    def exports_any_size(self, size: tuple[int, int]) -> bool:
        """Return False: images are resized to a fixed size, the only input size of an exported graph."""
        return False

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

    def _to_map(self, x: Tensor, layout: MapLayout) -> Tensor:
        """Convert the body's tensor between two stages to a map [B, C, H, W] without class tokens."""
        if layout == "NCHW":
            return x
        return x.permute(0, 3, 1, 2) if layout == "NHWC" else _square(x[:, self.spec.prefix_tokens :])

    def _from_map(self, x: Tensor, layout: MapLayout, prefix: Tensor | None) -> Tensor:
        """Invert `_to_map`; without a `prefix` the class tokens are the network's parameters."""
        if layout == "NCHW":
            return x
        if layout == "NHWC":
            return x.permute(0, 2, 3, 1)
        tokens = x.flatten(2).transpose(1, 2)
        if prefix is None:
            fresh = [getattr(self.body, key).to(x.dtype).expand(len(x), -1, -1) for key in self.split.prefix]
            return torch.cat([*fresh, tokens], dim=1)
        return torch.cat([prefix, tokens], dim=1)


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


class NetworkTail:
    """A network from stage j to its logits: see `heterokd.outputs.Tail`.

    The network's weights and mode (train, eval) are not changed; the gradient reaches `x` also if they are frozen.
    """

    def __init__(self, network: Network, maps: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Bind the tail to a forward: `maps` are its maps, each with its class tokens."""
        self.network = network
        self._maps = list(maps) if network.split.prefix else []

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
            y = run_parts(network.body, network.split.stages[j - 1], y)
        stage_map = network._to_map(y, network.split.layout)
        if network.split.prefix:
            self._maps.append((stage_map, y[:, : network.spec.prefix_tokens]))
        return stage_map

    def _finish(self, x: Tensor, j: int, needs: Signal) -> Outputs:
        network, split = self.network, self.network.split
        if j not in (2, 3, 4, 5):
            raise PairError(
                f"network {network.name!r}: tail(x, j={j}): j is 2, 3 or 4 for a stage, "
                "or 5 for the final norm and classifier alone"
            )
        y, usual = self._enter(x, j, f"tail(x, j={j})")
        with self._explain_size(x, j, usual):
            for stage in split.stages[j - 1 :]:
                y = run_parts(network.body, stage, y)
            logits, embedding = network._head(run_parts(network.body, split.finish, y), needs)
        return Outputs(logits=logits, embedding=embedding)

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
            known = spec.prefix_tokens
            if known and positions != side**2 and (positions == side**2 + known or not _is_square(positions)):
                positions -= known
                prefix, x = x[:, :known], x[:, known:]
            if not _is_square(positions):
                raise PairError(f"{where}: {positions} tokens are not a square map ({source} has {side**2})")
            x = _square(x)
        if positions != side**2 and any(stage.kind == "mlp" for stage in spec.stages[j - 1 :]):
            raise PairError(f"{where} mixes exactly {side**2} tokens by linear layers; got {positions}")
        layout = network.split.layout if j > 1 else network.split.stem_layout
        return network._from_map(x, layout, prefix), x.shape[2] == x.shape[3] == side


def _square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
