"""Images without labels: which batches hold them, which files they are, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_datasets import noise, write_image_folder

from heterokd.config.data import DataSettings
from heterokd.datasets.image_folder import ImageFolder
from heterokd.datasets.io.describe import describe_images
from heterokd.datasets.io.draws import Draws, Mixture, make_draws, make_mixture
from heterokd.datasets.io.images import ArrayImages, JoinedImages
from heterokd.datasets.io.loaders import TrainLoader, Worker
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.shared_pixels import share_splits
from heterokd.datasets.io.split import Split, Splits
from heterokd.datasets.io.unlabelled import copies_of_held_out, training_images, with_folder, with_rest
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.outputs import UNLABELLED
from heterokd.training.data import open_splits

LABELLED, OTHERS = 9, 31


def splits_of(labelled: int = LABELLED, others: int = OTHERS, weights: np.ndarray | None = None) -> Splits:
    """Images whose pixels are their numbers, of three classes; the last `others` have no label."""
    pixels = np.arange(labelled + others, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    labels = np.arange(labelled) % 3
    train = Split(ArrayImages(pixels[:labelled].copy()), labels, "train", weights=weights)
    empty = np.full(others, UNLABELLED)
    rest = Split(ArrayImages(pixels[labelled:].copy()), empty, "train", unlabelled=others)
    return Splits(train, train, train, ("a", "b", "c"), 8, "fingerprint", unlabelled=rest)


def loader_of(splits: Splits, batch: int, share: float, worker: Worker | None = None, **more: object) -> TrainLoader:
    policy = POLICIES["none"].model_copy(update=more)
    draws = make_draws(splits.train, splits.class_names, mixture=make_mixture(splits, batch, share))
    views = ViewSpec(policy, 5)
    return TrainLoader(splits.seen, views, batch, num_classes=3, worker=worker or Worker(), draws=draws)


def walk(members: list[int], draws: int, name: str, seed: int) -> list[tuple[int, int]]:
    """Pass after pass over the members, each in a new order: the slow and obvious way."""
    drawn: list[tuple[int, int]] = []
    turn = 0
    while len(drawn) < draws:
        drawn += [(members[place], turn) for place in permutation(len(members), turn, name, seed)]
        turn += 1
    return drawn[:draws]


@pytest.mark.parametrize(("batch", "share"), [(8, 0.5), (7, 0.3), (10, 0.75), (64, 0.5), (8, 0.0)])
def test_batches_have_their_share_and_passes_go_on(batch: int, share: float) -> None:
    splits, epochs, seed = splits_of(), 6, 5
    size = min(batch, LABELLED + OTHERS)
    part = round(size * share)
    steps = max(1, (LABELLED + OTHERS) // size)
    loader = loader_of(splits, batch, share)
    assert len(loader) == steps  # as many as without the share
    labelled = walk(list(range(LABELLED)), epochs * steps * (size - part), "labelled", seed)
    others = walk(list(range(LABELLED, LABELLED + OTHERS)), epochs * steps * part, "unlabelled", seed)
    for epoch in range(epochs):
        batches = list(loader.epoch(epoch))
        assert len(batches) == steps
        for step in batches:
            assert step.shown is not None
            assert len(step) == size
            pairs = [tuple(pair) for pair in step.shown.tolist()]
            expected = [labelled.pop(0) for _ in range(size - part)], [others.pop(0) for _ in range(part)]
            assert [pair for pair in pairs if pair[0] < LABELLED] == expected[0]
            assert [pair for pair in pairs if pair[0] >= LABELLED] == expected[1]
            assert step.labels.tolist() == [image % 3 if image < LABELLED else UNLABELLED for image, _ in pairs]
            # The pixels are the images' numbers: they belong to the positions that the batch says.
            assert (step.images[:, 0, 0, 0] * 255).round().int().tolist() == [image for image, _ in pairs]
            if not part:
                assert step.labelled is step.weights is None
                continue
            assert step.labelled is not None
            assert step.weights is not None
            assert step.labelled.tolist() == [image < LABELLED for image, _ in pairs]
            assert step.labelled_share == 1 - part / size
            assert step.weights.tolist() == pytest.approx(
                [size / (size - part) if image < LABELLED else 0 for image, _ in pairs]
            )
    assert not labelled
    assert not others


def test_any_run_of_places_has_its_share_of_labels() -> None:
    for batch in range(2, 30):
        for part in range(1, batch):
            labelled = Mixture(5, batch, part).labelled
            assert labelled.sum() == batch - part
            for images in range(1, batch + 1):
                for start in range(batch - images + 1):
                    exact = images * (batch - part) / batch
                    assert abs(labelled[start : start + images].sum() - exact) < 1


@pytest.mark.parametrize("views", [None, 4])
def test_workers_share_the_batches_and_every_epoch_can_be_replayed(views: int | None) -> None:
    splits = splits_of()
    whole = loader_of(splits, 10, 0.6)
    whole.views = ViewSpec(whole.views.policy, 5, views)
    parts = [loader_of(splits, 10, 0.6, Worker(rank, 3)) for rank in range(3)]
    for part in parts:
        part.views = whole.views
    for epoch in (0, 7):
        for step, *shares in zip(*(loader.epoch(epoch) for loader in (whole, *parts)), strict=True):
            assert step.shown is not None
            shown = [share.shown.tolist() for share in shares if share.shown is not None]
            assert [pair for part in shown for pair in part] == step.shown.tolist()
            assert views is None or step.shown[:, 1].max() < views


def test_balanced_sampling_and_weights_concern_the_labelled_images_alone() -> None:
    splits = splits_of(weights=np.array([1, 1, 4] * 3, np.float32))
    mixture = make_mixture(splits, 12, 0.5)
    draws = make_draws(splits.train, splits.class_names, "balanced", mixture=mixture)
    order, _ = draws.epoch(2, seed=1)
    labelled = order[order < LABELLED]
    assert len(labelled) == 18
    assert np.bincount(splits.train.labels[labelled]).tolist() == [6, 6, 6]
    weights = draws.batch_weights
    assert weights is not None
    assert weights[:3] == pytest.approx([1, 1, 4])  # 0.5, 0.5 and 2, in half of a batch
    assert not weights[LABELLED:].any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_views_give_no_label_to_an_image_without(kind: str) -> None:
    splits = splits_of()
    loader = loader_of(splits, 20, 0.5, **{kind: 1.0})
    for step in (step for epoch in range(5) for step in loader.epoch(epoch)):
        assert step.labelled is not None
        assert step.shown is not None
        assert step.weights is not None
        shares = step.labels.sum(dim=1)
        assert shares[step.labelled].tolist() == pytest.approx([1] * 10)
        assert not shares[~step.labelled].any()
        assert not step.weights[~step.labelled].any()
        # Pixels are between those of two images of the same kind.
        values = step.images.amax(dim=(1, 2, 3)) * 255, step.images.amin(dim=(1, 2, 3)) * 255
        assert values[0][step.labelled].max() < LABELLED
        assert values[1][~step.labelled].min() > LABELLED - 0.5


@pytest.mark.parametrize(("share", "says"), [(0.01, "0.01 of a batch of 10 images is no image"), (0.99, "every image")])
def test_a_share_of_nothing_is_refused(share: float, says: str) -> None:
    with pytest.raises(DataError, match=f"training.unlabelled_share: .*{says}"):
        make_mixture(splits_of(), 10, share)


def test_without_unlabelled_images_nothing_changes() -> None:
    splits = splits_of()
    plain = Splits(splits.train, splits.val, splits.test, splits.class_names, 8, "fingerprint")
    assert plain.seen is plain.train
    assert make_mixture(plain, 4, 0.5) is None
    assert make_draws(plain.train, plain.class_names).epoch(1, 2)[0].tolist() == permutation(LABELLED, 1, 2).tolist()
    assert Draws(plain.train.labels).batch_weights is None


def test_the_rest_of_a_labelled_set() -> None:
    few = DataSettings(dataset="digits", labels_per_class=10, unlabelled="rest")
    splits, whole = open_splits(few), open_splits(DataSettings(dataset="digits"))
    plain = open_splits(DataSettings(dataset="digits", labels_per_class=10))
    assert training_images(splits) == {"labelled": 100, "unlabelled": 978}
    assert splits.train.labels.tolist() == plain.train.labels.tolist()
    assert splits.fingerprint not in (whole.fingerprint, plain.fingerprint)
    assert splits.mean == plain.mean
    kept = np.concatenate([splits.train.kept, splits.unlabelled.kept])  # type: ignore[list-item, union-attr]
    assert sorted(kept.tolist()) == list(range(1078))
    everything = np.arange(1078)
    assert (splits.seen.images.read(everything) == whole.train.images.read(kept)).all()
    assert (splits.seen.labels[100:] == UNLABELLED).all()
    assert splits.notes[-1] == "unlabelled: the other 978 training images, without their labels"
    with pytest.raises(DataError, match="all 1078 training images have labels"):
        with_rest(whole, whole.train)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    write_image_folder(tmp_path / "data")
    rng = np.random.default_rng(1)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for number in range(4):
        noise(rng, 40, 30).save(tmp_path / "more" / ("deep" if number % 2 else "") / f"{number}.png")
    (tmp_path / "more" / "notes.txt").write_text("no image")
    return tmp_path / "data", tmp_path / "more"


def loaded(root: Path, more: Path, **options: object) -> Splits:
    given = DataOptions(**options) if options else DEFAULT_OPTIONS  # type: ignore[arg-type]
    return with_folder(ImageFolder().load_with(root, 16, 0, given), more, given)


def test_a_folder_of_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    splits = loaded(*folders)
    assert training_images(splits) == {"labelled": len(splits.train), "unlabelled": 4}
    assert splits.notes[-2:] == (
        f"unlabelled: 4 images below {folders[1]}",
        "not read: 1 file, .txt: no image format that Pillow decodes (such as notes.txt)",
    )
    assert f"{len(splits.train)} training images and 4 without labels, " in describe_images(splits)[0]
    shared = share_splits(tmp_path / "pixels", splits)
    index = permutation(len(splits.seen), 0, "any")
    assert (shared.seen.images.read(index) == splits.seen.images.read(index)).all()
    assert isinstance(shared.seen.images, JoinedImages)
    assert len(list((tmp_path / "pixels").glob("*.pixels"))) == 3


def test_photo_crops_of_both_sources(folders: tuple[Path, Path]) -> None:
    splits = loaded(*folders, crops="photo")
    policy = POLICIES["crop"]
    seen = TrainLoader(splits.seen, ViewSpec(policy, 3), 4)
    index = np.array([len(splits.train) + 1, 0, 2])
    both = seen.views_of(index, np.array([1, 2, 3])).images
    assert splits.unlabelled is not None
    alone = TrainLoader(splits.train, ViewSpec(policy, 3), 4).views_of(np.array([0, 2]), np.array([2, 3])).images
    assert (both[1:] == alone).all()
    assert both[0].std() > 0.1  # of noise


def test_copies_of_val_and_test_are_told(folders: tuple[Path, Path]) -> None:
    root, more = folders
    for split in ("val", "test"):
        files = getattr(loaded(root, more), split).images.files
        suffix = Path(files.name(0)).suffix
        shutil.copy(files.path(0), more / f"copy_of_{split}{suffix}")
    with Image.open(more / f"copy_of_val{suffix}") as image:
        image.save(more / "other_format.bmp")
    splits = loaded(root, more)
    assert {name: len(names) for name, names in copies_of_held_out(splits).items()} == {"val": 1, "test": 1}
    wrong = [line for line in describe_images(splits) if line.startswith("looks wrong") and "without labels" in line]
    assert [line.split(" (such")[0] for line in wrong] == [
        "looks wrong: 1 images without labels are images of val",
        "looks wrong: 1 images without labels are images of test",
        "looks wrong: 1 images without labels are nearly the same as images of val",
    ]


def test_unusable_folders_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    root, more = folders
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (tmp_path / "none", "data.unlabelled: there is no folder"),
        (tmp_path / "empty", "data.unlabelled: .* holds no images that Pillow decodes; it is empty"),
        (root, "data.unlabelled: .* holds labelled images of train"),
        (root / "cat", "holds labelled images of train"),
        (tmp_path, "holds labelled images of train"),
    ):
        with pytest.raises(DataError, match=says):
            loaded(root, folder)
    (more / "cut.png").write_bytes((more / "0.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.png"):
        loaded(root, more).check_images()
    assert any("1 files cannot be read (such as cut.png)" in line for line in describe_images(loaded(root, more)))
    (more / "zero.png").touch()
    with pytest.raises(DataError, match=r"zero\.png: is empty"):
        loaded(root, more)


def test_digits_with_files_without_labels(folders: tuple[Path, Path]) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folders[1] / "clear.png")
    splits = open_splits(DataSettings(dataset="digits", unlabelled=folders[1]))
    assert splits.seen.images.read(np.array([0, 1078 + 4])).shape == (2, 32, 32, 3)
    assert (splits.seen.images.read(np.array([1078 + 2])) == 255).all()  # clear.png, on white
    assert describe_images(splits)[0].startswith("1078 training images and 5 without labels, 362 val, 357 test")
