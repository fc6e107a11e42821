"""Build the networks of recipes, untrained or with the weights of a trial."""

from __future__ import annotations

from pathlib import Path

import heterokd.distributed as distributed
from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import load_start, load_weights, save_weights
from heterokd.storage.files import write_file


def build_configured(
    settings: NetworkSettings, num_classes: int, image_size: int, *, pretrained: bool = False
) -> AnyNetwork:
    """Build a configured network with random weights, or with those that its training starts from.

    Args:
        settings: network.
        num_classes: K of its logits.
        image_size: pixels.
        pretrained: whether to load its initial weights: of `settings.start_from`, otherwise timm's.

    Raises:
        NetworkError: the network cannot be built.
        CheckpointError: the file of `settings.start_from` is missing, damaged, or of another network.
    """
    start = settings.start_from if pretrained else None
    is_published = pretrained and start is None
    name, options = settings.network, settings.options
    network = build_network(name, num_classes, options, pretrained=is_published, image_size=image_size)
    if start is not None:
        load_start(network, start)
    return network


def build_student(recipe: Recipe, num_classes: int) -> AnyNetwork:
    """Build a recipe's untrained student: with published or given weights if the recipe asks for them.

    Raises:
        NetworkError: the network cannot be built.
        CheckpointError: the given weights are missing, damaged, or of another network.
    """
    return build_configured(recipe.student, num_classes, recipe.data.image_size, pretrained=recipe.student.has_start)


def open_student(recipe: Recipe, weights: Path, num_classes: int) -> AnyNetwork:
    """Open a trained student in evaluation mode on the CPU.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    network = build_configured(recipe.student, num_classes, recipe.data.image_size)
    load_weights(network, weights)
    return network.eval()


def save_student(network: AnyNetwork, file: Path) -> None:
    """Write a network's weights atomically on rank 0, waiting for a disk that cannot be written at present."""
    if distributed.rank() == 0:
        write_file(file, lambda partial: save_weights(network, partial))
