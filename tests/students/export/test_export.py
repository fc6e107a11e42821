"""What is exported does what was trained: opened from its file, on real images, in every family of students."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import onnxruntime
import pytest
import torch
from command_line import Run
from torch import Tensor, nn

from heterokd.api import load_student
from heterokd.config.experiment import Experiment
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError, ConfigError, ExportError, NetworkError, StudyError, TrackingError
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.weights import weights_hash
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.export.export import export_student, try_export
from heterokd.students.export.find import Student, find_student
from heterokd.students.export.format import ToWrite
from heterokd.students.export.formats import FORMATS
from heterokd.students.export.formats.pt2 import PT2
from heterokd.students.export.formats.safetensors import open_exported
from heterokd.students.registry import log_student, register
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import open_store
from heterokd.training.data import open_splits

SWIN = {"depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8]}
# Every family of the recipes, small: name, options, pixels.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("resnet18", {"channels": [8, 16, 32, 64]}, 32),
    "resnet20": ("resnet20", {"blocks": 1}, 32),
    "mobilenetv1": ("mobilenetv1_100", {}, 32),
    "mobilenetv2": ("mobilenetv2_035", {}, 32),
    "efficientnet": ("test_efficientnet", {}, 32),
    "shufflenetv2": ("shufflenet_v2", {"stages_repeats": [1, 1, 1], "stages_out_channels": [8, 16, 32, 64, 64]}, 32),
    "vgg8": ("vgg8", {"widths": [8, 16, 32, 32, 32]}, 32),
    "vgg": ("vgg11_bn", {"mlp_ratio": 0.02}, 32),
    "convnext": ("test_convnext", {}, 64),
    "vit": ("test_vit", {"img_size": 32, "patch_size": 8}, 32),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 64}, 64),
    "swin_pico": ("swin_pico", SWIN, 56),
    "pvt": ("pvt_v2_b0", {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2]}, 64),
    "mixer": ("mixer_s32_224", {"num_blocks": 4, "embed_dim": 32, "img_size": 64}, 64),
    "resmlp": ("resmlp_12_224", {"num_blocks": 4, "embed_dim": 32, "img_size": 64}, 64),
}
ARCHITECTURES = ("deeplabv3", "deeplabv3plus", "segformer", "upernet", "fpn")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fabricated.root_with_store(tmp_path)


def studied(root: Workspace, question: Experiment, network: AnyNetwork) -> StudyFolder:
    folder = fabricated.study(root, question)
    fabricated.trial(folder, question, 1, student=network)
    fabricated.summary(fabricated.ranked(1)).write(folder)
    return folder


def trained(name: str, options: dict[str, Any], size: int, classes: int = 10) -> AnyNetwork:
    """A network whose batch norms have seen something, as a trained one's have."""
    torch.manual_seed(0)
    network = build_network(name, classes, options, image_size=size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def val_images(splits: Splits, count: int) -> Tensor:
    return torch.from_numpy(splits.val.images.read(np.arange(count))).permute(0, 3, 1, 2).float() / 255


def test_a_student_in_8_bits_is_small_and_measured(root: Workspace, tmp_path: Path, cli: Run) -> None:
    splits = open_splits(fabricated.experiment().data)
    studied(root, fabricated.experiment(), fabricated.fitted_student(splits, 100))
    done = cli("export", "studies/tiny", "--int8", "--out", tmp_path / "out", "--root", root)
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "out" / "student_int8.onnx", providers=["CPUExecutionProvider"])
    images, labels = val_images(splits, len(splits.val)), splits.val.labels
    correct = float((session.run(None, {"images": images.numpy()})[0].argmax(1) == labels).mean())
    with find_student(root, "studies/tiny") as student:
        exported = export_student(student, "onnx", tmp_path / "out")
        with torch.inference_mode():
            before = float((student.network(images).logits.argmax(1).numpy() == labels).mean())
    entry = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]["onnx_int8"]
    assert entry["accuracy"] == {"metric": "val/top1", "student": pytest.approx(before), "file": pytest.approx(correct)}
    assert f"accuracy val/top1 {correct:.4f}, of the student {before:.4f} ({correct - before:+.4f})" in done.out
    assert (tmp_path / "out" / "student_int8.onnx").stat().st_size < 0.5e6 * exported.size_mb
    refused = cli("export", "studies/tiny", "--int8", "--format", "pt2", "--out", tmp_path / "out", "--root", root)
    assert (refused.code, refused.err) == (
        2,
        "error: --int8: only ONNX is quantized, not --format pt2; use --format onnx\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mobilenetv2", "convnext", "vit", "swin_pico", "resmlp"])
def test_families_in_8_bits(family: str) -> None:
    name, options, size = FAMILIES[family]
    splits = open_splits(fabricated.experiment().data.model_copy(update={"image_size": size}))
    parity = try_export(trained(name, options, size, splits.num_classes), splits, (size, size), "onnx_int8")
    assert parity.difference < math.inf


