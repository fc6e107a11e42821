"""Pictures: colours that stay apart, arrays that end up where they belong, and a study that is drawn from its files."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
from PIL import Image

from heterokd.method import Panel
from heterokd.networks.network import build_network
from heterokd.networks.weights import save_weights
from heterokd.outputs import IGNORE
from heterokd.report.figures.class_labels import class_label, numbered_classes
from heterokd.report.figures.matrices import draw_confusion, draw_iou, shown_confusion
from heterokd.report.figures.palette import PALETTE, class_colours, paint, rgb
from heterokd.report.figures.samples import AGREEMENT, agreement, draw_method, draw_samples
from heterokd.report.figures.svg import Vector
from heterokd.report.measure import draw_pictures
from heterokd.report.measure_parts import measure_networks
from heterokd.report.measured import Measured
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits
from heterokd.training.teacher import open_teacher
from heterokd.training.train import build_distiller

# Linear RGB as an eye without red or without green cones sees it: Machado et al., IEEE TVCG 2009, severity 1.
EYES = (
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
)


def lab(colour: str, eye: np.ndarray) -> np.ndarray:
    share = np.array(rgb(colour)) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
    )
    x, y, z = to_xyz @ np.clip(eye @ linear, 0, 1) / np.array([0.95047, 1, 1.08883])
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("eye", EYES, ids=("normal", "protan", "deutan"))
def test_colours_stay_apart_for_every_eye(eye: np.ndarray) -> None:
    colours = [lab(colour, eye) for colour in PALETTE]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(colours, 2)) > 16
    cases = [lab(colour, eye) for colour in AGREEMENT.values()]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(cases, 2)) > 30
    assert min(np.linalg.norm(one - other) for one, other in itertools.product(cases, colours)) > 10, (
        "a class is no case"
    )


def test_the_most_frequent_class_comes_first_and_what_counts_nowhere_is_striped() -> None:
    classes = np.full((32, 32), IGNORE, np.uint8)
    classes[:4], classes[4:6] = 7, 2
    colours = class_colours((classes, classes), 30)
    assert list(colours.items()) == [(7, PALETTE[0]), (2, PALETTE[1])]
    image = paint(classes, colours)
    assert (image[0] == rgb(PALETTE[0])).all()
    assert (image[5] == rgb(PALETTE[1])).all()
    assert 0.1 < (image[6:] != 255).any(axis=2).mean() < 0.5
    assert set(class_colours((np.arange(30),), 30).values()) == {*PALETTE, "#FFFFFF"}


def test_each_pixel_says_who_is_right() -> None:
    labels, teacher, student = np.array([[1, 1, 1, 1]]), np.array([[1, 0, 1, 0]]), np.array([[1, 1, 0, 0]])
    assert [tuple(pixel) for pixel in agreement(labels, teacher, student)[0]] == [rgb(c) for c in AGREEMENT.values()]


def test_a_large_confusion_matrix_shows_the_classes_with_most_errors() -> None:
    confusion = np.diag(np.full(100, 50))
    confusion[30, 60], confusion[60, 99] = 25, 50
    names, shares, kept = shown_confusion(confusion, [f"class {number}" for number in range(100)])
    assert {30, 60, 99} <= set(kept.tolist())
    assert (len(kept), shares.shape, names[-1]) == (20, (20, 21), "others")
    row = kept.tolist().index(30)
    assert shares[row, kept.tolist().index(60)] == pytest.approx(1 / 3)
    assert np.allclose(shares.sum(axis=1), 1)
    assert shown_confusion(confusion[:3, :3], ["a", "b", "c"])[1].shape == (3, 3)


@pytest.mark.parametrize("classes", [3, 60])
def test_pictures_are_as_wide_as_a_column(tmp_path: Path, classes: int) -> None:
    generator = np.random.default_rng(0)
    names = [f"a rather long name of a class {number}" for number in range(classes)]
    images = generator.integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    maps = generator.integers(0, classes, (3, 2, 32, 48))
    maps[0, :, :4] = IGNORE
    draw_samples(tmp_path / "samples.png", images, *maps, names)
    iou = {name: generator.random(classes) for name in ("teacher", "kd", "scratch")}
    iou["kd"][1] = np.nan
    draw_iou(tmp_path / "iou.png", iou, names)
    values = torch.from_numpy(generator.random((2, 2, 8, 12)))
    values[:, 0, :2] = torch.nan
    ends = ((0.0, "low"), (0.5, "middle"), (1.0, "high"))
    draw_method(tmp_path / "method.png", images, [Panel("a map", some, "PuOr", ends) for some in values])
    confusion = generator.integers(0, 9, (classes, classes))
    draw_confusion(tmp_path / "confusion.png", confusion, names, confusion.T)
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as opened:
            assert opened.width == 1008, file
            assert len(np.unique(np.asarray(opened.convert("L")))) > 20, f"{file} is empty"


def test_class_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    """Formulas that are none, characters that no font here has, names that legends hide, and lines."""
    names = [r"$\frac$", "$5 and $6", "_private", "\U0001f9a9", "two\nlines", "søster", "\u0378"]
    labels = [class_label(name, number, 14) for number, name in enumerate(names)]
    assert labels == [r"\$\frac\$", r"\$5 and \$6", " _private", "class 3", "two lines", "søster", "class 6"]
    assert class_label("猫", 4, 14) in ("猫", "class 4"), "as the fonts of this machine allow"
    maps = np.arange(len(names)).repeat(9).reshape(1, 7, 9)
    draw_confusion(tmp_path / "confusion.png", np.ones((7, 7), np.int64), names)
    draw_iou(tmp_path / "iou.png", {name: np.ones(7) for name in ("teacher", "kd")}, names)
    draw_samples(tmp_path / "samples.png", np.zeros((1, 7, 9, 3), np.uint8), maps, maps, maps, names)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_page_keeps_class_names_in_any_script() -> None:
    names = ["猫", "قطة", "\U0001f9a9", "$5", "_private", "dog"]
    made = Vector("confusion", "Confusion")
    draw_confusion(made, np.eye(6, dtype=np.int64), names)
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", made.render("of six classes"))]
    for name in names:
        assert texts.count(name) == 2, f"{name}: a row and a column"
    assert "class" not in " ".join(texts).replace("classes", "")
    # A PNG has no browser: numbers, and their legend in the caption. Letters that are joined are not drawn one by one.
    assert class_label("قطة", 1, 14) == "class 1"
    assert "class 1: قطة" in numbered_classes(names)
    assert numbered_classes(["dog", "class 1"]) == ""


@pytest.mark.thorough
def test_a_segmentation_study_is_drawn_from_its_files(tmp_path: Path) -> None:
    question, root = fabricated.scenes(), Workspace(tmp_path)
    splits, folder = open_splits(question.data), fabricated.study(root, question)
    student = fabricated.scene_student(splits, 0)
    for number, method in enumerate(("scratch", "heteroakd")):
        made = fabricated.trial(folder, question, number, method, student=student)
    teacher = question.teacher.settings_of()
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(teacher.network, splits.num_classes, teacher.options, image_size=72), weights)
    distiller = build_distiller(made.recipe, open_teacher(teacher, splits.num_classes, 72, weights), splits.num_classes)
    torch.save({"distiller": distiller.state_dict(), "epoch": 2}, made.checkpoint)
    fabricated.summary(fabricated.ranked(1, "heteroakd"), fabricated.ranked(0, "scratch")).write(folder)

    files = draw_pictures(folder, question, root, {teacher.network: weights})
    assert sorted(file.stem for file in files) == ["cka", "heteroakd", "iou", "samples"]
    assert all(file.stat().st_size > 10_000 for file in files)
    found = Measured.read(folder)
    assert found is not None
    assert not found.missing
    assert list(found.iou) == ["teacher", "heteroakd", "scratch"]
    assert np.isfinite(found.similarity).all()
    assert len(found.similarity) == 4
    captions = json.loads((folder.pictures / "captions.json").read_text())
    assert "after 2 of 3 epochs of trial 1" in captions["heteroakd"]


def test_a_classification_study_is_drawn_from_its_files(tmp_path: Path) -> None:
    question, root = fabricated.experiment(), Workspace(tmp_path)
    folder = fabricated.study(root, question)
    fabricated.summary().write(folder)
    assert draw_pictures(folder, question, root, {}) == []
    fabricated.trial(folder, question, 0, "kd", student=fabricated.random_student())
    fabricated.summary(fabricated.ranked(0)).write(folder)
    assert [file.name for file in draw_pictures(folder, question, root, {})] == ["confusion.png"]
    found = Measured.read(folder)
    assert found is not None
    assert found.confusion is not None
    assert found.confusion.sum() == found.images == len(open_splits(question.data).val)
    wrong = int(found.confusion.sum() - found.confusion.trace())
    assert len(found.failures) == min(wrong, 12) > 0
    confidences = [failure.confidence for failure in found.failures]
    assert confidences == sorted(confidences, reverse=True)
    labels = open_splits(question.data).val.labels
    for failure in found.failures:
        assert failure.label == labels[failure.index] != failure.predicted
        assert failure.confidence > failure.label_probability
        assert (folder.pictures / failure.file).stat().st_size > 50
    assert found.cost("student", "params_m") == pytest.approx(0.37, abs=0.01)
    assert found.cost("teacher", "latency_ms") > 0
    assert "int8_ms" not in found.networks["student"].costs, "it takes seconds, and nobody asked for it"
    assert "the teacher's weights are missing" in found.missing["cka"]


def test_costs_on_the_page_are_those_of_the_search(tmp_path: Path) -> None:
    search = {
        "space": {"methods": ["scratch", "kd"]},
        "limits": {"student/int8_ms": 1e3},
        "costs": {"student/latency_ms": {"test_resnet": 3.5}},
    }
    question = fabricated.experiment(search=search)
    recipe = question.recipe({"method": "kd"})
    found = measure_networks(recipe, question.search, 10, Workspace(tmp_path))
    assert found["student"].costs["latency_ms"] == 3.5
    assert found["teacher"].costs["latency_ms"] is None, "the table does not have it"
    assert all(network.costs["int8_ms"] > 0 for network in found.values())
