"""A folder of images that no experiment names: what is seen in it, what is proposed, and (slow) that it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from PIL import Image

from heterokd.config.networks import NetworkSettings
from heterokd.config.reading import load_experiment
from heterokd.datasets import load_dataset
from heterokd.datasets.io.inspect import inspect_folder, usable_folder
from heterokd.datasets.io.split import Splits
from heterokd.datasets.masks.inspect import inspect_masks
from heterokd.datasets.masks.pairs import has_label_maps
from heterokd.errors import ConfigError, DataError
from heterokd.execution import auto
from heterokd.execution.auto import AutoRequest, propose
from heterokd.execution.auto_rules import FAMILIES, SCENE_FAMILIES, ImageRules
from heterokd.execution.check import check_experiment
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits
from heterokd.training.student_costs import parameters_m


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_dataset("digits", image_size=32)


def write_digits(folder: Path, digits: Splits, per_class: int, *, splits: bool = False) -> None:
    """Handwriting as people keep it: grey, RGB and RGBA files of unequal sizes, a folder for each digit."""
    pixels, labels = digits.train.images.read(np.arange(len(digits.train))), digits.train.labels
    for label in range(10):
        for number, place in enumerate(np.flatnonzero(labels == label)[:per_class]):
            split = ("train", "train", "train", "val", "test")[number % 5] if splits else ""
            image = Image.fromarray(pixels[place])
            image = image.resize((32 + 5 * (number % 4), 32 + 3 * (number % 5)))
            if number % 3:
                image = image.convert("L" if number % 3 == 1 else "RGBA")
            file = folder / split / f"digit {label}" / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)


def spoil(folder: Path) -> None:
    """What happens to folders: a cut file, one that is no image, a copy, a copy under a second label, a note."""
    zero, one = folder / "digit 0", folder / "digit 1"
    (zero / "cut.png").write_bytes((zero / "000.png").read_bytes()[:60])
    (zero / "text.jpg").write_text("not an image")
    (one / "copy.png").write_bytes((one / "001.png").read_bytes())
    (folder / "digit 2" / "wrong.png").write_bytes((one / "002.png").read_bytes())
    (folder / "digit 2" / "notes.txt").write_text("scanned in May")


def test_a_folder_is_seen_as_it_is(tmp_path: Path, digits: Splits) -> None:
    folder = tmp_path / "scans"
    write_digits(folder, digits, 10)
    clean = inspect_folder(folder)
    assert not clean.left_out
    assert usable_folder(clean, tmp_path / "links") == folder
    spoil(folder)
    seen = inspect_folder(folder)
    assert seen.classes == tuple(f"digit {label}" for label in range(10))
    assert {str(path): reason for path, reason in seen.left_out.items()} == {
        "digit 0/cut.png": "damaged",
        "digit 0/text.jpg": "damaged",
        "digit 1/copy.png": "a copy of another",
        "digit 1/002.png": "the same image under two labels",
        "digit 2/wrong.png": "the same image under two labels",
    }
    assert seen.found.unread == {".txt: no image format that Pillow decodes": (1, "digit 2/notes.txt")}
    assert seen.side == 35
    said = "\n".join(seen.sentences())
    assert "99 images of 10 classes; no splits" in said
    assert "from 9 (digit 1) to 10" in said
    assert "40 RGB, 30 L, 29 RGBA" in said or "40 RGB, 30 RGBA, 29 L" in said
    assert "left out: 2 files, damaged (such as digit 0/cut.png)" in said
    links = usable_folder(seen, tmp_path / "links")
    assert sorted(path.relative_to(links) for path in links.rglob("*.png")) == sorted(file.path for file in seen.kept)
    assert len(load_dataset("image_folder", links, 32).train) + 39 == pytest.approx(99, abs=3)
    (links / "digit 3" / "000.png").readlink().unlink()  # a file goes: its link goes with it
    again = usable_folder(inspect_folder(folder), links)
    assert not (again / "digit 3" / "000.png").is_symlink()


def test_what_stands_in_two_splits_is_taken_out_of_train(tmp_path: Path, digits: Splits) -> None:
    folder = tmp_path / "scans"
    write_digits(folder, digits, 15, splits=True)
    leaked = next((folder / "test" / "digit 4").iterdir())
    (folder / "train" / "digit 4" / "leak.png").write_bytes(leaked.read_bytes())
    (folder / "val" / "digit 4" / "leak.png").write_bytes(leaked.read_bytes())
    seen = inspect_folder(folder)
    assert seen.splits == ("train", "val", "test")
    assert {str(path): why for path, why in seen.left_out.items()} == {
        "train/digit 4/leak.png": "in test as well",
        "val/digit 4/leak.png": "in test as well",
    }
    assert "90 train, 30 val, 30 test" in seen.sentences()[0]


def test_folders_that_cannot_be_used(tmp_path: Path, digits: Splits) -> None:
    with pytest.raises(DataError, match="no such folder"):
        inspect_folder(tmp_path / "none")
    write_digits(tmp_path / "few", digits, 4)
    with pytest.raises(DataError, match="class 'digit 0' has 4 usable training images, 5 are needed"):
        inspect_folder(tmp_path / "few")
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match="expected a folder for each of two or more classes"):
        inspect_folder(tmp_path / "empty")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, digits: Splits) -> Path:
    folder = tmp_path_factory.mktemp("images") / "my scans"
    write_digits(folder, digits, 20)
    spoil(folder)
    return folder


@pytest.mark.thorough
def test_the_proposal_is_an_experiment_that_loads(tmp_path: Path, scans: Path) -> None:
    root, seen = Workspace(tmp_path / "runs"), inspect_folder(scans)
    images = usable_folder(seen, tmp_path / "links")
    request = AutoRequest(images, ["vit_tiny_patch16_224"], limits={"params_m": 1.0}, hours=0.5)
    made = propose(seen, request, root, fit=False)
    assert made.file == root.path.resolve() / "auto" / "my-scans.yaml"
    assert made.experiment == load_experiment(made.file)
    experiment = made.experiment
    assert experiment.name == "my-scans"
    assert experiment.data.image_size == 32
    assert experiment.search.budget.hours == 0.5
    assert experiment.promotion.max_params_m == experiment.search.max_params_m == 1.0
    assert experiment.search.max_latency_ms is None
    assert experiment.student.networks == ("mobilenetv2_050", "test_vit"), "the largest of each family within 1 M"
    assert check_experiment(experiment) == {}
    assert open_splits(experiment.data).num_classes == 10
    text = made.file.read_text()
    assert all(f"# {sentence}\n" in text for sentence in [*seen.sentences(), *made.reasons])
    # The published weights where they can be had; elsewhere one sentence says what happens instead.
    said = next(sentence for sentence in made.reasons if sentence.startswith("vit_tiny_patch16_224: "))
    if experiment.teacher.pretrained:
        assert "fitted to your images" in said
    else:
        assert "trained from random weights" in said
        assert experiment.teacher.options == {"img_size": 32, "patch_size": 4}


def test_limits_and_names(tmp_path: Path, scans: Path) -> None:
    root, seen = Workspace(tmp_path / "runs"), inspect_folder(scans)

    def proposed(*students: str, teacher: str = "test_vit", **limits: float) -> tuple[str, ...]:
        made = propose(seen, AutoRequest(scans, [teacher], students, limits), root, fit=False)
        return made.experiment.student.networks

    assert proposed("test_resnet") == ("test_resnet",), "a named one needs no limit"
    assert proposed("test_resnet", params_m=0.4, latency_ms=1000.0, flops_g=1.0) == ("test_resnet",)
    for students, limits, says in (
        (
            ["test_resnet"],
            {"params_m": 0.2},
            "--student test_resnet: 0.374 M parameters, --max-params-m allows 0.2",
        ),
        (["test_resnet"], {"latency_ms": 1e-6}, "ms latency, --max-latency-ms allows 1e-06"),
        (["test_resnet"], {"flops_g": 1e-6}, "G FLOPs, limits['flops_g'] allows 1e-06"),
        ([], {"params_m": 0.001}, "--max-params-m 0.001: no proposed student is within the limits"),
        (["resnet81"], {}, "--student resnet81: timm has no such network; did you mean"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            proposed(*students, **limits)
    with pytest.raises(ConfigError, match="--teacher vit_huge_tiny: timm has no such network"):
        proposed("test_resnet", teacher="vit_huge_tiny")


def test_given_weights_are_the_teachers(tmp_path: Path, scans: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    request = AutoRequest(scans, ["test_vit"], ["test_resnet"], checkpoint=str(weights))
    made = propose(inspect_folder(scans), request, Workspace(tmp_path / "runs"), fit=False)
    assert made.experiment.teacher.checkpoint == weights
    assert not made.experiment.teacher.pretrained
    with pytest.raises(ConfigError, match="belongs to one network"):
        propose(
            inspect_folder(scans),
            AutoRequest(scans, ["test_vit", "test_resnet"], checkpoint=str(weights)),
            Workspace(tmp_path / "runs"),
        )


@pytest.mark.thorough
def test_students_are_listed_small_to_large() -> None:
    for names in FAMILIES.values():
        sizes = [parameters_m(NetworkSettings(network=name), 10, 64) for name in names]
        assert sizes == sorted(sizes)


@pytest.mark.ray
@pytest.mark.slow
def test_one_line_from_a_folder_to_a_registered_student(tmp_path: Path, digits: Splits, cli: Run) -> None:
    folder, root, file = tmp_path / "scans", tmp_path / "runs", tmp_path / "mine.yaml"
    write_digits(folder, digits, 20)
    spoil(folder)
    asked = ["auto", folder, "--teacher", "test_vit", "--student", "test_efficientnet"]
    # The budget is wall time and includes the teacher's fit, so other work on the machine counts.
    asked += ["--budget", f"{under_load(2.0):.1f}m", "--root", root, "--out", file]
    code, out, err = cli(*asked, "--dry-run")
    assert code == 0, err
    assert "left out: 2 files, damaged" in out
    assert "time       about" in out
    assert not (root / "studies" / "scans" / "experiment.yaml").exists()
    code, out, err = cli(*asked, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["standing"]["complete"] >= 1
    assert found["registered"]["name"] == "scans-student"
    assert load_experiment(file).name == "scans"
    page = (root / "studies" / "scans" / "report.html").read_text()
    assert "Planned and actual cost" in page
    code, _, err = cli(*asked)
    assert code == 2
    assert "exists already" in err


def write_masks(root: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels, mask = rng.integers(0, 256, (70, 100, 3), dtype=np.uint8), np.zeros((70, 100), np.uint8)
        mask[10:40, number : number + 40] = 255
        for kind, array in (("images", pixels), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{number}.png")


def test_a_folder_with_label_maps_is_segmentation(tmp_path: Path) -> None:
    images, root = tmp_path / "cells", Workspace(tmp_path / "runs")
    write_masks(images)
    assert has_label_maps(images)
    seen = inspect_masks(images)
    assert any("two classes, background (0) and object (255)" in sentence for sentence in seen.sentences())
    made = propose(seen, AutoRequest(images, ["segformer-mit_b0"], ["fpn-test_resnet"]), root, fit=False)
    data = made.experiment.data
    assert (data.task, data.dataset, data.image_size) == ("segmentation", "mask_folder", 96)
    assert open_splits(data).class_names == ("background", "object")
    assert "heteroakd" in made.experiment.methods
    assert made.experiment.student.networks == ("fpn-test_resnet",)
    with pytest.raises(ConfigError, match=r"--teacher resnet18: .*holds images with label maps; .*segformer-mit_b0"):
        propose(seen, AutoRequest(images, ["resnet18"]), root, fit=False)


@pytest.mark.thorough
def test_students_are_proposed_for_label_maps(tmp_path: Path) -> None:
    images = tmp_path / "cells"
    write_masks(images)
    request = AutoRequest(images, ["segformer-mit_b2"])
    made = propose(inspect_masks(images), request, Workspace(tmp_path / "runs"), fit=False)
    assert {network.partition("-")[0] for network in made.experiment.student.networks} == {"deeplabv3plus", "segformer"}
    check_experiment(made.experiment)


def test_a_small_teacher_gets_the_smallest_student(tmp_path: Path) -> None:
    images, root = tmp_path / "cells", Workspace(tmp_path / "runs")
    write_masks(images)
    seen, teacher = inspect_masks(images), "linknet-test_resnet"
    made = propose(seen, AutoRequest(images, [teacher]), root, fit=False)
    assert made.experiment.student.networks == ("linknet-mobilenetv3_small_050",)
    assert any("the smallest proposal; the teacher has 0.4" in reason for reason in made.reasons)
    with pytest.raises(ConfigError, match=r"--max-params-m 0\.1: no proposed student is within the limits"):
        propose(seen, AutoRequest(images, [teacher], limits={"params_m": 0.1}), root, fit=False)


def test_class_folders_are_no_label_maps(tmp_path: Path, digits: Splits) -> None:
    write_digits(tmp_path / "plain", digits, 5)
    write_digits(tmp_path / "splits", digits, 5, splits=True)
    for name in ("mask", "no mask"):  # of faces
        (tmp_path / "faces" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "faces" / name / "1.png")
    assert not any(has_label_maps(tmp_path / name) for name in ("plain", "splits", "faces"))


@pytest.mark.parametrize(
    ("network", "side", "families", "size"),
    [
        ("resnet18", 64, FAMILIES, 224),
        ("resnet18", 224, FAMILIES, None),
        ("fpn-resnet18", 64, SCENE_FAMILIES, None),
    ],
    ids=["small images", "large images", "scenes"],
)
def test_a_pretrained_teacher_sees_the_size_of_its_weights(
    network: str, side: int, families: dict[str, tuple[str, ...]], size: int | None
) -> None:
    rules = ImageRules(side, 15, 2000, {}, families, ("kd",), (8, 16, 16), {}, (0.01, 0.1))
    section, reason = auto._teacher(network, rules, None, missing=None)
    assert section["pretrained"]
    assert section.get("image_size") == size
    assert ("sees the views at 224 x 224 pixels" in reason) == (size is not None)


def test_init_writes_a_commented_experiment(tmp_path: Path, scans: Path, cli: Run) -> None:
    out = tmp_path / "scans.yaml"
    asked = ("init", scans, "--teacher", "resnet18", "--out", out, "--root", tmp_path / "runs")
    done = cli(*asked)
    assert done.code == 0
    text = out.read_text()
    assert "\n# network and weights;" in text
    assert load_experiment(out).teacher.network == "resnet18"
    assert not (tmp_path / "runs" / "teachers").exists(), "nothing is trained"
    again = cli(*asked)
    assert again.code == 2
    assert f"--out {out}: exists already" in again.err
    assert out.read_text() == text
