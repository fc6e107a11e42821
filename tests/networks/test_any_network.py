"""Any classifier of timm as teacher and as student: what it gives, and what it leaves out."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import pytest
import timm
import torch
from quick import cases
from timm.models import model_entrypoint

from heterokd.config.reading import load_experiment
from heterokd.errors import PairError
from heterokd.execution.check import check_experiment
from heterokd.methods.fitnet import FitNet
from heterokd.methods.hcd import HCD
from heterokd.methods.kd import KD
from heterokd.methods.ofa import OFA
from heterokd.networks.families import FAMILIES, networks_page
from heterokd.networks.network import build_network, deployable, predict_spec
from heterokd.networks.points import stage_ends
from heterokd.networks.tapped import TappedNetwork
from heterokd.outputs import Batch, Signal

HEAD = Signal.LOGITS | Signal.EMBEDDING

# one of each way in which a network is read: shared position bias; maps and tokens of several layouts, with two heads;
# several branches; a block that runs both on maps and on tokens
READ = [("test_vit_relpos", 96, True), ("levit_128s", 64, True), ("mobilevit_xxs", 64, True)]


def built(name: str, size: int) -> TappedNetwork:
    torch.manual_seed(0)
    network = build_network(name, 5, image_size=size).eval()
    assert isinstance(network, TappedNetwork)
    with torch.no_grad():
        for key, parameter in network.body.named_parameters():
            if key.endswith("weight") and "head" in key:  # timm's heads start near 0
                parameter.normal_(std=0.2)
    return network


@pytest.mark.parametrize(("name", "size", "has_tail"), cases(READ, quick={"levit_128s"}, names=itemgetter(0)))
def test_outputs(name: str, size: int, has_tail: bool) -> None:
    network = built(name, size)
    spec = network.spec
    assert spec == predict_spec(name, 5, None, size)
    assert (Signal.TAIL in spec.serves) == has_tail
    images = torch.rand(2, 3, size, size)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        given = network(images, spec.serves)
        native = network.body(network.normalise(images))
        assert torch.equal(given.logits, native)
        assert torch.equal(deployable(network)(images), native)
        assert given.embedding.shape == (2, spec.embedding_dim)
        for number, stage in enumerate(given.stages, start=1):
            assert stage.shape == (2, spec.at(number).channels, spec.side(number), spec.side(number))
        for j in (2, 3, 4, 5):
            again = given.tail.outputs(given.stages[j - 2], j)
            assert torch.allclose(again.logits, native, atol=1e-5)
            assert torch.allclose(again.embedding, given.embedding, atol=1e-5)
        for j in (2, 3, 4):
            assert torch.allclose(given.tail.step(given.stages[j - 2], j), given.stages[j - 1], atol=1e-5)
    network.train()  # what comes before a stage is not run again: BatchNorm counts no batch of it
    network.tail(given.stages[2].clone(), 4)
    before = [key for key in state if key.startswith(("body.stem", "body.stages.0", "body.patch_embed"))]
    assert before
    assert all(torch.equal(network.state_dict()[key], state[key]) for key in before)
    stage = given.stages[1].clone().requires_grad_()
    network.requires_grad_(False).tail(stage, 3).square().sum().backward()
    assert stage.grad is not None
    assert stage.grad.abs().sum() > 0
    assert not [module for module in network.body.modules() if "forward" in vars(module)]


@pytest.mark.thorough
@pytest.mark.parametrize("module", FAMILIES)
def test_every_module_of_timm(module: str) -> None:
    family = FAMILIES[module]
    torch.manual_seed(0)
    size = family.image_size
    network = build_network(family.network, 5, family.options, image_size=size).eval()
    other = build_network("test_resnet", 5, image_size=size)
    images, labels = torch.rand(2, 3, size, size), torch.tensor([0, 1])
    if Signal.TAIL in network.spec.serves:
        with torch.no_grad():
            given = network(images, HEAD | Signal.STAGES | Signal.TAIL)
            for j in (2, 3, 4, 5):
                assert torch.allclose(given.tail(given.stages[j - 2], j), given.logits, atol=1e-4)
    for student, teacher in ((network.train(), other.eval()), (other.train(), network.eval())):
        student.train()
        method = KD(None, student.spec, teacher.spec)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        with torch.no_grad():
            target = teacher(images)
        for _ in range(2):
            terms = method(student(images), target, Batch(images, labels, labels), 0.5)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)


@pytest.mark.thorough
def test_the_page_is_written_from_the_networks() -> None:
    modules = {model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {f"timm.models.{module}" for module in FAMILIES} == {name for name in modules if name.startswith("timm.")}
    specs = [family.spec() for family in FAMILIES.values()]
    assert sum(Signal.STAGES in spec.serves for spec in specs) >= 92
    assert sum(Signal.TAIL in spec.serves for spec in specs) >= 70
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    assert page.read_text(encoding="utf-8") == networks_page()


@pytest.mark.thorough
def test_stages_without_a_tail() -> None:
    spec = predict_spec("hrnet_w18_small", 5, None, 64)  # its branches exchange: no stage is all that the next reads
    assert spec.serves == HEAD | Signal.STAGES
    assert [stage.channels for stage in spec.stages] == [128, 256, 512, 1024]


def test_what_a_network_lacks_leaves_out_methods() -> None:
    bare = predict_spec("vit_tiny_patch16_224", 5, {"depth": 2}, 32)  # two blocks are no four stages
    whole = predict_spec("test_resnet", 5, None, 32)
    assert (bare.serves, bare.stages, bare.kind) == (HEAD, (), "attention")
    KD(None, bare, whole)
    KD(None, whole, bare)
    HCD(None, whole, bare)  # reads the teacher's logits and embedding alone
    with pytest.raises(PairError, match="it reads the student's stages, which this network does not give"):
        OFA(None, bare, whole)
    with pytest.raises(PairError, match=r"gives no stages|it reads the teacher's stages"):
        FitNet(None, whole, bare)
    with pytest.raises(PairError, match=r"has no Signal.STAGES"):
        build_network("vit_tiny_patch16_224", 5, {"depth": 2}, image_size=32)(torch.rand(1, 3, 32, 32), Signal.STAGES)


def test_methods_that_are_left_out_are_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\ndata: {dataset: digits, image_size: 32}\nteacher: {network: test_resnet}\n"
        "student: {network: vit_tiny_patch16_224, options: {depth: 2}}\nsearch: {space: {methods: all}}\n"
    )
    excluded = check_experiment(load_experiment(file))
    assert {"kd", "dist", "rkd", "scratch"}.isdisjoint(excluded)
    assert {"ofa", "review_kd"} <= set(excluded)
    assert "it reads the student's stages, which this network does not give" in excluded["ofa"]


def test_maps_join_or_divide_to_four_stages() -> None:
    assert stage_ends([32, 16, 16, 8, 4, 2]) == [2, 3, 4, 5]  # five resolutions and more: the last four
    assert stage_ends([8, 8, 4, 4, 4, 4, 2]) == [1, 3, 5, 6]  # three: the longest is divided
    assert stage_ends([8, 4, 4, 4, 4, 4, 4]) == [0, 2, 4, 6]
    assert stage_ends([8] * 12) == [1, 3, 9, 11]


def test_grey_images() -> None:
    torch.manual_seed(0)
    network = build_network("test_resnet", 5, {"in_chans": 1}, image_size=32).eval()
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        found = network(grey.expand(-1, 3, -1, -1)).logits
        assert torch.allclose(found, network.body((grey - 0.5) / 0.5), atol=1e-5)  # test_resnet's mean and deviation
        assert torch.allclose(deployable(network)(grey.expand(-1, 3, -1, -1)), found, atol=1e-6)
        colours = torch.tensor((1.0, 0.0, 0.0)).view(1, 3, 1, 1).expand(2, 3, 32, 32)
        assert torch.allclose(network.normalise(colours), torch.tensor((0.299 - 0.5) / 0.5), atol=1e-6)
