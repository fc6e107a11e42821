"""Any timm classifier as a network that gives `Outputs`: logits, embedding, four stage maps and a tail.

`splits` finds the stages by structure, `architectures` adds networks that timm lacks, `network` runs them, `weights`
keeps them. Networks that classify pixels come from segmentation_models_pytorch: `segmentation` runs them,
`segmentation_bodies` builds them, `segmentation_names` reads their names.
"""

from heterokd.networks.bodies import network_names, no_weights, published_classes, published_licence
from heterokd.networks.network import (
    AnyNetwork,
    Deployable,
    Network,
    NetworkTail,
    build_network,
    deployable,
    predict_spec,
)
from heterokd.networks.segmentation import DeployableSegmentation, SegmentationNetwork
from heterokd.networks.timm_folder import open_timm_folder, timm_config
from heterokd.networks.weights import load_weights, save_weights, weights_hash

__all__ = [
    "AnyNetwork",
    "Deployable",
    "DeployableSegmentation",
    "Network",
    "NetworkTail",
    "SegmentationNetwork",
    "build_network",
    "deployable",
    "load_weights",
    "network_names",
    "no_weights",
    "open_timm_folder",
    "predict_spec",
    "published_classes",
    "published_licence",
    "save_weights",
    "timm_config",
    "weights_hash",
]