def test_the_formats_of_a_studys_winner(root: Workspace, tmp_path: Path) -> None:
    splits, out = open_splits(fabricated.experiment().data), tmp_path / "deploy"
    network = fabricated.fitted_student(splits, 100)
    studied(root, fabricated.experiment(), network)
    images = val_images(splits, 7)
    with torch.inference_mode():
        wanted = network(images).logits
    with find_student(root, "studies/tiny") as student:
        assert student.weights == weights_hash(network)
        found = {name: export_student(student, name, out) for name in FORMATS}

    session = onnxruntime.InferenceSession(out / "student.onnx", providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [["batch", 3, 32, 32]]
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(splits.class_names)
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, atol=1e-4)
    graph = torch.export.load(out / "student.pt2").module()
    torch.testing.assert_close(graph(images), wanted, atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(open_exported(out)(images).logits, wanted, atol=0, rtol=0)
        torch.testing.assert_close(load_student(out)(images), wanted, atol=1e-5, rtol=0)

    record = json.loads((out / "export.json").read_text())
    assert set(record["formats"]) == set(FORMATS)
    assert record["student"]["weights"] == weights_hash(network)
    assert record["student"]["class_names"] == list(splits.class_names)
    assert record["student"]["data"] == splits.fingerprint
    for name, exported in found.items():
        entry = record["formats"][name]
        if FORMATS[name].is_exact:
            assert entry["parity"]["difference"] <= entry["parity"]["tolerance"]
            assert "accuracy" not in entry
        assert set(entry["parity"]["by_batch"]) == {"batch_1", "batch_5"}
        assert 0 < entry["latency"]["median_ms"] <= entry["latency"]["p95_ms"]
        assert entry["input"]["normalisation_inside"] == (name != "safetensors")
        sizes = {file: (out / file).stat().st_size for file in exported.files}
        assert {file: found["bytes"] for file, found in entry["files"].items()} == sizes
        assert exported.size_mb == pytest.approx(sum(sizes.values()) / 1e6)
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} <= {".export.lock"}

    other = fabricated.random_student(seed=3)
    student = Student("other", other, student.recipe, splits, weights_hash(other))
    with pytest.raises(ConfigError, match="holds the export of another student; give another folder"):
        export_student(student, "safetensors", out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "export.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"student": {"name": "another"}, "formats": {}}', b"\xff"])
def test_a_file_of_another_origin_is_kept(name: str, content: bytes, root: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "deploy"
    student = a_student()
    out.mkdir()
    (out / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} was not written by an export.*--overwrite to replace it"):
        export_student(student, "safetensors", out)
    assert (out / name).read_bytes() == content
    assert {path.name for path in out.iterdir()} <= {name, ".export.lock"}


def a_student() -> Student:
    network, recipe = fabricated.random_student(), fabricated.experiment().recipe({"method": "kd"})
    return Student("a student", network, recipe, open_splits(recipe.data), weights_hash(network))


def test_files_of_an_export_are_replaced_until_they_are_changed(tmp_path: Path) -> None:
    out, student = tmp_path / "deploy", a_student()
    export_student(student, "safetensors", out)
    (out / ".heterokd-writing-killed").mkdir()
    export_student(student, "safetensors", out)
    assert not (out / ".heterokd-writing-killed").exists()
    with (out / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"config\.json was not written by an export, or was changed since"):
        export_student(student, "safetensors", out)
    assert export_student(student, "safetensors", out, overwrite=True).parity.agrees
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json was not written"):
        export_student(student, "safetensors", out)
    with pytest.raises(ConfigError, match="cannot be written"):
        export_student(student, "safetensors", out, overwrite=True)


@pytest.mark.thorough
def test_timm_alone_opens_the_safetensors(root: Workspace, tmp_path: Path) -> None:
    """In a process that has never heard of heterokd."""
    network, out = trained(*FAMILIES["vit"]), tmp_path / "deploy"
    question = fabricated.experiment(student={"network": "test_vit", "options": FAMILIES["vit"][1]})
    studied(root, question, network)
    with find_student(root, "tiny") as student:
        written = export_student(student, "safetensors", out)
    assert written.opened_with == 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    images = val_images(student.splits, 2)
    np.save(tmp_path / "images.npy", network.normalise(images).numpy())
    code = (
        "import numpy, sys, timm, torch\n"
        f"network = timm.create_model('local-dir:{out}', pretrained=True).eval()\n"
        f"logits = network(torch.from_numpy(numpy.load('{tmp_path / 'images.npy'}')))\n"
        f"numpy.save('{tmp_path / 'logits.npy'}', logits.detach().numpy())\n"
        "assert 'heterokd' not in sys.modules\n"
        "print(network.pretrained_cfg['label_names'][3])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
    with torch.inference_mode():
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), network(images).logits, atol=1e-5)


@pytest.mark.thorough
def test_a_registered_student_is_found_by_its_alias(root: Workspace, tmp_path: Path) -> None:
    question = fabricated.experiment()
    splits, network = open_splits(question.data), fabricated.random_student()
    folder = studied(root, question, network)
    runs = StudyRuns(question, folder, open_store(root, None), root.artifacts)
    trial = folder.trial(1)
    model_uri = log_student(runs, trial, splits)
    register(runs, trial, model_uri, splits, "champion")
    (trial.path / "student.safetensors").unlink()  # the registry needs no folder
    for source in ("models:/digits-student@champion", "models:/digits-student/1", model_uri):
        with find_student(root, source) as student:
            assert student.weights == weights_hash(network)
            assert student.version == (None if source == model_uri else "digits-student/1")
    for source, error, sentence in (
        ("models:/digits-student@champ", TrackingError, r"no version has this alias; known: champion"),
        ("models:/digits-student/7", TrackingError, "the registry has no such version"),
        ("models:/digit-student@champion", TrackingError, "did you mean 'digits-student'"),
        ("models:/digits-student", TrackingError, "for a registered model, give models:/digits-student@champion"),
        ("models:/a/b/c", TrackingError, "is not a model URI"),
        ("studies/tny", StudyError, "did you mean 'tiny'"),
        ("some/folder", StudyError, "is neither the folder of a study nor of a trial"),
        (str(trial.path), CheckpointError, "does not exist, since this trial"),
    ):
        with pytest.raises(error, match=sentence) as caught, find_student(root, source):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_a_file_that_disagrees_is_not_kept(root: Workspace, tmp_path: Path) -> None:
    question, out = fabricated.experiment(), tmp_path / "deploy"
    studied(root, question, fabricated.random_student())

    class OfAnother(PT2):
        def write(self, student: ToWrite, folder: Path) -> None:
            super().write(replace(student, network=fabricated.random_student(seed=1)), folder)

    formats = {"pt2": OfAnother}
    with find_student(root, "tiny") as student:
        with pytest.raises(ExportError, match="its logits differ from the student's by") as caught:
            export_student(student, "pt2", out, formats)
        assert "\n" not in str(caught.value)
        assert not (out / "student.pt2").exists()
        assert not (out / "export.json").exists()
        assert not try_export(student.network, student.splits, (32, 32), "pt2", formats).agrees


def test_a_network_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    splits = open_splits(fabricated.experiment().data)

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x  # depends on the image: no graph can say so

    network = fabricated.random_student()
    network.body.maxpool = Branches()
    with pytest.raises(NetworkError, match=r"cannot be written as student\.pt2") as caught:
        try_export(network, splits, (32, 32), "pt2")
    assert "\n" not in str(caught.value)


TORCHSCRIPT = '''
"""student.ts, by torch.jit.trace."""
import torch

from heterokd.students.export.format import ExportFormat, Opened
from heterokd.networks.network import deployable


class TorchScript(ExportFormat):
    """TorchScript: one graph for C++ programs that link libtorch."""

    files = ("student.ts",)
    libraries = ("torch",)

    def write(self, student, folder):
        torch.jit.trace(deployable(student.network), student.example).save(folder / self.files[0])

    def open(self, folder):
        return Opened(torch.jit.load(folder / self.files[0]), 'torch.jit.load("student.ts")(images)')
'''


@pytest.mark.thorough
def test_a_format_of_an_installed_package_is_used_by_name(root: Workspace, tmp_path: Path) -> None:
    """One file and one entry point: neither the command line nor anything else of heterokd is touched."""
    packages, out = tmp_path / "packages", tmp_path / "deploy"
    info = packages / "heterokd_torchscript-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heterokd-torchscript\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[heterokd.exports]\ntorchscript = torchscript_format:TorchScript\n")
    (packages / "torchscript_format.py").write_text(TORCHSCRIPT)
    studied(root, fabricated.experiment(), fabricated.random_student())
    command = ["export", "studies/tiny", "--format", "torchscript", "--out", str(out), "--root", str(root.path)]
    paths = os.pathsep.join([str(packages), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "heterokd", *command],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'torch.jit.load("student.ts")(images)' in done.stdout
    entry = json.loads((out / "export.json").read_text())["formats"]["torchscript"]
    assert list(entry["files"]) == ["student.ts"]
    assert entry["parity"]["difference"] <= entry["parity"]["tolerance"]


def check_family(name: str, options: dict[str, Any], size: int, splits: Splits, view: tuple[int, int]) -> None:
    network = trained(name, options, size, splits.num_classes)
    for format_name in [name for name, kind in FORMATS.items() if kind.is_exact]:
        parity = try_export(network, splits, view, format_name)
        assert parity.agrees, (format_name, parity)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported(family: str) -> None:
    name, options, size = FAMILIES[family]
    splits = open_splits(fabricated.experiment().data.model_copy(update={"image_size": size}))
    check_family(name, options, size, splits, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    # Decoders that read one map of the encoder, several, and the tokens of attention.
    "name",
    [*(f"{architecture}-test_resnet" for architecture in ARCHITECTURES), "segformer-mit_b0", "deeplabv3-mit_b0"],
)
def test_every_segmentation_architecture_is_exported(name: str) -> None:
    data = fabricated.scenes().data
    check_family(name, {}, 72, open_splits(data), data.view_size)
