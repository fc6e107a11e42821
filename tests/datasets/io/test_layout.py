"""Folders and tables as people keep them: every image is read, or named with the reason."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from heterokd.config.data import DataSettings
from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.class_order import natural_order
from heterokd.datasets.io.grouping import grouped_split
from heterokd.datasets.io.image_files import FileImages
from heterokd.datasets.io.images import ChosenImages
from heterokd.datasets.io.inspect import inspect_folder, usable_folder
from heterokd.datasets.io.layout import FoundImages, find_images
from heterokd.datasets.io.loaders import make_loaders
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.io.walk import SYSTEM_NAMES
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import DataError


def write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number * 7 % 256, number % 256, 50)).save(path, format="PNG")


def found(root: Path, **options: object) -> FoundImages:
    return find_images(root, DataOptions(**options))  # type: ignore[arg-type]


def load(root: Path, seed: int = 0, **options: object) -> Splits:
    return ImageFolder().load_with(root, 8, seed, DataOptions(**options))  # type: ignore[arg-type]


def names(split: Split) -> set[str]:
    assert isinstance(split.images, FileImages)
    return {split.images.files.name(place) for place in range(len(split))}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "Test"),
        ("train2017", "val2017", "test2017"),
        ("seg_train", "eval", "test_images"),
    ],
)
def test_common_names_of_splits(tmp_path: Path, train: str, val: str, test: str) -> None:
    write(tmp_path, *(f"{split}/{label}/{i}.png" for split in (train, val, test) for label in "ab" for i in range(3)))
    splits = load(tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [6, 6, 6]
    assert {name.partition("/")[0] for name in names(splits.val)} == {val}
    assert splits.notes[0] == "train, val, test are as given"


def test_splits_inside_of_classes_and_a_folder_around_everything(tmp_path: Path) -> None:
    write(
        tmp_path, *(f"pets/{label}/{split}/{i}.png" for split in ("train", "val") for label in "ab" for i in range(5))
    )
    seen = found(tmp_path)
    assert seen.classes == ("a", "b")
    assert {(image.name.split("/")[2], image.split) for image in seen.images} == {("train", "train"), ("val", "val")}
    assert seen.notes == (f"images are read from {tmp_path}/pets, the only folder of {tmp_path}",)


def test_folders_between_those_of_the_splits_and_those_of_the_classes(tmp_path: Path) -> None:
    write(tmp_path, *(f"seg_{s}/seg_{s}/{label}/{i}.png" for s in ("train", "test") for label in "ab" for i in "123"))
    write(tmp_path, "seg_train/loose/a.png")
    with pytest.raises(DataError, match="class 'seg_test' is not in train"):  # seg_train/seg_train is not the only one
        load(tmp_path)
    (tmp_path / "seg_train" / "loose" / "a.png").unlink()
    (tmp_path / "seg_train" / "loose").rmdir()
    splits = load(tmp_path)
    assert splits.class_names == ("a", "b")
    assert len(splits.test) == 6
    assert found(tmp_path).unread == {}


def test_folders_of_classes_that_may_be_parts_of_the_set_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"fold{fold}/{label}/{i}.png" for fold in "012" for label in ("cat", "dog") for i in range(4)))
    seen = found(tmp_path)
    assert seen.classes == ("fold0", "fold1", "fold2")
    assert seen.notes == (
        "looks wrong: fold0 and fold1 are taken as classes, but each has the same folders, such as cat and dog; if "
        "those are the classes, name the outer folders train, val and test, or list the images in data.table",
    )
    write(tmp_path, "fold1/mixed/0.png")
    assert found(tmp_path).notes == ()


def test_images_without_a_suffix_are_read(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{i:04x}" for label in "ab" for i in range(3)))
    for name, content in {"README": b"BM is no picture", "LICENSE": b"GIF89a", "raw": bytes(99)}.items():
        (tmp_path / "a" / name).write_bytes(content)
    seen = found(tmp_path)
    assert len(seen.images) == 6
    assert seen.unread == {"without a suffix": (3, "a/LICENSE")}


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{i}.png" for label in ("bus", "car", "train") for i in range(5)))
    assert found(tmp_path).classes == ("bus", "car", "train")


def test_sub_folders_of_a_class_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        *(f"{label}/{year}/{month}/{i}.png" for label in "ab" for year in "12" for month in "12" for i in "12"),
    )
    seen = found(tmp_path)
    assert len(seen.images) == 16
    assert seen.classes == ("a", "b")


def test_what_is_not_read_is_counted_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{label}/{i}.png" for label in "ab" for i in range(3)))
    write(tmp_path, "train/loose.png", "unsorted/x.png", "unsorted/y/z.png", "loose.png")
    for name in ("train/a/notes.txt", "train/b/scan.heic", "train/b/README", "train/a/deep/labels.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "train" / "gone.png", tmp_path / "train" / "a" / "link.png")
    os.symlink(tmp_path / "train", tmp_path / "train" / "a" / "around")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    for name in (*SYSTEM_NAMES, ".DS_Store", "._0.png", ".git"):
        (tmp_path / "train" / "a" / name).mkdir()
        (tmp_path / "train" / "a" / name / "hidden.png").write_bytes(b"x")
    seen = found(tmp_path)
    assert len(seen.images) == 6
    assert seen.unread == {
        "not in train, the folders of the splits": (3, "loose.png"),
        ".txt: no image format that Pillow decodes": (2, "train/a/deep/labels.TXT"),
        "links to a folder that they are in": (1, "train/a/around"),
        "links to nothing": (1, "train/a/link.png"),
        "no regular files": (1, "train/a/pipe.png"),
        "without a suffix": (1, "train/b/README"),
        ".heic: no image format that Pillow decodes": (1, "train/b/scan.heic"),
        "in no class folder": (1, "train/loose.png"),
    }
    assert "not read: 3 files, not in train, the folders of the splits (such as loose.png)" in seen.unread_sentences


def test_linked_folders_are_read(tmp_path: Path) -> None:
    write(tmp_path / "store", *(f"{label}/{i}.png" for label in "ab" for i in range(3)))
    (tmp_path / "root").mkdir()
    for label in "ab":
        os.symlink(tmp_path / "store" / label, tmp_path / "root" / label)
    assert len(found(tmp_path / "root").images) == 6


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *(f"{label}/{i}.png" for label in "ab" for i in range(3)))

    def denied(path: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read \\(Permission denied\\); give access"):
        found(tmp_path)


def test_layouts_that_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "twice", *(f"{split}/{label}/0.png" for split in ("train", "val", "valid") for label in "ab"))
    with pytest.raises(DataError, match="twice: has 'val' and 'valid' for val; keep one of them"):
        found(tmp_path / "twice")
    write(tmp_path / "flat", *(f"{i}.png" for i in range(4)))
    with pytest.raises(DataError, match="two or more classes, found 0; 4 images are in no folder of a class"):
        found(tmp_path / "flat")
    write(tmp_path / "tested", *(f"{label}/test/0.png" for label in "ab"))
    with pytest.raises(DataError, match="tested: has test but no train"):
        found(tmp_path / "tested")
    write(tmp_path / "hollow", "a/0.png", "b/0.png")
    (tmp_path / "hollow" / "c" / "d").mkdir(parents=True)
    with pytest.raises(DataError, match="hollow/c: holds no images that Pillow decodes"):
        found(tmp_path / "hollow")


def test_classes_that_val_lacks_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{label}/{i}.png" for label in "abc" for i in range(5)), "val/a/0.png", "test/b/0.png")
    assert found(tmp_path).notes == ("val has no images of b, c", "test has no images of a, c")
    splits = load(tmp_path)
    assert splits.val.labels.tolist() == [0]
    assert splits.test.labels.tolist() == [1]


def test_decomposed_names_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "Bäcker"), unicodedata.normalize("NFD", "Bäcker")
    write(
        tmp_path, *(f"train/{label}/{i}.png" for label in (composed, "b") for i in range(3)), f"val/{decomposed}/0.png"
    )
    assert load(tmp_path).class_names == (composed, "b")


def test_the_order_of_classes(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{i}.png" for label in range(1, 13) for i in range(5)))
    plain = load(tmp_path)
    assert plain.class_names[:4] == ("1", "10", "11", "12")
    assert any("data.class_order: natural" in note and "10 before 2" in note for note in plain.notes)
    natural = load(tmp_path, class_order="natural")
    assert natural.class_names == tuple(map(str, range(1, 13)))
    assert natural.fingerprint != plain.fingerprint
    assert not any("natural" in note for note in natural.notes)
    backwards = tuple(map(str, range(12, 0, -1)))
    assert load(tmp_path, class_order=backwards).class_names == backwards
    (tmp_path / "classes.txt").write_text("".join(f"{number} {label}\n" for number, label in enumerate(backwards)))
    assert load(tmp_path).class_names == backwards
    assert load(tmp_path, class_order="sorted").class_names == plain.class_names
    (tmp_path / "classes.txt").write_text("\n".join(backwards[1:]))
    with pytest.raises(DataError, match=r"classes\.txt: lacks class '12', which has images; add it"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"data\.class_order: names class '13', which has no images"):
        load(tmp_path, class_order=(*backwards, "13"))
    with pytest.raises(DataError, match=r"data\.class_order: names class '12' twice"):
        load(tmp_path, class_order=(*backwards, "12"))


def test_natural_order_is_that_of_timm() -> None:
    from timm.utils.misc import natural_key

    labels = ["10a", "9b", "Ab2", "ab10", "x", "7", "07b", "é3", "007"]
    assert natural_order(labels) == sorted(sorted(labels), key=natural_key)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "tsv"])
def test_a_table_of_images(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, *(f"images/{i}.png" for i in range(30)))
    table = pa.table(
        {
            "File_Name": [f"images/{i}.png" for i in range(30)],
            "label": ["cat" if i % 2 else "dog" for i in range(30)],
            "Split": [("train", "Valid", "testing")[i % 3] for i in range(30)],
            "weight": [1.0] * 30,
            "camera": ["left"] * 30,
        }
    )
    file = tmp_path / f"images.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        delimiter = "\t" if suffix == "tsv" else ","
        pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(delimiter=delimiter))
    splits = load(tmp_path, table=Path(file.name))
    assert splits.class_names == ("cat", "dog")
    assert any("whose columns 'camera' are not read" in note for note in splits.notes)
    assert names(splits.val) == {f"images/{i}.png" for i in range(1, 30, 3)}
    assert [splits.class_names[label] for label in splits.train.labels] == ["cat"] * 5 + ["dog"] * 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,kind,size\na.png,x,1\n", "has no column 'label', only 'path', 'kind', 'size'; rename a column"),
        ("kind,of\nx,y\n", "has no column 'path', only 'kind', 'of'; rename a column"),
        ("path,label\na.png,x\nc.png,y\n", "row 2: there is no image 'c.png' in"),
        ("path,label\na.png,x\ntwice,y\n", "row 2: 'twice' may be '1/twice.png' or '2/twice.png'; give paths"),
        ("path,label\na.png,\n", "row 1 has no label; complete or remove it"),
        ("path,label,split\na.png,x,trian\n", "row 1 has the split 'trian'; did you mean 'train'"),
        ("path,label,split\na.png,x,\n", "row 1 has the split ''; leave the column out to have the images split"),
        ("path,label\na.png,x\na.png,y\n", "names 'a.png' in more than one row; keep one"),
        ("path,label\na.png,x\nb.png,x\n", "expected two or more classes, found 1"),
        ("path,label,split\na.png,x,train\nb.png,y,val\n", "class 'y' has images of val but none of train; add some"),
        ("path,label\n1,2,3\n", "cannot be read as a table"),
        ("path,label,weight\na.png,x,2\nb.png,y,-1\n", "row 2 has the weight '-1'; expected a number of at least 0"),
        ("path,label,weight\na.png,x,\nb.png,y,1\n", "row 1 has the weight ''; expected a number of at least 0"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, "a.png", "b.png", "1/twice.png", "2/twice.png")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError) as refused:
        load(tmp_path, table=Path("table.csv"))
    assert str(refused.value).startswith(f"{tmp_path}/table.csv: {says}")
    with pytest.raises(DataError, match=r"data\.table: there is no file .*none\.csv"):
        load(tmp_path, table=Path("none.csv"))


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("id,breed", "{i:03d},{label}"),  # Kaggle's dog breeds: names without suffixes
        ("\ufefffilename;class", "{i:03d}.png;{label}"),
        ("photo\tkind", "train\\{i:03d}.png\t{label}"),
        ("image,cat,dog", "{i:03d},{cat:.1f},{dog:.1f}"),  # ISIC: a column per class
        ("Label|Image Index|age", "{label}|{i:03d}.png|40"),
    ],
)
def test_columns_of_other_names_and_paths_that_are_names(tmp_path: Path, head: str, row: str) -> None:
    write(tmp_path, *(f"train/{i:03d}.png" for i in range(20)), "train/deep/000.txt")
    rows = [row.format(i=i, label="dog" if i % 2 else "cat", cat=(i + 1) % 2, dog=i % 2) for i in range(20)]
    (tmp_path / "labels.csv").write_text("\n".join([head, *rows]), encoding="utf-8")
    (tmp_path / "submission.csv").write_text("id,label\n900,cat\n901,dog\n")
    splits = load(tmp_path, table=Path("labels.csv"))
    assert splits.class_names == ("cat", "dog")
    for split in (splits.train, splits.val, splits.test):
        assert isinstance(split.images, FileImages)
        of = [split.images.files.name(place) for place in range(len(split))]
        assert [int(name[-7:-4]) % 2 for name in of] == split.labels.tolist()
    with pytest.raises(DataError, match=r"found 1.*; set data\.table: labels\.csv, which lists the images"):
        load(tmp_path)
    seen = inspect_folder(tmp_path)
    assert (seen.table, seen.classes, len(seen.kept)) == ("labels.csv", ("cat", "dog"), 20)


def test_an_inspected_table_leaves_out_what_must_not_be_used(tmp_path: Path) -> None:
    write(tmp_path / "set", *(f"all/{i}.png" for i in range(30)))
    (tmp_path / "set" / "all" / "29.png").write_bytes(b"no image")
    rows = [f"{i},{'ab'[i % 2]},{'train' if i < 20 else 'test'}" for i in range(30)]
    (tmp_path / "set" / "list.csv").write_text("\n".join(["id,label,split", *rows]))
    folder = usable_folder(inspect_folder(tmp_path / "set"), tmp_path / "links")
    splits = load(folder, table=Path("list.csv"))
    assert names(splits.test) == {f"all/{i}.png" for i in range(20, 29)}


def test_weights_of_a_table_reach_the_task_loss(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i}.png" for i in range(40)))
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},{'train' if i < 20 else 'val'},{1 + i % 3}" for i in range(40)]
    file = tmp_path / "images.csv"

    def read(columns: str, lines: list[str]) -> Splits:
        file.write_text("\n".join([columns, *lines]))
        return load(tmp_path, table=Path("images.csv"))

    weighted = read("path,label,split,weight", rows)
    assert weighted.train.weights is not None
    assert weighted.val.weights is None
    by_name = dict(zip([str(name) for name in _paths(weighted.train)], weighted.train.weights.tolist(), strict=True))
    assert by_name == {f"{i}.png": 1 + i % 3 for i in map(int, (name[:-4] for name in by_name))}
    assert any(
        "weights of training images in the task loss are those of the table, 1 to 3" in n for n in weighted.notes
    )
    batch = next(iter(make_loaders(weighted, ViewSpec(POLICIES["none"], 0), 4).train.epoch(0)))
    mean = weighted.train.weights.mean()
    assert batch.weights.numpy() == pytest.approx(weighted.train.weights[batch.index.numpy()] / mean, rel=1e-6)
    kept = weighted.with_labels_per_class(3)
    assert len(kept.train.weights) == len(kept.train) == 6

    plain = read("path,label,split", [row.rpartition(",")[0] for row in rows])
    equal = read(
        "path,label,split,weight", [f"{row.rpartition(',')[0]},{2 if i < 20 else 1}" for i, row in enumerate(rows)]
    )
    assert plain.train.weights is equal.train.weights is None
    assert plain.fingerprint == equal.fingerprint != weighted.fingerprint


def _paths(split: Split) -> list[str]:
    images, index = split.images, np.arange(len(split))
    while isinstance(images, ChosenImages):
        index, images = images.index[index], images.images
    assert isinstance(images, FileImages)
    return [images.files.name(position) for position in index]


def test_groups_stay_together(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/patient{i % 12:02d}_{i}.png" for label in "ab" for i in range(60)))
    splits = load(tmp_path, group=r"(patient\d+)_")
    patients = [{name.split("/")[1][:9] for name in names(split)} for split in (splits.train, splits.val, splits.test)]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 12
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == pytest.approx([72, 24, 24], abs=10)
    assert load(tmp_path, group=r"(patient\d+)_").fingerprint == splits.fingerprint
    assert load(tmp_path, seed=1, group=r"(patient\d+)_").fingerprint != splits.fingerprint
    assert "by group and seed 0" in splits.notes[0]
    with pytest.raises(DataError, match=r"data\.group: 'b/\.' does not match 'a/patient"):
        load(tmp_path, group="b/.")
    with pytest.raises(DataError, match=r"data\.group: makes 1 group\(s\), too few for 3 splits"):
        load(tmp_path, group="patient")


def test_a_group_in_two_given_splits_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        *(f"{split}/{label}/p{i}.png" for split in ("train", "val", "test") for label in "ab" for i in range(3)),
    )
    notes = load(tmp_path, group=r"p\d").notes
    assert "3 groups are in more than one split (such as p0): metrics are too good" in notes


def test_grouped_split_keeps_shares_of_uneven_groups() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{number}" for number, size in enumerate(rng.integers(1, 40, 100)) for _ in range(size)]
    labels = rng.integers(0, 4, len(groups))
    parts = grouped_split(labels, groups, (0.6, 0.2, 0.2), seed=3)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert len(set.union(*({groups[i] for i in part} for part in parts))) == 100
    for label in range(4):
        shares = [np.mean(labels[part] == label) * len(part) / np.sum(labels == label) for part in parts]
        assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.05)


def test_keys_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="background: data set 'digits' does not read it; leave it out"):
        DataSettings(dataset="digits", background="black")
    with pytest.raises(ValueError, match=r"group: needs data\.reader: 2"):
        DataSettings(dataset="image_folder", root=tmp_path, reader=1, group="x")
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        DataSettings(dataset="image_folder", root=tmp_path, group="(")
    with pytest.raises(ValueError, match="there is no color 'blak'"):
        DataSettings(dataset="image_folder", root=tmp_path, background="blak")
    with pytest.raises(ValueError, match=r"expected \[black, white\] with black < white, got \[4.0, 4.0\]"):
        DataSettings(dataset="image_folder", root=tmp_path, value_range=(4, 4))
    assert DataSettings(dataset="image_folder", root=tmp_path, background="#0f0").options.background == (0, 255, 0)
    options = DataSettings(dataset="image_folder", root=tmp_path).options
    assert replace(options, padding=DEFAULT_OPTIONS.padding) == DEFAULT_OPTIONS, "padding is that of label maps"
