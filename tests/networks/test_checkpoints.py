"""Weights are read from any file without executing it, and every other file is refused by name."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heterokd.errors import CheckpointError
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import find_weights, load_start, load_weights, save_weights, weights_hash

DATA = Path(__file__).parents[2].parent / "shared" / "data"
State = Mapping[str, Tensor]


def vit(classes: int = 10, **options: object) -> AnyNetwork:
    return build_network("test_vit", classes, {"img_size": 32, "patch_size": 8, **options}, image_size=32)


@pytest.fixture(scope="module")
def source() -> AnyNetwork:
    torch.manual_seed(0)
    return vit()


@pytest.fixture(scope="module")
def state(source: AnyNetwork) -> State:
    return source.body.state_dict()


@pytest.fixture(scope="module")
def other() -> State:
    torch.manual_seed(1)
    return vit().body.state_dict()


def under(prefix: str, state: State) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


class Config(dict):
    """A user's class in a checkpoint."""


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


def timm_file(state: State, other: State) -> object:
    arguments = argparse.Namespace(lr=1.0, names=["a"])
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    return {
        "epoch": 3,
        "arch": "test_vit",
        "state_dict": other,
        "state_dict_ema": state,
        "args": arguments,
        "metric": np.float64(3.2),
        "optimizer": optimizer,
    }


def lightning_file(state: State, other: State) -> object:
    tensors = {**under("net.model.", state), "criterion.weight": torch.ones(3)}
    return {"state_dict": tensors, "hyper_parameters": argparse.Namespace(a=1), "optimizer_states": [{"state": {}}]}


def averaged(state: State, other: State) -> object:
    return {**under("module.", state), "n_averaged": torch.tensor(3)}


CONTENTS: dict[str, tuple[Callable[[State, State], object], str]] = {
    "plain": (lambda state, other: state, ""),
    "timm": (timm_file, "'state_dict_ema' of the file, of several"),
    "lightning": (lightning_file, "'net.model.' removed from the names; 1 other tensors ignored (criterion.weight)"),
    "data parallel": (lambda state, other: under("module.", state), "'module.' removed"),
    "compiled": (lambda state, other: under("_orig_mod.", state), ""),
    "combined": (
        lambda state, other: {"model": under("module._orig_mod.backbone.", state)},
        "'module.backbone.' removed",
    ),
    "nested": (
        lambda state, other: {"model": {"state_dict": under("encoder.", state)}},
        "'model.state_dict' of the file",
    ),
    "averaged": (averaged, "'module.' removed"),
    "ema inside": (lambda state, other: {"ema": {"module": state}, "model": other}, "'ema.module' of the file"),
    "dino": (lambda state, other: {"student": other, "teacher": under("backbone.", state)}, "'teacher' of the file"),
    "a user's class": (lambda state, other: {"model_state_dict": state, "config": Config(a=1)}, "not opened"),
    "parameters": (lambda state, other: OrderedDict((k, nn.Parameter(v)) for k, v in state.items()), ""),
    "half": (lambda state, other: {name: tensor.half().float() for name, tensor in state.items()}, ""),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_contents(name: str, zipped: bool, state: State, other: State, tmp_path: Path) -> None:
    make, note = CONTENTS[name]
    file = tmp_path / "weights.pth.tar"
    content = make(state, other)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    network = vit()
    found = find_weights(network, file)
    assert note in "; ".join(found.notes)
    assert found.classes == 10
    load_weights(network, file)
    expected = make(state, other) if name == "half" else state
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.body.state_dict().items())


def test_safetensors_under_another_name(source: AnyNetwork, tmp_path: Path) -> None:
    save_weights(source, tmp_path / "weights.bin")
    assert find_weights(vit(), tmp_path / "weights.bin").is_plain
    torch.save(source.body.state_dict(), tmp_path / "weights.safetensors")
    network = vit()
    load_weights(network, tmp_path / "weights.safetensors")
    assert weights_hash(network) == weights_hash(source)


