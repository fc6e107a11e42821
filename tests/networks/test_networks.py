"""Networks: every family's split, its spec, its tail, and the sentences of what is refused."""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from quick import cases

from heterokd.errors import CheckpointError, NetworkError, PairError
from heterokd.networks.bodies import network_names, published_classes
from heterokd.networks.classifier import Network, expected_negative
from heterokd.networks.network import build_network, deployable, predict_spec
from heterokd.networks.points import twelfths
from heterokd.networks.splits import split_network
from heterokd.networks.weights import load_weights, save_weights, weights_hash
from heterokd.outputs import EVERY_NETWORK, Signal, Tail

ALL = EVERY_NETWORK
VIT = {"patch_size": 4, "depth": 6, "embed_dim": 48, "num_heads": 3}
SWIN = {"patch_size": 2, "window_size": 4, "depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8]}
MLP = {"patch_size": 4, "num_blocks": 5, "embed_dim": 32}

# name, options, image size, kinds of the four stages (one letter each), sides of their maps
FAMILIES: list[tuple[str, dict[str, Any], int, str, tuple[int, int, int, int]]] = [
    ("resnet18", {}, 32, "cccc", (8, 4, 2, 1)),
    ("resnet50", {}, 64, "cccc", (16, 8, 4, 2)),
    ("regnetx_002", {}, 48, "cccc", (12, 6, 3, 2)),
    ("mobilenetv1_100", {}, 32, "cccc", (8, 4, 2, 1)),
    ("mobilenetv2_100", {}, 64, "cccc", (16, 8, 4, 2)),
    ("mobilenetv3_small_050", {}, 32, "cccc", (8, 4, 2, 1)),
    ("efficientnet_b0", {}, 64, "cccc", (16, 8, 4, 2)),
    ("convnext_atto", {}, 32, "cccc", (8, 4, 2, 1)),
    ("convnextv2_atto", {"depths": [1, 1, 2, 1]}, 64, "cccc", (16, 8, 4, 2)),
    ("poolformer_s12", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, 64, "cccc", (16, 8, 4, 2)),
    ("caformer_s18", {"depths": [1, 1, 2, 1], "dims": [32, 64, 96, 128]}, 64, "ccaa", (16, 8, 4, 2)),
    ("test_mambaout", {}, 64, "cccc", (16, 8, 4, 2)),
    ("swin_tiny_patch4_window7_224", SWIN, 32, "aaaa", (16, 8, 4, 2)),
    ("pvt_v2_b0", {}, 64, "aaaa", (16, 8, 4, 2)),
    ("vit_small_patch16_224", VIT, 32, "aaaa", (8, 8, 8, 8)),
    ("deit_tiny_patch16_224", VIT, 32, "aaaa", (8, 8, 8, 8)),
    ("deit_tiny_distilled_patch16_224", VIT, 32, "aaaa", (8, 8, 8, 8)),
    ("vit_small_patch14_dinov2", VIT | {"patch_size": 8}, 32, "aaaa", (4, 4, 4, 4)),
    ("vit_small_patch14_reg4_dinov2", VIT | {"patch_size": 8}, 32, "aaaa", (4, 4, 4, 4)),
    ("vit_base_patch16_siglip_224", VIT, 32, "aaaa", (8, 8, 8, 8)),
    ("mixer_b16_224", MLP, 32, "mmmm", (8, 8, 8, 8)),
    ("resmlp_12_224", MLP, 32, "mmmm", (8, 8, 8, 8)),
    ("test_vit", {}, 64, "aaaa", (4, 4, 4, 4)),
    ("test_efficientnet", {}, 64, "cccc", (16, 8, 4, 2)),
    ("vgg11_bn", {"mlp_ratio": 1 / 128}, 32, "cccc", (16, 8, 4, 2)),
    ("densenet121", {"block_config": [2, 2, 2, 2]}, 64, "cccc", (16, 8, 4, 2)),
    ("swin_pico", {"window_size": 4}, 64, "aaaa", (16, 8, 4, 2)),
    ("swin_nano", {}, 56, "aaaa", (14, 7, 4, 2)),
    ("vgg8", {}, 32, "cccc", (16, 8, 4, 4)),
    ("vgg8", {}, 64, "cccc", (32, 16, 8, 4)),
    ("resnet20", {}, 32, "cccc", (32, 32, 16, 8)),
    ("shufflenet_v2", {}, 64, "cccc", (16, 8, 4, 2)),
]
IDS = [f"{family[0]}-{family[2]}" for family in FAMILIES]
QUICK = {  # each way in which a network is split, and each kind of stage
    "resnet18", "mobilenetv3_small_050", "convnext_atto", "caformer_s18", "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_b16_224", "test_efficientnet", "densenet121",
    "vgg8", "resnet20",
}  # fmt: skip
CLASS_MAPS = {  # a head that averages, then one linear layer
    "resnet18", "resnet50", "regnetx_002", "mobilenetv1_100", "mobilenetv2_100", "efficientnet_b0",
    "swin_tiny_patch4_window7_224", "pvt_v2_b0", "mixer_b16_224", "resmlp_12_224", "test_efficientnet",
    "densenet121", "swin_pico", "swin_nano", "vgg8", "resnet20", "shufflenet_v2",
}  # fmt: skip
PRE_ACTIVATIONS = {  # every stage ends in BatchNorm and ReLU
    "resnet18", "resnet50", "regnetx_002", "mobilenetv1_100", "vgg11_bn", "vgg8", "resnet20",
}  # fmt: skip


def scrambled(name: str, options: dict[str, Any], size: int, classes: int = 5) -> Network:
    """In eval mode, with weights that leave no token, layer scale or head at zero."""
    torch.manual_seed(0)
    network = build_network(name, classes, options, image_size=size).eval()
    with torch.no_grad():
        for key, parameter in network.body.named_parameters():
            if key.endswith(("token", "head.weight", "head_dist.weight", "fc.weight", "classifier.weight", "gamma")):
                parameter.normal_(std=0.2)
    return network


@pytest.mark.parametrize(
    ("name", "options", "size", "kinds", "sides"), cases(FAMILIES, quick=QUICK, names=itemgetter(0)), ids=IDS
)
def test_family(name: str, options: dict[str, Any], size: int, kinds: str, sides: tuple[int, ...]) -> None:
    network = scrambled(name, options, size)
    spec = predict_spec(name, 5, options, size)
    assert network.spec == spec
    assert spec.image_size == size
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        given = network(images, ALL)
        native = network.body((images - network.mean) / network.std)
    assert spec.serves == given.serves | (Signal.CLASS_MAPS if name in CLASS_MAPS else Signal.NONE) | (
        Signal.PRE_ACTIVATIONS if name in PRE_ACTIVATIONS else Signal.NONE
    )

    # the prediction is what came out
    assert given.logits.shape == (2, 5)
    assert given.embedding.shape == (2, spec.embedding_dim)
    assert spec.embedding_dim == network.body.head_hidden_size
    assert "".join(stage.kind[0] for stage in spec.stages) == kinds
    assert tuple(spec.side(i) for i in (1, 2, 3, 4)) == sides
    for stage, found, side in zip(spec.stages, given.stages, sides, strict=True):
        assert found.shape == (2, stage.channels, side, side)

    # the whole is timm's own forward, whatever else was asked for; embeddings are timm's own
    assert torch.equal(network(images).logits, native)
    assert torch.allclose(given.logits, native, atol=1e-6)
    with torch.no_grad():
        embedding = network.body.forward_head(network.body.forward_features(network.normalise(images)), pre_logits=True)
    assert torch.equal(given.embedding, embedding)
    assert torch.equal(network(images, Signal.EMBEDDING).embedding, embedding)

    # the tail continues from every stage
    tail: Tail = given.tail
    for j in (2, 3, 4, 5):
        with torch.no_grad():
            again = tail.outputs(given.stages[j - 2], j)
            assert torch.allclose(tail(given.stages[j - 2], j), native, atol=1e-5)
        assert torch.allclose(again.logits, native, atol=1e-5)
        assert torch.allclose(again.embedding, embedding, atol=1e-5)

    # stage by stage, from the stem on
    assert spec.stem is not None
    assert given.stem.shape == (2, spec.stem.channels, spec.side(0), spec.side(0))
    x = given.stem
    with torch.no_grad():
        for j in (1, 2, 3, 4):
            x = tail.step(x, j)
            assert torch.allclose(x, given.stages[j - 1], atol=1e-5)
        assert torch.allclose(tail(x, 5), native, atol=1e-5)

    # a frozen tail passes gradient to what enters it, as a map or as tokens
    network.requires_grad_(False)
    for j in (2, 4, 5):
        stage_map = given.stages[j - 2].clone().requires_grad_()
        tokens = given.stages[j - 2].flatten(2).transpose(1, 2).clone().requires_grad_()
        from_map, from_tokens = network.tail(stage_map, j), network.tail(tokens, j)
        assert torch.allclose(from_map, from_tokens, atol=1e-5)
        (from_map.square().sum() + from_tokens.square().sum()).backward()
        for entered in (stage_map, tokens):
            assert entered.grad is not None
            assert entered.grad.isfinite().all()
            if spec.prefix_tokens == 0 or j < 5:  # class tokens alone reach these heads
                assert entered.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family[0] in QUICK else pytest.mark.thorough, id=f"{family[0]}-{family[2]}")
        for family in FAMILIES
        if family[0] in CLASS_MAPS
    ],
)
def test_class_maps_average_to_the_logits(family: tuple[str, dict[str, Any], int, str, tuple[int, ...]]) -> None:
    name, options, size = family[:3]
    network = scrambled(name, options, size)
    with torch.no_grad():
        given = network(torch.rand(2, 3, size, size), Signal.LOGITS | Signal.CLASS_MAPS)
    side = network.spec.side(4)
    assert given.class_maps.shape == (2, 5, side, side)
    assert torch.allclose(given.class_maps.mean(dim=(2, 3)), given.logits, atol=1e-4)
    assert given.serves == Signal.LOGITS | Signal.CLASS_MAPS


