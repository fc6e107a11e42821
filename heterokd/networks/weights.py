"""Save, load and hash the weights of a network."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heterokd.errors import CheckpointError
from heterokd.networks.body_network import BodyNetwork
from heterokd.networks.checkpoint_description import class_names, described_network
from heterokd.networks.checkpoint_file import read_checkpoint_file
from heterokd.networks.checkpoint_match import Target, match_checkpoint
from heterokd.networks.combined import CombinedNetwork
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Signal


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the state dict (of `.body`, for a network)."""
    digest = hashlib.sha256()
    for key, tensor in sorted(_state(module).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; cached while the file is unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    found = path.stat()
    return _file_digest(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _file_digest(path: Path, _written: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the state dict of the body; see `heterokd.training.student.save_student` for an atomic write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(_state(network), path, metadata={"format": "pt"})


@dataclass(frozen=True)
class FoundWeights:
    """Weights in a file that fit a network.

    Attributes:
        state: by the network's names; without the classifier if its number of classes differs.
        classes: the file's number of classes; 0 if it has no classifier.
        class_names: names of its classes in the order of the logits, and where they stand, if anything names them.
        notes: what was chosen, renamed, converted or left out, as phrases; empty for a file of `save_weights`.
        heads: names of the classifier's weights.
        is_plain: whether the file is safetensors with the network's names.
    """

    state: Mapping[str, Tensor]
    classes: int
    class_names: tuple[tuple[str, ...], str] | None
    notes: tuple[str, ...]
    heads: frozenset[str]
    is_plain: bool


def find_weights(network: AnyNetwork, path: str | Path) -> FoundWeights:
    """Read weights for a network from a file of any format, see `checkpoint_file` and `checkpoint_match`.

    Raises:
        CheckpointError: the file is missing or damaged, holds code, NaN or infinite weights, or weights of another
            network.
    """
    path = Path(path)
    file = read_checkpoint_file(path)
    target = _target(network)
    match = match_checkpoint(file, target)
    if match.fault is not None:
        named = described_network(file, path)
        hint = "" if named is None else f"; {named}"
        options = " with these options" if network.options else ""
        raise CheckpointError(f"weights {path} are not of network {network.name!r}{options}: {match.fault}{hint}")
    _check_values(path, match.state, target.state)
    if match.by_order:
        _check_forward(path, network, match.state)
    notes = list(match.notes)
    if file.classes:
        shown = ", ".join(file.classes[:3]) + (", ..." if len(file.classes) > 3 else "")
        notes.append(f"objects of {shown} not opened")
    is_plain = not (notes or file.ordered)
    return FoundWeights(match.state, match.classes, class_names(file, path), tuple(notes), target.heads, is_plain)


def load_weights(network: AnyNetwork, path: str | Path) -> None:
    """Load weights into the network's body.

    Raises:
        CheckpointError: see `find_weights`; or the weights are of another number of classes; the network is unchanged.
    """
    found = find_weights(network, path)
    if found.classes != network.spec.num_classes:
        classes = f"has {found.classes} classes" if found.classes else "has no classifier"
        raise CheckpointError(
            f"weights {path}: network {network.name!r} in the file {classes}, the experiment's data set has "
            f"{network.spec.num_classes} classes; fit a teacher from them (teacher.start_from)"
        )
    network.body.load_state_dict(found.state, strict=False)


def load_start(network: AnyNetwork, path: str | Path) -> FoundWeights:
    """Load weights to start a training from; a classifier of another number of classes keeps its random weights.

    Raises:
        CheckpointError: see `find_weights`; the network is unchanged.
    """
    found = find_weights(network, path)
    network.body.load_state_dict(found.state, strict=False)
    return found


def _target(network: AnyNetwork) -> Target:
    of_head = {id(parameter) for parameter in network.head.parameters()}
    parameters = dict(network.body.named_parameters())
    heads = frozenset(name for name, parameter in parameters.items() if id(parameter) in of_head)
    if len(heads) == len(parameters):  # the head is unknown, and stands for the whole network
        heads = frozenset()
    buffers = frozenset(name for name, _ in network.body.named_buffers())
    return Target(network.body, buffers, heads, network.spec.num_classes)


def _check_values(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite, or integers in place of real numbers."""
    for name, tensor in state.items():
        if not wanted[name].is_floating_point():
            continue
        if tensor.is_quantized or not tensor.is_floating_point():
            raise CheckpointError(
                f"weights {path}: {name!r} is quantised ({tensor.dtype}); give the weights before quantisation"
            )
        finite = torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())
        if not finite.all():
            bad = int((~finite).sum())
            kind = "NaN" if tensor.float().isnan().any() else "infinite"
            raise CheckpointError(
                f"weights {path}: {bad} of {tensor.numel()} values of {name!r} are {kind}: the training diverged; "
                "give an earlier checkpoint"
            )


def _check_forward(path: Path, network: AnyNetwork, state: Mapping[str, Tensor]) -> None:
    """Verify weights that were matched by order: on random images, outputs must be finite and must differ."""
    trial = copy.deepcopy(network).eval()
    trial.body.load_state_dict(dict(state), strict=False)
    side = network.spec.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        has_embedding = Signal.EMBEDDING in network.spec.serves
        embedding = trial(images, Signal.EMBEDDING).embedding if has_embedding else trial(images).logits
    spread = (embedding - embedding[:1]).abs().max()
    if not torch.isfinite(embedding).all() or spread <= 1e-5 * embedding.abs().max():
        raise CheckpointError(
            f"weights {path} are not of network {network.name!r}: their names differ, and in the network's order they "
            "give the same embedding for all images; rename the tensors as timm does"
        )


def _state(module: nn.Module) -> dict[str, Tensor]:
    body = module.body if isinstance(module, BodyNetwork | CombinedNetwork) else module
    # clone: safetensors refuses weights that share memory
    return {key: value.detach().cpu().contiguous().clone() for key, value in body.state_dict().items()}