def renamed(state: State) -> dict[str, Tensor]:
    return {f"_{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(state.items())}


def test_other_names_in_the_same_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build_network("test_resnet", 10), build_network("test_resnet", 10)
    torch.save(renamed(source.body.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert weights_hash(target) == weights_hash(source)
    (note,) = find_weights(target, tmp_path / "w.pth").notes
    assert "tensors of other names matched by order and shape (_0.weight -> conv1.0.weight" in note
    assert find_weights(build_network("test_resnet", 7), tmp_path / "w.pth").classes == 10

    save_file(renamed(source.body.state_dict()), tmp_path / "w.safetensors")  # sorted: the order is lost
    with pytest.raises(CheckpointError, match="are not of network 'test_resnet'"):
        load_weights(target, tmp_path / "w.safetensors")

    constant = renamed({name: torch.zeros_like(tensor) for name, tensor in source.body.state_dict().items()})
    torch.save(constant, tmp_path / "zero.pth")
    with pytest.raises(CheckpointError, match="the same embedding for all images"):
        load_weights(target, tmp_path / "zero.pth")
    assert weights_hash(target) == weights_hash(source)


def test_missing_and_additional_buffers(tmp_path: Path) -> None:
    network = build_network("test_resnet", 10)
    state = dict(network.body.state_dict())
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert counters
    fewer = {name: tensor for name, tensor in state.items() if name not in counters}
    torch.save({**fewer, "layer1.total_ops": torch.zeros(1)}, tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")
    without = {name: tensor for name, tensor in state.items() if not name.endswith("running_var")}
    torch.save(without, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"running_var' is missing from the file \(\d+ more\)"):
        load_weights(network, tmp_path / "w.pt")


def test_another_size_is_resized_by_timm(tmp_path: Path) -> None:
    torch.save(build_network("test_vit", 10, {"img_size": 64, "patch_size": 8}).body.state_dict(), tmp_path / "w.pt")
    assert find_weights(vit(), tmp_path / "w.pt").notes == ("by timm: pos_embed resized",)


def test_another_classifier_only_starts_a_training(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    network = vit(7)
    before = network.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"has 10 classes, .* 7 classes; fit a teacher .*teacher\.start_from"):
        load_weights(network, tmp_path / "w.pt")
    assert load_start(network, tmp_path / "w.pt").classes == 10
    assert torch.equal(network.body.state_dict()["cls_token"], state["cls_token"])
    assert torch.equal(network.head.weight, before)

    body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    torch.save({**body, "head.mlp.0.weight": torch.ones(3, 3)}, tmp_path / "body.pt")
    assert find_weights(network, tmp_path / "body.pt").classes == 0


CLASSES = {
    "list": {"class_names": ["a", "b", "c"]},
    "numbers": {"class_to_idx": {"b": 1, "a": 0, "c": 2}},
    "hugging face": {"config": {"id2label": {"0": "a", "1": "b", "2": "c"}}},
}


@pytest.mark.parametrize("name", CLASSES)
def test_names_of_classes_in_the_file(name: str, state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, **CLASSES[name]}, tmp_path / "w.pt")
    found = find_weights(vit(), tmp_path / "w.pt").class_names
    assert found is not None
    assert found[0] == ("a", "b", "c")


@pytest.mark.parametrize(
    ("file", "text"),
    [("w.json", '{"class_to_idx": {"b": 1, "a": 0}}'), ("classes.txt", "a\nb\n"), ("labels.json", "{")],
)
def test_names_of_classes_next_to_the_file(file: str, text: str, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    (tmp_path / file).write_text(text)
    found = find_weights(vit(), tmp_path / "w.pt").class_names
    assert found == (None if text == "{" else (("a", "b"), str(tmp_path / file)))


def write(content: bytes) -> Callable[[Path, State], None]:
    return lambda file, state: file.write_bytes(content) and None


def saved(make: Callable[[State], object], zipped: bool = True) -> Callable[[Path, State], None]:
    return lambda file, state: torch.save(make(state), file, _use_new_zipfile_serialization=zipped)


def cut(bytes_left_out: int, zipped: bool = True) -> Callable[[Path, State], None]:
    def make(file: Path, state: State) -> None:
        torch.save(dict(state), file, _use_new_zipfile_serialization=zipped)
        file.write_bytes(file.read_bytes()[:-bytes_left_out])

    return make


def changed_byte(file: Path, state: State) -> None:
    torch.save(dict(state), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def zipped_file(file: Path, state: State) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no weights")


def script(file: Path, state: State) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py"):
            archive.writestr(name, b"")


def exported(file: Path, state: State) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)


def with_nan(state: State) -> State:
    return {**state, "cls_token": torch.full_like(state["cls_token"], torch.nan)}


REFUSALS: dict[str, tuple[Callable[[Path, State], None], str]] = {
    "git-lfs": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer.*git lfs pull"),
    "html": (write(b"\n<!DOCTYPE html><html>"), r"a web page \(HTML\)"),
    "xml": (write(b"<?xml version='1.0'?><Error>"), "an XML message"),
    "json": (write(b'{"weight_map": {}}'), "a JSON file"),
    "empty": (write(b""), "damaged: the file is empty"),
    "text": (write(b"not weights at all"), "damaged or not a file of weights"),
    "gzip": (write(b"\x1f\x8b\x08\x00"), "compressed by gzip"),
    "tar": (write(b"\x00" * 257 + b"ustar" + b"\x00" * 250), "a tar archive"),
    "hdf5": (write(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "zip": (zipped_file, "a zip archive of other files"),
    "TorchScript": (script, "TorchScript archive"),
    "pt2": (exported, r"an exported graph \(torch.export.save, pt2\)"),
    "a network": (saved(lambda state: vit().body), r"a whole pickled network \(timm.models.vision_transformer.V"),
    "a network inside": (saved(lambda state: {"model": vit().body}), "a whole pickled network"),
    "a legacy network": (saved(lambda state: vit().body, zipped=False), "a whole pickled network"),
    "cut": (cut(300), "damaged, perhaps cut"),
    "cut legacy": (cut(3000, zipped=False), "damaged"),
    "changed": (changed_byte, "wrong checksum"),
    "pickle": (write(pickle.dumps({"a": 1})), "a plain pickle"),
    "a bomb": (write(pickle.dumps(Bomb())), r"would call \w+\.system"),
    "an old bomb": (write(pickle.dumps(Bomb(), protocol=0)), r"would call \w+\.system"),
    "a bomb inside": (saved(lambda state: {"state_dict": state, "x": Bomb()}), r"would call \w+\.system"),
    "a legacy bomb": (saved(lambda state: {"x": Bomb()}, zipped=False), r"would call \w+\.system"),
    "a tensor": (saved(lambda state: torch.ones(3)), r"no state dict \(found: Tensor\)"),
    "a list": (saved(lambda state: [1, 2]), r"no state dict \(found: list\)"),
    "nothing": (saved(lambda state: {"epoch": 1}), "no state dict"),
    "nan": (saved(with_nan), "64 of 64 values of 'cls_token' are NaN"),
    "quantised": (saved(lambda s: {**s, "norm.bias": torch.zeros(64, dtype=torch.int8)}), "'norm.bias' is quantised"),
    "deeper": (saved(lambda s: {**s, "blocks.9.x": torch.ones(1)}), "the file's 'blocks.9.x' is not a weight of it"),
    "named": (saved(lambda s: {"arch": "resnet50", "state_dict": {"fc.weight": torch.ones(2)}}), "names .* 'resnet50'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = REFUSALS[name]
    make(tmp_path / "weights.pt", state)
    with pytest.raises(CheckpointError, match=rf"^weights .*weights\.pt.*{sentence}") as caught:
        find_weights(vit(), tmp_path / "weights.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "exploded").exists()


def test_a_recipe_next_to_the_weights_is_quoted(tmp_path: Path) -> None:
    save_weights(vit(), tmp_path / "student.safetensors")
    (tmp_path / "recipe.yaml").write_text("student: {network: test_vit, options: {patch_size: 8}}")
    with pytest.raises(
        CheckpointError, match=r"recipe.yaml describes network 'test_vit' with options {'patch_size': 8}"
    ):
        find_weights(build_network("test_resnet", 10), tmp_path / "student.safetensors")


@pytest.mark.thorough
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_another_projects_names_of_a_real_network(tmp_path: Path) -> None:
    published, other = (build_network("tf_efficientnet_lite0", 1000, image_size=64) for _ in range(2))
    load_weights(published, DATA / "tf_efficientnet_lite0.safetensors")
    load_weights(other, DATA / "efficientnet_lite0.pth")
    first, second = published.body.state_dict(), other.body.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first if not key.endswith("num_batches_tracked"))
    found = find_weights(build_network("tf_efficientnet_lite0", 15, image_size=64), DATA / "efficientnet_lite0.pth")
    assert found.classes == 1000
    assert "247 tensors of other names matched" in found.notes[0]
    assert copy.copy(found) == found
