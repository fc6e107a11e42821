"""CombinedNetwork: networks that answer together, the teachers of `teacher.ensemble` and `teacher.cross_fit`.

It is described by options, see `combined_options`, so that it is built, cached and opened as any network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from heterokd.errors import NetworkError, PairError
from heterokd.networks.combined_options import AVERAGE, ENSEMBLE, PROBABILITIES, fold_options, member_networks
from heterokd.outputs import Outputs, OutputSpec, Signal

if TYPE_CHECKING:
    from heterokd.networks.classifier import Network
    from heterokd.networks.tapped import TappedNetwork

    Member = Network | TappedNetwork

OF_ENSEMBLE = Signal.LOGITS | Signal.EMBEDDING
OF_FOLDS = OF_ENSEMBLE | Signal.STAGES | Signal.STEM
"""Signals of a cross-fitted network whose folds differ in the classifier only."""


def combined_spec(name: str, members: Sequence[OutputSpec], options: Mapping[str, object]) -> OutputSpec:
    """Return the output shapes of a combined network.

    An ensemble gives logits and the members' embeddings one after the other. A cross-fitted network gives logits;
    where its folds share all features (only the classifier was fitted), also these.

    Raises:
        NetworkError: a member is a segmentation network.
    """
    first = members[0]
    if any(spec.logits_stride is not None for spec in members):
        raise NetworkError(f"network {name!r}: segmentation networks cannot be combined; name a single teacher")
    if ENSEMBLE in options or not fold_options(options)["features"]:
        return replace(
            first,
            embedding_dim=sum(spec.embedding_dim for spec in members) if ENSEMBLE in options else first.embedding_dim,
            stages=(),
            stem=None,
            prefix_tokens=0,
            serves=OF_ENSEMBLE if ENSEMBLE in options else Signal.LOGITS,
            body_kind=first.kind,
        )
    return replace(first, serves=first.serves & OF_FOLDS)


class CombinedNetwork(nn.Module):
    """Networks that answer together: all of them, or, for a training image, the member of its fold.

    Args:
        name: name of the network, or of the ensemble.
        members: networks with the same classes.
        options: see the module.

    Attributes:
        spec: see `combined_spec`.
        mean, std: normalisation of all members, one after the other.
    """

    def __init__(self, name: str, members: Sequence[Member], options: Mapping[str, object]) -> None:
        super().__init__()
        self.name, self.options = name, dict(options)
        self.spec = combined_spec(name, [member.spec for member in members], options)
        self.members = nn.ModuleList(members)
        self.is_ensemble = ENSEMBLE in options
        self.average = str(options.get(AVERAGE, PROBABILITIES))

    def forward(self, images: Tensor, needs: Signal = Signal.LOGITS) -> Outputs:
        """Return the mean answer of all members; features of an ensemble are concatenated, others are the first's.

        Args:
            images: [B, 3, H, W] float in [0, 1]; each member resizes and normalises them.
            needs: signals to return. The logits are the logarithm of the mean probability, or the mean of the logits.
        """
        self._check(needs)
        others = needs if self.is_ensemble else needs & Signal.LOGITS
        found = [member(images, others if number else needs) for number, member in enumerate(self.members)]
        logits = mean_logits([each.logits for each in found], self.average) if Signal.LOGITS in needs else None
        if self.is_ensemble:
            embeddings = [each.embedding for each in found] if Signal.EMBEDDING in needs else None
            return Outputs(logits=logits, embedding=None if embeddings is None else torch.cat(embeddings, dim=1))
        first: Outputs = found[0]
        return Outputs(
            logits=logits,
            embedding=first.embedding if Signal.EMBEDDING in needs else None,
            stages=first.stages if Signal.STAGES in needs else None,
            stem=first.stem if Signal.STEM in needs else None,
        )

    def of_fold(self, images: Tensor, needs: Signal, fold: int) -> Outputs:
        """Return the outputs of the member that was not fitted on the images of a fold."""
        self._check(needs)
        outputs: Outputs = self.members[fold](images, needs)
        return outputs

    def _check(self, needs: Signal) -> None:
        if needs & ~self.spec.serves:
            kind = "an ensemble" if self.is_ensemble else "a cross-fitted teacher"
            raise PairError(f"network {self.name!r} has no {needs & ~self.spec.serves}: {kind} does not give it")

    def exports_any_size(self, size: tuple[int, int]) -> bool:
        """Return False: a student is a single network, so that this is never exported."""
        return False

    @property
    def body(self) -> nn.ModuleList:
        """Bodies of all members: the state dict has their names with the member's number before them."""
        return nn.ModuleList(cast(nn.Module, member.body) for member in self.members)

    @property
    def head(self) -> nn.ModuleList:
        """Classifiers of all members."""
        return nn.ModuleList(cast(nn.Module, member.head) for member in self.members)

    @property
    def mean(self) -> Tensor:
        """Mean of the images of all members."""
        return torch.cat([cast(Tensor, member.mean).flatten() for member in self.members])

    @property
    def std(self) -> Tensor:
        """Standard deviation of the images of all members."""
        return torch.cat([cast(Tensor, member.std).flatten() for member in self.members])


def mean_logits(logits: Sequence[Tensor], average: str = PROBABILITIES) -> Tensor:
    """Average the answers of several networks.

    Args:
        logits: [B, K] of each network.
        average: "probabilities": the logarithm of the mean probability; "logits": the mean of the logits.
    """
    stacked = torch.stack([each.float() for each in logits])
    if average != PROBABILITIES:
        return stacked.mean(dim=0)
    return stacked.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))


def in_order(parts: Sequence[Outputs], rows: Sequence[Tensor]) -> Outputs:
    """Put the outputs of parts of a batch together again; `rows` are the positions of each part's images."""
    if len(parts) == 1:
        return parts[0]
    order = torch.cat(list(rows)).argsort()

    def join(tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors)
        return whole[order.to(whole.device)]

    held = parts[0].serves
    stages = zip(*(part.stages for part in parts), strict=True) if Signal.STAGES in held else ()
    return Outputs(
        logits=join([part.logits for part in parts]) if Signal.LOGITS in held else None,
        embedding=join([part.embedding for part in parts]) if Signal.EMBEDDING in held else None,
        stages=tuple(join(list(maps)) for maps in stages) or None,
        stem=join([part.stem for part in parts]) if Signal.STEM in held else None,
    )


Build = Callable[[str, dict[str, object]], nn.Module]


def build_combined(name: str, options: Mapping[str, object], build: Build) -> CombinedNetwork:
    """Build a combined network; `build` makes a member of name and options."""
    members = [build(member, plain) for member, plain in member_networks(name, options)]
    return CombinedNetwork(name, cast("list[Member]", members), options)