@pytest.mark.parametrize("name", cases(sorted(PRE_ACTIVATIONS), quick={"resnet18", "vgg8", "mobilenetv1_100"}))
def test_pre_activations_are_what_the_last_relu_of_each_stage_takes(name: str) -> None:
    network = build_network(name, 5, image_size=64).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # the last one of a branch is born 0
    relu = torch.nn.ReLU6() if name == "mobilenetv1_100" else torch.nn.ReLU()
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    given = network(torch.rand(2, 3, 64, 64), Signal.LOGITS | Signal.STAGES | Signal.PRE_ACTIVATIONS)
    for before, after, margin, stage in zip(
        given.pre_activations.maps, given.stages, given.pre_activations.margins, network.spec.stages, strict=True
    ):
        assert before.min() < 0
        assert torch.equal(relu(before), after)
        assert margin.shape == (stage.channels,)
        assert not margin.requires_grad
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    torch.stack([before.square().mean() for before in given.pre_activations.maps]).sum().backward()
    first = next(network.body.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_margins_are_of_the_branch_not_of_the_shortcut() -> None:
    assert [norm for _, norm in split_network("resnet50", 5, None, None).activations] == [
        "layer1.2.bn3",
        "layer2.3.bn3",
        "layer3.5.bn3",
        "layer4.2.bn3",
    ]
    one_block = split_network("resnet50", 5, {"layers": [1, 1, 1, 1]}, None)  # whose shortcuts end in BatchNorm as well
    assert {norm for _, norm in one_block.activations} == {f"layer{i}.0.bn3" for i in (1, 2, 3, 4)}


def test_expected_negative_response() -> None:
    mean, std = torch.tensor([0.0, 0.5, -0.5, 0.3, 9.0, 0.0, -2.0]), torch.tensor([1.0, 1.0, -2.0, 0.2, 1.0, 0.0, 0.0])
    found = expected_negative(mean, std)
    torch.manual_seed(0)
    for i in range(4):
        sample = mean[i].double() + std[i].abs() * torch.randn(2_000_000, dtype=torch.float64)
        assert found[i] == pytest.approx(sample[sample < 0].mean().item(), rel=5e-3)
    assert found[4:].tolist() == [-3.0, 0.0, -2.0]


def test_signals_that_a_structure_lacks() -> None:
    vit = scrambled("vit_small_patch16_224", VIT, 32)
    with pytest.raises(PairError, match=r"'vit_small_patch16_224' has no .*CLASS_MAPS.*: its structure"):
        vit(torch.rand(1, 3, 32, 32), Signal.LOGITS | Signal.CLASS_MAPS)
    averaging = VIT | {"class_token": False, "global_pool": "avg", "fc_norm": False}
    assert Signal.CLASS_MAPS in predict_spec("vit_small_patch16_224", 5, averaging, 32).serves
    norm_after = averaging | {"fc_norm": True}
    assert Signal.CLASS_MAPS not in predict_spec("vit_small_patch16_224", 5, norm_after, 32).serves
    assert Signal.CLASS_MAPS not in predict_spec("resnet18", 5, {"global_pool": "max"}).serves
    with_token = VIT | {"global_pool": "avg", "fc_norm": False}
    network = scrambled("vit_small_patch16_224", with_token, 32)
    with torch.no_grad():
        given = network(torch.rand(2, 3, 32, 32), Signal.LOGITS | Signal.CLASS_MAPS)
    assert torch.allclose(given.class_maps.mean(dim=(2, 3)), given.logits, atol=1e-5)


def test_stem_of_another_layout_is_told_from_its_stages() -> None:
    network = scrambled("pvt_v2_b0", {}, 128)  # its stem gives [B, 32, 32, 32]: channels last, unlike its stages
    with torch.no_grad():
        given = network(torch.rand(1, 3, 128, 128), ALL)
        assert torch.allclose(given.tail.step(given.stem, 1), given.stages[0], atol=1e-5)
    assert split_network("pvt_v2_b0", 5, None, 128).stem_layout == "NHWC"


def test_class_tokens_go_along_with_a_changed_map() -> None:
    network = scrambled("vit_small_patch16_224", VIT, 32)
    with torch.no_grad():
        given = network(torch.rand(2, 3, 32, 32), ALL)
        changed = given.stages[1] + 0
        assert not torch.allclose(given.tail.step(changed, 3), given.stages[2], atol=1e-4)
        third = given.tail.step(changed, 3, like=given.stages[1])
        assert torch.allclose(third, given.stages[2], atol=1e-5)
        assert torch.allclose(given.tail(given.tail.step(third + 0, 4, like=third), 5), given.logits, atol=1e-5)


def test_state_dict_is_timms() -> None:
    network = scrambled("vit_small_patch16_224", VIT, 32)
    plain = timm.create_model("vit_small_patch16_224", num_classes=5, img_size=32, **VIT)
    plain.load_state_dict(network.body.state_dict())
    assert set(network.state_dict()) == {f"body.{key}" for key in plain.state_dict()}


@pytest.mark.parametrize("name", cases(network_names("test_*"), quick={"test_resnet", "test_vit", "test_mambaout"}))
def test_tiny_networks(name: str) -> None:
    network = build_network(name, 3).eval()
    size = network.spec.image_size
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network(images).logits, network.body((images - network.mean) / network.std))
    assert size == 160


