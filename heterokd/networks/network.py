"""Build networks, predict their output shapes, and prepare them for export."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from heterokd.networks.bodies import create_body
from heterokd.networks.body_network import normalised
from heterokd.networks.body_types import Normalisation
from heterokd.networks.classifier import Network
from heterokd.networks.combined import CombinedNetwork, build_combined, combined_spec
from heterokd.networks.combined_options import member_networks
from heterokd.networks.dataflow import logits_of
from heterokd.networks.mapped import DeployableMaps, MapParts, MappedNetwork
from heterokd.networks.modules import module_normalisation
from heterokd.networks.segmentation import DeployableSegmentation, SegmentationNetwork, encoder_normalisation
from heterokd.networks.segmentation_bodies import create_segmentation_body, lay_out
from heterokd.networks.segmentation_names import is_segmentation
from heterokd.networks.splits import split_network
from heterokd.networks.tapped import TappedNetwork
from heterokd.networks.taps import TapParts
from heterokd.outputs import OutputSpec

AnyNetwork = Network | TappedNetwork | SegmentationNetwork | MappedNetwork | CombinedNetwork


def build_network(
    name: str,
    num_classes: int,
    options: Mapping[str, object] | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    normalisation: Normalisation | None = None,
) -> AnyNetwork:
    """Build a network.

    Args:
        name: timm's name, with or without a tag (`vit_small_patch16_224.augreg_in21k`), or `{architecture}-{encoder}`
            for a segmentation network, see `segmentation_names`. `torchvision:NAME` and users' modules: see `modules`.
        num_classes: K of the logits.
        options: timm's arguments in addition to the name: `{"img_size": 32, "patch_size": 4, "depth": 6}`. For a
            segmentation network smp's, such as `{"encoder_output_stride": 8, "decoder_channels": 64}`, and for its
            encoder from timm also timm's. DeepLabV3 and V3+ dilate their encoder as smp does by default (to a stride of
            8 and 16) if it can be dilated; attention encoders, including MiT and PVT, keep a stride of 32. Several
            networks that answer together: see `combined`.
        pretrained: whether to load timm's weights for the name. A segmentation network gets its encoder's ImageNet
            weights; its decoder starts from random weights.
        image_size: pixels; networks with a fixed size are built for it, unless `options` contain `img_size`. None: the
            size of the name's pretrained weights, and 512 for the training crops of a segmentation network.
        normalisation: mean and standard deviation per channel, of images in [0, 1]; None: those of the name's
            pretrained weights.

    Raises:
        NetworkError: the name or an option is unknown, the network gives no logits, encoder and decoder are
            incompatible, or weights are missing.
    """
    if member_networks(name, options or {}):
        return build_combined(
            name,
            options or {},
            lambda member, plain: build_network(member, num_classes, plain, pretrained, image_size, normalisation),
        )
    if is_segmentation(name):
        layout = lay_out(name, num_classes, options, image_size)
        whole = create_segmentation_body(name, num_classes, layout.arguments, pretrained)
        return SegmentationNetwork(name, whole, layout, options or {}, normalisation or encoder_normalisation(name))
    split = split_network(name, num_classes, options, image_size)
    body = create_body(name, num_classes, split.arguments, pretrained)
    normalisation = normalisation or module_normalisation(body)
    if isinstance(split, MapParts):
        return MappedNetwork(name, body, split, options or {}, normalisation)
    if isinstance(split, TapParts):
        return TappedNetwork(name, body, split, options or {}, normalisation)
    return Network(name, body, split, options or {}, normalisation)


def predict_spec(
    name: str, num_classes: int, options: Mapping[str, object] | None = None, image_size: int | None = None
) -> OutputSpec:
    """Return the output shapes of `build_network` with the same arguments; cached, without weights or memory.

    Raises:
        NetworkError: as `build_network`.
    """
    members = member_networks(name, options or {})
    if members:
        specs = [predict_spec(member, num_classes, plain, image_size) for member, plain in members]
        return combined_spec(name, specs, options or {})
    layout = lay_out if is_segmentation(name) else split_network
    return layout(name, num_classes, options, image_size).spec


class Deployable(nn.Module):
    """Normalisation and body: images [B, 3, S, S] in [0, 1], at the network's size, to logits [B, K]."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, K]."""
        return logits_of(self.body(normalised(images, images.shape[-1], self.mean, self.std)))


def deployable(network: AnyNetwork) -> Deployable | DeployableSegmentation | DeployableMaps:
    """Copy a network for torch.export and ONNX: in eval mode, without resizing of the images."""
    if isinstance(network, SegmentationNetwork):
        return DeployableSegmentation(network).eval()
    if isinstance(network, MappedNetwork):
        return DeployableMaps(network).eval()
    assert not isinstance(network, CombinedNetwork)  # students are single networks
    return Deployable(copy.deepcopy(network.body), network.mean, network.std).eval()
