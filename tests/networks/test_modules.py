"""Users' modules and torchvision's networks as teacher and as student."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from heterokd.config.networks import NetworkSettings, StudentSettings
from heterokd.errors import NetworkError
from heterokd.networks.bodies import timm_name
from heterokd.networks.network import build_network, deployable, predict_spec
from heterokd.networks.weights import load_weights, save_weights
from heterokd.outputs import Signal

NETS = """
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        steps = [nn.Sequential(nn.Conv2d(3 if i == 0 else width * i, width * (i + 1), 3, 2, 1), nn.ReLU(inplace=True))
                 for i in range(4)]
        self.first, self.second, self.third, self.fourth = steps
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = self.fourth(self.third(self.second(self.first(x))))
        return self.out(self.pool(x).flatten(1))


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Answering(Small):
    def forward(self, x):
        return Answer(super().forward(x))


def make_student(num_classes, width=8):
    return Small(num_classes, width)


def broken(num_classes):
    raise RuntimeError("no such file\\nsecond line")


def wrong(num_classes):
    return Small(num_classes + 1)


def listing(num_classes):
    return [num_classes]
"""
ALL = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


@pytest.mark.parametrize("name", ["make_student", "Small", "Answering"])
def test_module_in_a_file(nets: Path, tmp_path: Path, name: str) -> None:
    settings = NetworkSettings(network=f"./nets.py:{name}", options={"width": 4})
    assert settings.network == name
    nets.unlink()  # the settings hold its text
    again = NetworkSettings.model_validate_json(settings.model_dump_json())
    assert again == settings
    network = build_network(settings.network, 5, settings.options, image_size=32).eval()
    spec = predict_spec(settings.network, 5, settings.options, 32)
    assert spec == network.spec
    assert spec.serves == ALL
    assert [(stage.channels, spec.side(i)) for i, stage in enumerate(spec.stages, 1)] == [
        (4, 16),
        (8, 8),
        (12, 4),
        (16, 2),
    ]
    with torch.no_grad():
        given = network(torch.rand(2, 3, 32, 32), ALL)
        assert torch.equal(given.tail(given.stages[1], 3), given.logits)
        assert torch.allclose(network.head(given.embedding), given.logits)
    module = deployable(network)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(module, (images,)).module()
        assert torch.allclose(exported(images), network(images).logits, atol=1e-6)
    save_weights(network, tmp_path / "w.safetensors")
    load_weights(build_network(settings.network, 5, settings.options, image_size=32), tmp_path / "w.safetensors")


def test_named_taps(nets: Path) -> None:
    taps = {"stages": ["first.0", "second", "third", "fourth"], "embedding": "third"}
    settings = NetworkSettings.model_validate({"network": "./nets.py:Small", "taps": taps})
    network = build_network(settings.network, 5, settings.options, image_size=32)
    given = network(torch.rand(2, 3, 32, 32), ALL)
    assert torch.allclose(given.embedding, given.stages[2].mean(dim=(2, 3)))
    assert given.stages[0].min() < 0  # before its ReLU, which works in place
    assert torch.allclose(given.tail(given.stages[0], 2), given.logits, atol=1e-6)
    for wrong, sentence in (
        ({"stages": ["first", "second", "third", "fifth"]}, "taps.stages: no module 'fifth' runs"),
        ({"stages": ["second", "first", "third", "fourth"]}, "do not run in this order"),
        ({"stages": ["first", "second", "third", "out"]}, "'out' gives no square map"),
        ({"stages": ["first"]}, "four names of modules"),
        ({"logits": "out"}, "four names of modules"),
    ):
        with pytest.raises(NetworkError, match=sentence):
            predict_spec(settings.network, 5, {**settings.options, "taps": wrong}, 32)


def test_list_of_networks(nets: Path) -> None:
    student = StudentSettings.model_validate({"network": ["test_resnet", "./nets.py:make_student"]})
    assert student.networks == ("test_resnet", "make_student")
    assert student.options_of("test_resnet") == {}
    options = {"make_student": {"width": 4}}
    again = StudentSettings.model_validate({"network": ["test_resnet", "make_student"], "options": student.options})
    assert again == student
    named = {"network": ["test_resnet", "./nets.py:make_student"], "options": {"./nets.py:make_student": {"width": 4}}}
    found = StudentSettings.model_validate(named).options_of("make_student")
    assert {key: found[key] for key in options["make_student"]} == options["make_student"]
    assert predict_spec("make_student", 5, found, 32).embedding_dim == 16


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("./nets.py", "the name of the function is missing"),
        ("./nets.py:make_studnt", "did you mean 'make_student'"),
        ("./other.py:make_student", r"there is no file \./other.py"),
    ],
)
def test_references_are_checked_before_work(nets: Path, reference: str, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        NetworkSettings(network=reference)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("broken", {}, r"cannot be built with .*: RuntimeError: no such file$"),
        ("wrong", {}, r"gives a tensor of shape \(2, 6\) for 2 images, logits \[2, 5\]"),
        ("listing", {}, "returned list, a torch.nn.Module is needed"),
        ("Small", {"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_modules_that_do_not_work(nets: Path, name: str, options: dict[str, object], sentence: str) -> None:
    settings = NetworkSettings(network=f"./nets.py:{name}", options=options)
    with pytest.raises(NetworkError, match=sentence) as caught:
        predict_spec(settings.network, 5, settings.options, 32)
    assert "def " not in str(caught.value)


def test_module_of_a_package() -> None:
    spec = predict_spec("torchvision.models:squeezenet1_1", 5, None, 64)
    assert Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES in spec.serves
    with pytest.raises(NetworkError, match="nowhere cannot be imported"):
        predict_spec("nowhere:make", 5)


def test_torchvision() -> None:
    network = build_network("torchvision:mobilenet_v3_small", 5, image_size=32).eval()
    assert network.spec.serves == ALL
    with torch.no_grad():
        given = network(torch.rand(2, 3, 32, 32), ALL)
        assert torch.allclose(given.tail(given.stages[2], 4), given.logits, atol=1e-5)
    with pytest.raises(NetworkError, match="did you mean 'resnet18'"):
        predict_spec("torchvision:resnet8", 5)


def test_hub_names_of_timm() -> None:
    assert timm_name("hf-hub:timm/resnet18.a1_in1k") == "resnet18.a1_in1k"
    assert predict_spec("hf-hub:timm/test_resnet.r160_in1k", 5) == predict_spec("test_resnet.r160_in1k", 5)
    with pytest.raises(NetworkError, match="hf-hub:timm/NAME"):
        predict_spec("hf-hub:somebody/something", 5)


def test_transformers_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/networks.md, where transformers is installed: the logits are the library's own."""
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# nets\.py\nfrom transformers.*?)```", page, re.DOTALL)
    (tmp_path / "nets.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTConfig(image_size=32, patch_size=8, **size).save_pretrained(tmp_path / "config")
    settings = NetworkSettings(network="./nets.py:make_teacher", options={"config": str(tmp_path / "config")})
    network = build_network(settings.network, 5, settings.options, image_size=32).eval()
    assert network.spec.embedding_dim == 32
    images = torch.rand(2, 3, 32, 32)
    found = network(images, Signal.LOGITS | Signal.EMBEDDING)
    expected = network.body(network.normalise(images)).logits  # type: ignore[union-attr]
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(network.head(found.embedding), found.logits)