def test_unknown_name() -> None:
    with pytest.raises(NetworkError, match="'resnet118' is not one of timm's: did you mean 'resnet18'"):
        predict_spec("resnet118", 5)


def test_options() -> None:
    with pytest.raises(NetworkError, match=r"'mixer_b16_224' has no option 'depth'.*num_blocks"):
        build_network("mixer_b16_224", 5, {"depth": 4})
    with pytest.raises(NetworkError, match=r"'vit_small_patch16_224' has no option 'depths'"):
        predict_spec("vit_small_patch16_224", 5, {"depths": 4})
    with pytest.raises(NetworkError, match="'poolformer_s12' has no option 'colour'"):
        predict_spec("poolformer_s12", 5, {"colour": 4})
    three_blocks = predict_spec("vit_small_patch16_224", 5, VIT | {"depth": 3}, 32)
    assert (three_blocks.serves, three_blocks.stages) == (Signal.LOGITS | Signal.EMBEDDING, ())
    with pytest.raises(NetworkError, match="holes"):
        predict_spec("vit_small_patch16_224", 5, VIT | {"patch_drop_rate": 0.2}, 32)
    with pytest.raises(NetworkError, match="numbers, words and lists"):
        predict_spec("vit_small_patch16_224", 5, {"norm_layer": torch.nn.LayerNorm})
    with pytest.raises(NetworkError, match="num_classes"):
        build_network("resnet18", 0)
    with pytest.raises(NetworkError, match="image_size must be at least 1, got 0"):
        predict_spec("resnet18", 5, image_size=0)


