"""Save, load and hash the weights of a network (safetensors)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heterokd.errors import CheckpointError
from heterokd.networks.classifier import Network
from heterokd.networks.network import AnyNetwork
from heterokd.networks.segmentation import SegmentationNetwork
from heterokd.networks.tapped import TappedNetwork


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the state dict (of `.body`, for a network)."""
    digest = hashlib.sha256()
    for key, tensor in sorted(_state(module).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the state dict of the body; see `heterokd.training.student.save_student` for an atomic write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(_state(network), path, metadata={"format": "pt"})


def load_weights(network: AnyNetwork, path: str | Path) -> None:
    """Load weights saved by `save_weights` into the network's body.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights are of another network or number of classes;
            the network is unchanged.
    """
    try:
        found = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {path} are damaged or not a safetensors file: {error}") from error
    wanted = network.body.state_dict()
    if isinstance(network, SegmentationNetwork):
        classifier: str | tuple[str, ...] = "segmentation_head.0"
    elif isinstance(network, TappedNetwork):
        classifier = network.split.classifiers
    else:
        classifier = network.body.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    for key in [*wanted, *found]:
        other = f"weights {path} are not of network {network.name!r}"
        if key not in found:
            raise CheckpointError(f"{other}: {key!r} is missing from the file")
        if key not in wanted:
            raise CheckpointError(f"{other}: the file's {key!r} is not a weight of it")
        shape, expected = tuple(found[key].shape), tuple(wanted[key].shape)
        if shape == expected:
            continue
        if key.rpartition(".")[0] in heads and len(shape) == len(expected) and shape[1:] == expected[1:]:
            raise CheckpointError(
                f"weights {path} ({key!r}): network {network.name!r} in the file has {shape[0]} classes, "
                f"the experiment's data set has {expected[0]}"
            )
        raise CheckpointError(f"{other} with these options: {key!r} has shape {shape} in the file, here {expected}")
    network.body.load_state_dict(found)


def _state(module: nn.Module) -> dict[str, Tensor]:
    body = module.body if isinstance(module, Network | TappedNetwork | SegmentationNetwork) else module
    # clone: safetensors refuses weights that share memory
    return {key: value.detach().cpu().contiguous().clone() for key, value in body.state_dict().items()}
