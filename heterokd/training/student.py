"""Build the networks of recipes, untrained or with the weights of a trial."""

from __future__ import annotations

from pathlib import Path

import heterokd.distributed as distributed
from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import load_weights, save_weights
from heterokd.storage.files import write_file


def build_configured(
    settings: NetworkSettings, num_classes: int, image_size: int, *, pretrained: bool = False
) -> AnyNetwork:
    """Build a configured network with random or published weights.

    Raises:
        NetworkError: the network cannot be built.
    """
    return build_network(settings.network, num_classes, settings.options, pretrained=pretrained, image_size=image_size)


def build_student(recipe: Recipe, num_classes: int) -> AnyNetwork:
    """Build a recipe's untrained student: with published weights if the recipe asks for them.

    Raises:
        NetworkError: the network cannot be built.
    """
    return build_configured(recipe.student, num_classes, recipe.data.image_size, pretrained=recipe.student.pretrained)


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