def test_image_size() -> None:
    assert predict_spec("vit_small_patch16_224", 5).image_size == 224
    assert predict_spec("vit_small_patch16_224", 5, VIT | {"img_size": 32}, 64).image_size == 32  # options win
    assert predict_spec("resnet18", 5, image_size=32).image_size == 32
    network = scrambled("vit_small_patch16_224", VIT, 32)
    images = torch.rand(2, 3, 48, 40)
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(network(images).logits, network(resized).logits)


def test_mean_and_std() -> None:
    network = build_network("test_resnet", 3, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    images = torch.rand(1, 3, 160, 160)
    assert torch.allclose(network.normalise(images)[0, 1], (images[0, 1] - 0.2) / 0.5)
    config = build_network("test_resnet", 3).body.pretrained_cfg
    assert torch.allclose(build_network("test_resnet", 3).mean.flatten(), torch.tensor(config["mean"]))


def test_same_seed_same_weights_whether_the_split_is_cached_or_not() -> None:
    hashes = []
    for _ in range(2):
        torch.manual_seed(3)
        hashes.append(weights_hash(build_network("test_vit", 3, {"depth": 7})))
    assert hashes[0] == hashes[1]


def test_split_by_twelfths() -> None:
    assert twelfths(12) == [2, 4, 10]
    assert twelfths(24) == [4, 8, 20]
    assert twelfths(6) == [1, 2, 5]
    assert twelfths(4) == [1, 2, 3]
    for depth in range(4, 41):
        ends = [0, *twelfths(depth), depth]
        assert all(a < b for a, b in pairwise(ends))


@pytest.mark.thorough
def test_networks_of_the_papers_tables() -> None:
    names = ("swin_pico", "swin_nano", "vgg8", "resnet20", "shufflenet_v2")
    assert set(names) < set(network_names())
    classes = (1000, 1000, 100, 100, 1000)
    built = [build_network(name, classes_of) for name, classes_of in zip(names, classes, strict=True)]
    # what the sources print: 9.6 M for Swin-N; CRD's networks; torchvision's 2,278,604
    assert [sum(weight.numel() for weight in network.parameters()) for network in built][1:] == [
        9_599_940,
        3_965_028,
        278_324,
        2_278_604,
    ]
    for network in built:
        with pytest.raises(NetworkError, match="publishes no weights"):
            published_classes(network.name)
        with pytest.raises(NetworkError, match="pretrained weights cannot be loaded"):
            build_network(network.name, 3, pretrained=True)
    theirs = torchvision.models.shufflenet_v2_x1_0().eval()
    built[-1].body.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built[-1].body.eval()(images), theirs(images))


