"""network_card: the description of a student's network in student.json and in exported files."""

from __future__ import annotations

from heterokd.datasets.io.split import Splits
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.tasks import task_of


def network_card(network: AnyNetwork, splits: Splits, view: tuple[int, int]) -> dict[str, object]:
    """Describe everything that is needed to build a network again and to interpret its logits.

    Args:
        network: the trained student.
        splits: its data set.
        view: height and width of its training views, in pixels.
    """
    return {
        "task": task_of(network.spec).name,
        "network": network.name,
        "options": network.options,
        "num_classes": splits.num_classes,
        "class_names": list(splits.class_names),
        "image_size": splits.image_size,
        "view": list(view),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "weights": weights_hash(network),
    }
