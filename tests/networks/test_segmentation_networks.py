"""Segmentation networks: every architecture on CNN and attention encoders, their specs, and what is refused."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from quick import cases

from heterokd.errors import CheckpointError, NetworkError, PairError
from heterokd.networks.bodies import network_names, published_classes
from heterokd.networks.network import build_network, deployable, predict_spec
from heterokd.networks.segmentation import SegmentationNetwork
from heterokd.networks.segmentation_bodies import lay_out
from heterokd.networks.weights import load_weights, save_weights, weights_hash
from heterokd.outputs import Signal

ALL = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES
PVT = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2]}
SWIN = {"depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4}
VIT = {"embed_dim": 32, "num_heads": 2, "decoder_fusion_channels": 32}
PLAIN = {"embed_dim": 32, "num_heads": 2, "depth": 2, "pyramid_channels": 16}
HIERA = {"embed_dim": 16, "stages": [1, 1, 1, 1]}

# name, options, stride of the logits, strides of the stages, kinds of the stages (one letter each)
NETWORKS: list[tuple[str, dict[str, Any], int, tuple[int, ...], str]] = [
    ("deeplabv3-resnet18", {"decoder_channels": 32}, 8, (4, 8, 8, 8), "cccc"),
    ("deeplabv3-resnet18", {"encoder_output_stride": 16}, 16, (4, 8, 16, 16), "cccc"),
    ("deeplabv3-mobilenet_v2", {"encoder_output_stride": 8, "decoder_channels": 64}, 8, (4, 8, 8, 8), "cccc"),
    ("deeplabv3-mit_b0", {}, 32, (4, 8, 16, 32), "aaaa"),
    ("deeplabv3-pvt_v2_b0", PVT, 32, (4, 8, 16, 32), "aaaa"),
    ("deeplabv3plus-test_resnet", {}, 4, (4, 8, 16, 16), "cccc"),
    ("deeplabv3plus-mit_b0", {"decoder_channels": 32}, 4, (4, 8, 16, 32), "aaaa"),
    ("segformer-mit_b0", {}, 4, (4, 8, 16, 32), "aaaa"),
    ("segformer-resnet18", {"decoder_segmentation_channels": 32}, 4, (4, 8, 16, 32), "cccc"),
    ("segformer-pvt_v2_b0", PVT, 4, (4, 8, 16, 32), "aaaa"),
    ("segformer-caformer_s18", {"decoder_segmentation_channels": 32}, 4, (4, 8, 16, 32), "ccaa"),
    ("upernet-mit_b0", {"decoder_channels": 32}, 4, (4, 8, 16, 32), "aaaa"),
    ("upernet-test_convnext", {"decoder_channels": 32}, 4, (4, 8, 16, 32), "cccc"),
    ("fpn-test_resnet", {"decoder_segmentation_channels": 32}, 4, (4, 8, 16, 32), "cccc"),
    ("fpn-swin_tiny_patch4_window7_224", SWIN, 4, (4, 8, 16, 32), "aaaa"),
    ("unet-test_resnet", {}, 1, (4, 8, 16, 32), "cccc"),
    ("unet-mit_b0", {}, 1, (4, 8, 16, 32), "aaaa"),
    ("unetplusplus-test_resnet", {}, 1, (4, 8, 16, 32), "cccc"),
    ("manet-test_resnet", {}, 1, (4, 8, 16, 32), "cccc"),
    ("linknet-pvt_v2_b0", PVT, 1, (4, 8, 16, 32), "aaaa"),
    ("pspnet-test_resnet", {}, 8, (4, 8, 8, 8), "cccc"),
    ("pspnet-pvt_v2_b0", PVT, 32, (4, 8, 16, 32), "aaaa"),
    ("dpt-test_vit", {"decoder_fusion_channels": 32}, 2, (16, 16, 16, 16), "aaaa"),
    ("dpt-vit_small_patch14_dinov2", {**VIT, "patch_size": 16}, 2, (16, 16, 16, 16), "aaaa"),
    ("dpt-vit_base_patch16_siglip_224", VIT, 2, (16, 16, 16, 16), "aaaa"),
    ("fpn-test_vit", {}, 4, (4, 8, 16, 32), "aaaa"),
    ("upernet-vit_small_patch14_dinov2", {**PLAIN, "decoder_channels": 32}, 4, (4, 8, 16, 32), "aaaa"),
    ("segformer-vit_small_patch16_dinov3", PLAIN, 4, (4, 8, 16, 32), "aaaa"),
    ("deeplabv3plus-vit_base_patch16_siglip_224", {**PLAIN, "decoder_channels": 32}, 4, (4, 8, 16, 32), "aaaa"),
    ("unet-vit_base_patch32_224", PLAIN, 1, (4, 8, 16, 32), "aaaa"),
    ("fpn-hiera_tiny_224", HIERA, 4, (4, 8, 16, 32), "aaaa"),
    ("upernet-hiera_small_abswin_256", {**HIERA, "decoder_channels": 32}, 4, (4, 8, 16, 32), "aaaa"),
]


def test_vits_of_other_patches_get_the_patch_that_dpt_joins() -> None:
    assert lay_out("dpt-vit_small_patch14_dinov2", 5, VIT, 64).arguments["patch_size"] == 16
    assert lay_out("dpt-vit_base_patch16_siglip_224", 5, VIT, 64).arguments["decoder_readout"] == "ignore"
    for name, problem in (
        ("dpt-mit_b0", "dpt needs an encoder of timm"),
        ("unet-mixer_s16_224", "Hiera or a plain ViT instead"),
        ("pan-test_resnet", "does not run on images of any size"),
    ):
        with pytest.raises(NetworkError, match=problem):
            predict_spec(name, 5, None, 64)
    assert predict_spec("pan-test_resnet", 5, None, 128).logits_stride == 4


def build(name: str, options: dict[str, Any] | None = None, classes: int = 5, size: int = 64) -> SegmentationNetwork:
    torch.manual_seed(0)
    network = build_network(name, classes, options, image_size=size).eval()
    assert isinstance(network, SegmentationNetwork)
    return network


def sides(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


QUICK = {  # every architecture, dilated encoders, attention
    "deeplabv3-mobilenet_v2",
    "deeplabv3plus-test_resnet",
    "segformer-pvt_v2_b0",
    "upernet-test_convnext",
    "fpn-swin_tiny_patch4_window7_224",
    "unet-test_resnet",
    "dpt-test_vit",
    "fpn-test_vit",
    "fpn-hiera_tiny_224",
}


@pytest.mark.parametrize(
    ("name", "options", "stride", "strides", "kinds"), cases(NETWORKS, quick=QUICK, names=itemgetter(0))
)
def test_network(name: str, options: dict[str, Any], stride: int, strides: tuple[int, ...], kinds: str) -> None:
    network = build(name, options)
    spec = predict_spec(name, 5, options, 64)
    assert network.spec == spec
    assert (spec.num_classes, spec.image_size, spec.serves, spec.stem) == (5, 64, ALL, None)
    assert spec.logits_stride == stride
    assert tuple(stage.stride for stage in spec.stages) == strides
    assert "".join(stage.kind[0] for stage in spec.stages) == kinds

    # any size: the image of training, and one that is no multiple of anything
    for size in ((64, 64), (70, 101)):
        with torch.no_grad():
            given = network(torch.rand(2, 3, *size), ALL)
        assert given.logits.shape == (2, 5, *sides(size, stride))
        assert given.embedding.shape == (2, spec.embedding_dim, *sides(size, stride))
        for stage, found in zip(spec.stages, given.stages, strict=True):
            assert found.shape == (2, stage.channels, *sides(size, stage.stride))
        # A head of 3 x 3 reads the padding at the right and bottom, which is cut off the embedding.
        edge = -1 if getattr(network.head, "kernel_size", (1, 1)) == (3, 3) else None
        inside = (..., slice(None, edge), slice(None, edge))
        assert torch.equal(given.logits[inside], network.head(given.embedding)[inside])

    # smp's own forward is these logits, brought up by its own last layer
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        native, logits = network.body(network.normalise(images)), network(images).logits
        if name.startswith("dpt-"):
            assert torch.equal(F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=True), native)
        elif not name.startswith("pspnet-"):  # smp's class assumes a stride of 8, and never dilates
            assert torch.equal(network.body.segmentation_head[1](logits), native)


# the pairs of the HeteroAKD paper, and the larger encoders of the same families
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("deeplabv3-resnet101", (256, 512, 1024, 2048)),
        ("deeplabv3-resnet50", (256, 512, 1024, 2048)),
        ("deeplabv3-mit_b4", (64, 128, 320, 512)),
        ("segformer-mit_b1", (64, 128, 320, 512)),
        ("segformer-pvt_v2_b2", (64, 128, 320, 512)),
        ("deeplabv3-pvt_v2_b1", (64, 128, 320, 512)),
        ("segformer-mit_b0", (32, 64, 160, 256)),
    ],
)
def test_big_networks_are_known_before_they_are_built(name: str, channels: tuple[int, ...]) -> None:
    spec = predict_spec(name, 19, None, 512)
    assert tuple(stage.channels for stage in spec.stages) == channels
    assert spec.kind == ("cnn" if "resnet" in name else "attention")
    assert spec.embedding_dim == 256


@pytest.mark.parametrize("architecture", [smp.DeepLabV3, smp.DeepLabV3Plus])
def test_undilated_weights_load_in_smp(architecture: type) -> None:
    network = build(f"{architecture.__name__.lower()}-mit_b0")
    assert architecture("mit_b0", encoder_weights=None, classes=5).load_state_dict(network.body.state_dict())


def test_padding_is_zeros_after_normalising_and_cut_off_again() -> None:
    network = build("segformer-mit_b0")
    images = torch.rand(1, 3, 40, 60)
    padded = F.pad(network.normalise(images), (0, 4, 0, 24)) * network.std + network.mean
    with torch.no_grad():
        found, whole = network(images).logits, network(padded).logits
    assert found.shape[-2:] == (10, 15)
    assert torch.allclose(found, whole[..., :10, :15], atol=1e-5)


def test_gives_what_is_asked_for_and_no_more() -> None:
    network = build("fpn-test_resnet")
    images = torch.rand(1, 3, 64, 64)
    for needs in (Signal.LOGITS, Signal.EMBEDDING, Signal.STAGES, Signal.NONE):
        assert network(images, needs).serves == needs
    with pytest.raises(PairError, match=r"fpn-test_resnet' has no Signal\.TAIL: a segmentation network gives logits"):
        network(images, Signal.LOGITS | Signal.TAIL)


def test_a_step_reaches_every_weight() -> None:
    network = build("deeplabv3plus-test_resnet", {"decoder_channels": 16}).train()
    given = network(torch.rand(2, 3, 64, 64), ALL)
    (given.logits.square().mean() + sum(stage.mean() for stage in given.stages)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_statistics_are_those_of_the_encoder() -> None:
    assert network_mean("fpn-resnet18") == pytest.approx([0.485, 0.456, 0.406])
    assert network_mean("fpn-test_resnet") == pytest.approx([0.5, 0.5, 0.5])  # as timm says
    given = build_network("fpn-test_resnet", 2, normalisation=((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "mean" not in given.state_dict()


def network_mean(name: str) -> list[float]:
    mean: list[float] = build(name).mean.flatten().tolist()
    return mean


@pytest.mark.parametrize(
    ("name", "size"), [("fpn-test_resnet", 64), ("deeplabv3-mit_b0", 64), ("segformer-pvt_v2_b0", 72)]
)
def test_deployable(name: str, size: int) -> None:
    network = build(name, PVT if "pvt" in name else {}, size=size)
    images = torch.rand(2, 3, size, size)
    deployed = deployable(network)
    with torch.no_grad():
        expected = F.interpolate(network(images).logits, size=(size, size), mode="bilinear", align_corners=False)
        assert torch.equal(deployed(images), expected)
        exported = torch.export.export(deployed, (images,)).module()
        assert torch.allclose(exported(images), expected, atol=1e-5)


def test_weights(tmp_path: Path) -> None:
    options = {"decoder_segmentation_channels": 32}
    network, other = build("segformer-test_resnet", options), build("segformer-test_resnet", options)
    with torch.no_grad():
        network.head.weight.add_(1)
    assert weights_hash(network) != weights_hash(other)
    save_weights(network, tmp_path / "student.safetensors")
    load_weights(other, tmp_path / "student.safetensors")
    assert weights_hash(network) == weights_hash(other) == weights_hash(network.body)

    with pytest.raises(CheckpointError, match="in the file has 5 classes, the experiment's data set has 3"):
        load_weights(build("segformer-test_resnet", options, classes=3), tmp_path / "student.safetensors")
    with pytest.raises(CheckpointError, match="are not of network 'fpn-test_resnet'"):
        load_weights(build("fpn-test_resnet"), tmp_path / "student.safetensors")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deeplab-resnet18", {}, "'deeplab' is not a segmentation architecture .* did you mean 'deeplabv3-resnet18'?"),
    ("resnet-18", {}, "a classifier's name holds no hyphen.* did you mean 'resnet18'?"),
    ("deeplabv3-mit_b9", {}, "there is no encoder 'mit_b9': did you mean 'mit_b"),
    ("deeplabv3-resnet18", {"decoder_channel": 8}, "no option 'decoder_channel': did you mean 'decoder_channels'"),
    ("segformer-resnet18", {"depths": [1, 1, 1, 1]}, "has no option 'depths': "),  # smp would ignore it
    ("segformer-pvt_v2_b0", {"depth": [1, 1, 1, 1]}, "has no option 'depth': did you mean 'depths'"),
    ("deeplabv3-resnet18", {"encoder_output_stride": 4}, "cannot be built with options .* got 4"),
    ("deeplabv3-mit_b0", {"encoder_output_stride": 8}, "cannot be dilated to 8: set options.encoder_output_stride"),
    ("deeplabv3-pvt_v2_b0", {"encoder_output_stride": 8}, "cannot be dilated to 8: set options.encoder_output_stride"),
    ("segformer-resnet18", {"encoder_depth": 3}, "its encoder gives 3 maps, 4 are needed"),
    ("segformer-mixer_s16_224", {}, "does not give maps at strides 4, 8, 16 and 32"),
    ("fpn-efficientformerv2_s0", {}, "does not run on images of any size"),
    ("deeplabv3-resnet18.nope", {}, "Invalid pretrained tag"),
    ("fpn-resnet18", {"decoder_dropout": {1}}, "options must be numbers, words and lists"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NetworkError, match=sentence):
        predict_spec(name, 5, options, 64)
    with pytest.raises(NetworkError, match=sentence):
        build_network(name, 5, options, image_size=64)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", refuse)
    with pytest.raises(NetworkError, match="its encoder's weights cannot be loaded: no connection"):
        build_network("segformer-mit_b0", 5, pretrained=True)


def test_names() -> None:
    names = network_names("deeplabv3-*")
    assert {"deeplabv3-resnet18", "deeplabv3-mobilenet_v2", "deeplabv3-mit_b4"} <= set(names)
    assert "resnet18" in network_names("resnet*")
    assert not any("-" in name for name in network_names("vit_*"))
    assert published_classes("segformer-mit_b0") == 0