@pytest.mark.thorough
def test_large_networks_are_predicted_without_memory() -> None:
    """DINOv2's and SigLIP2's ViT-L: 300 million weights each, which nobody lays out in memory to know shapes."""
    spec = predict_spec("vit_large_patch14_dinov2", 200, None, 224)
    assert (spec.embedding_dim, spec.side(4), spec.prefix_tokens) == (1024, 16, 1)
    spec = predict_spec("vit_large_patch16_siglip_256.v2_webli", 200)
    assert (spec.embedding_dim, spec.side(4), spec.prefix_tokens, spec.image_size) == (1024, 16, 0, 256)


def test_sequences_are_cut_before_a_pooling() -> None:
    vgg = split_network("vgg11_bn", 5, None, 64)
    assert (vgg.stem[-1], [stage[0] for stage in vgg.stages]) == (
        "features.2",
        ["features.3", "features.7", "features.14", "features.21"],
    )
    assert vgg.finish == ("features.28",)
    densenet = split_network("densenet121", 5, None, 64)
    assert densenet.stages[0] == ("features.pool0", "features.denseblock1")
    assert densenet.finish == ("features.norm5",)


def test_groups_join_at_changes_of_resolution() -> None:
    stages = split_network("mobilenetv2_100", 5, None, None).stages
    assert [len(stage) for stage in stages] == [2, 1, 2, 2]


