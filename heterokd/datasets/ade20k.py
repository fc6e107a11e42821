"""ADE20K, scene parsing: photographs of indoor and outdoor scenes with a class for every pixel, 150 classes.

Zhou, Zhao, Puig, Fidler, Barriuso, Torralba: "Scene Parsing through ADE20K Dataset", CVPR 2017,
https://arxiv.org/abs/1608.05442; the Scene Parsing Benchmark of http://sceneparsing.csail.mit.edu:

    ROOT/ADEChallengeData2016/{images,annotations}/{training,validation}/

Test is the official validation set, 2000 images, because the official test labels are not public. A seeded `VAL_SHARE`
of the 20 210 training images becomes val. In label maps 0 is "other", which is ignored, and 1 to 150 are the classes.
`data.masks` sets other classes for images in this layout; names without numbers count from 1, and 0 is ignored.

The canvas is `image_size` x `image_size`, and larger images are shrunk to fit. Papers resize the shorter side to 512
for the network, and evaluate at the original size: mIoU on a canvas is close to theirs, but not the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from heterokd.datasets.io.image_files import file_names, path_array
from heterokd.datasets.io.label_maps import SceneFiles, label_files, scene_splits
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.split import Dataset, SplitName, Splits
from heterokd.datasets.masks.classes import KnownClasses
from heterokd.datasets.masks.found_classes import mask_classes
from heterokd.datasets.masks.settings import MaskClass, MaskSettings
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

FOLDER = "ADEChallengeData2016"
VAL_SHARE = 0.05
ADVICE = "download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it there"
# The first word of each entry of the benchmark's list; a class's number is its position.
CLASS_NAMES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass"),
    *("cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair"),
    *("car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field"),
    *("armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion"),
    *("base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace"),
    *("refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow", "screen door"),
    *("stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench"),
    *("countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine"),
    *("hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth"),
    *("television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman"),
    *("bottle", "buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer"),
    *("plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle"),
    *("oven", "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake"),
    *("dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan"),
    *("fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock"),
    "flag",
)


class ADE20K(Dataset):
    """Indoor and outdoor scenes with a class for every pixel, 150 classes (Zhou et al. 2017)."""

    needs_root = True
    tasks = "segmentation"
    default_policy = POLICIES["scenes"]
    licence = "non-commercial research and education for the images, BSD 3-Clause for the annotations"
    reads = frozenset({"masks", "drawn_at", "group"})

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images and label maps are decoded when read."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split, with the classes and shares of `options.masks`."""
        masks = options.masks or MaskSettings()
        folder = Path(root or ".") / FOLDER
        kept, held_out = _pairs(folder, "training").hold_out(masks.val_share or VAL_SHARE, seed, options.group)
        files: dict[SplitName, SceneFiles] = {"train": kept, "val": held_out, "test": _pairs(folder, "validation")}
        known = KnownClasses(tuple(MaskClass(name=name) for name in CLASS_NAMES), ignored=(0,), first=1)
        files = {
            name: replace(part, padding=options.padding, drawn_at=options.drawn_at) for name, part in files.items()
        }
        classes = mask_classes(masks, folder, label_files(files), ADVICE, known)
        return scene_splits("ade20k", files, classes, (image_size, image_size), ADVICE)


def _pairs(folder: Path, split: str) -> SceneFiles:
    """List the images of a split, sorted by name.

    Raises:
        DataError: the split has no images.
    """
    images = folder / "images" / split
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder; {ADVICE}")
    names, _ = file_names(images, (".jpg",))
    if not names:
        raise DataError(f"{images}: holds no *.jpg; {ADVICE}")
    return SceneFiles(
        folder,
        path_array(f"images/{split}/{name}" for name in names),
        path_array(f"annotations/{split}/{name.removesuffix('.jpg')}.png" for name in names),
    )
