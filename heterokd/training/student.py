"""Networks as recipes describe them, untrained or with the weights of a trial."""

from __future__ import annotations

from pathlib import Path

from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import load_weights


def build_configured(
    settings: NetworkSettings, num_classes: int, image_size: int, *, pretrained: bool = False
) -> AnyNetwork:
    """Build the network of a configuration with random weights, or with published ones.

    Raises:
        NetworkError: the network cannot be built.
    """
    return build_network(settings.network, num_classes, settings.options, pretrained=pretrained, image_size=image_size)


def build_student(recipe: Recipe, num_classes: int) -> AnyNetwork:
    """Build a recipe's student as its training starts: with published weights if the recipe asks for them.

    Raises:
        NetworkError: the network cannot be built.
    """
    return build_configured(recipe.student, num_classes, recipe.data.image_size, pretrained=recipe.student.pretrained)


def open_student(recipe: Recipe, weights: Path, num_classes: int) -> AnyNetwork:
    """Open a trained student, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    network = build_configured(recipe.student, num_classes, recipe.data.image_size)
    load_weights(network, weights)
    return network.eval()