def test_class_tokens() -> None:
    network = scrambled("deit_tiny_distilled_patch16_224", VIT, 32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        given = network(images, ALL)
        stage = given.stages[1]
        fresh = given.tail(stage.clone(), 3)  # not the forward's own map: fresh class tokens
        assert (fresh - given.logits).abs().max() > 1e-4
        tokens = stage.flatten(2).transpose(1, 2)
        prefix = torch.cat([network.body.cls_token, network.body.dist_token], dim=1).expand(2, -1, -1)
        assert torch.allclose(network.tail(torch.cat([prefix, tokens], dim=1), 3), fresh, atol=1e-6)
        other = network(images[:1], ALL)
        assert not torch.allclose(other.tail(stage, 3), given.logits, atol=1e-4)  # another forward's map
        # any square grid will do
        assert network.tail(torch.rand(2, 48, 5, 5), 3).shape == (2, 5)


def test_own_class_tokens_carry_gradient_to_early_stages() -> None:
    network = scrambled("vit_small_patch16_224", VIT, 32).train()
    given = network(torch.rand(2, 3, 32, 32), Signal.STAGES | Signal.TAIL)
    (grad,) = torch.autograd.grad(given.tail(given.stages[2], 4).square().sum(), given.stages[2], retain_graph=True)
    assert grad.abs().sum() > 0
    given.tail(given.stages[2], 4).sum().backward()
    assert network.body.patch_embed.proj.weight.grad.abs().sum() > 0


def test_two_heads_give_one_set_of_logits_in_training_too() -> None:
    network = scrambled("deit_tiny_distilled_patch16_224", VIT, 32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network.train()(images).logits, network.eval()(images).logits)


def test_batch_norm_counts_one_forward() -> None:
    network = build_network("mobilenetv3_small_050", 3, image_size=32).train()
    given = network(torch.rand(4, 3, 32, 32), ALL)
    assert given.logits.requires_grad
    assert network.body.blocks[0][0].bn1.num_batches_tracked == 1


def test_wrong_tails() -> None:
    mixer = scrambled("mixer_b16_224", MLP, 32)
    with pytest.raises(PairError, match=r"mixes exactly 64 tokens by linear layers; got 49"):
        mixer.tail(torch.rand(2, 32, 7, 7), 3)
    assert mixer.tail(torch.rand(2, 32, 7, 7), 5).shape == (2, 5)
    with pytest.raises(PairError, match=r"j is 2, 3 or 4"):
        mixer.tail(torch.rand(2, 32, 8, 8), 1)
    with pytest.raises(PairError, match=r"a map \[B, 32, 8, 8\] or tokens \[B, 64, 32\]; got shape \(2, 16, 8, 8\)"):
        mixer.tail(torch.rand(2, 16, 8, 8), 3)
    with pytest.raises(PairError, match="63 tokens are not a square map"):
        mixer.tail(torch.rand(2, 63, 32), 3)
    assert scrambled("swin_tiny_patch4_window7_224", SWIN, 32).tail(torch.rand(2, 16, 12, 12), 2).shape == (2, 5)
    with pytest.raises(PairError, match=r"step\(x, j=5\): j is 1, 2, 3 or 4"):
        mixer.tail.step(torch.rand(2, 32, 8, 8), 5)
    with pytest.raises(PairError, match=r"needs the output of the stem, a map \[B, 32, 8, 8\]"):
        mixer.tail.step(torch.rand(2, 3, 8, 8), 1)
    maxvit = scrambled("test_maxvit", {}, 160)  # its relative positions are made for one size
    with pytest.raises(PairError, match=r"stage 3 takes a map of 20 x 20 and no other"):
        maxvit.tail(torch.rand(2, 64, 24, 24), 3)


def test_classifier_that_is_a_convolution() -> None:
    network = build_network("resnetv2_18", 3, image_size=32).eval()
    given = network(torch.rand(2, 3, 32, 32), ALL)
    assert given.embedding.shape == (2, 512)
    assert given.logits.shape == (2, 3)


def test_pretrained_weights_that_cannot_be_had() -> None:
    with pytest.raises(NetworkError, match=r"'resnet18\.no_such_tag'"):
        build_network("resnet18.no_such_tag", 3, pretrained=True)


def test_deployable() -> None:
    network = scrambled("deit_tiny_distilled_patch16_224", VIT, 32).train()
    images = torch.rand(2, 3, 32, 32)
    module = deployable(network)
    assert network.body.training
    with torch.no_grad():
        logits = module(images)
        assert torch.equal(logits, network.eval()(images).logits)
        exported = torch.export.export(module, (images,)).module()
        assert torch.allclose(exported(images), logits, atol=1e-5)


def test_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = build_network("test_resnet", 10), build_network("test_resnet", 10)
    path = tmp_path / "folder" / "student.safetensors"
    save_weights(first, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert weights_hash(first) != weights_hash(second)
    load_weights(second, path)
    assert weights_hash(first) == weights_hash(second) == weights_hash(first.body)

    with pytest.raises(CheckpointError, match=r"'test_resnet' in the file has 10 classes, .* data set has 100"):
        load_weights(build_network("test_resnet", 100), path)
    with pytest.raises(CheckpointError, match=r"not of network 'test_vit': 'cls_token' is missing"):
        load_weights(build_network("test_vit", 10), path)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors do not exist"):
        load_weights(first, tmp_path / "nowhere.safetensors")
    for damage in (path.read_bytes()[:-100], b"", b"not weights at all"):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"student.safetensors are damaged"):
            load_weights(second, path)
    assert weights_hash(first) == weights_hash(second)


def test_weights_of_another_width(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(build_network("test_vit", 3, {"embed_dim": 32}), path)
    with pytest.raises(CheckpointError, match=r"'cls_token' has shape \(1, 1, 32\) in the file, here \(1, 1, 64\)"):
        load_weights(build_network("test_vit", 3), path)
