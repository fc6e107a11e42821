"""Views are pure functions of (policy, seed, index, view): checked to the last bit, and against slow versions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from another_process import AnotherProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError
from scipy import stats
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from heterokd.datasets.views.color import plain_images, turn_hue
from heterokd.datasets.views.mixing import draw_mix, mix_labels, mix_views, symmetric_beta
from heterokd.datasets.views.operations import KINDS, OPERATIONS, _look_up, _move, _saturate, _sharpen, operation_draws
from heterokd.datasets.views.policy import FIRST_SCENES, POLICIES, AugmentPolicy
from heterokd.datasets.views.random import (
    DRAWS,
    LATER_DRAWS,
    STREAM_MIX,
    STREAM_OPERATION,
    permutation,
    philox,
    philox_key,
    random_words,
    view_draws,
    view_key,
)
from heterokd.datasets.views.render import view_images, view_scenes

EVERYTHING = AugmentPolicy(
    scale=(0.3, 1.3),
    ratio=(0.7, 1.4),
    translate=0.1,
    rotation=30,
    flip=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    erasing=0.5,
)
# The same with all that came later.
MORE = EVERYTHING.model_copy(
    update={"hue": 0.2, "erasing_noise": True, "operations": 3, "magnitude": 7.0, "magnitude_std": 2.0, "mixup": 0.3}
)
POLICY_CASES = pytest.mark.parametrize(
    "policy", [*POLICIES.values(), EVERYTHING, MORE], ids=[*POLICIES, "everything", "more"]
)


def some_images(count: int, side: int = 16) -> Tensor:
    """Smooth colour images, [B, S, S, 3] uint8, made without a generator so that they are the same everywhere."""
    number, y, x, channel = np.ogrid[:count, :side, :side, :3]
    wave = np.sin((number + 2) * x / side + channel) + np.cos((channel + 2) * y / side - number)
    return torch.from_numpy(((wave + 2) * 63).astype(np.uint8))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    """Known answers of the authors' own library, Random123."""
    two = np.array([counter, [1, 2, 3, 4]], np.uint64)
    assert philox(two, key)[0].tolist() == expected


@POLICY_CASES
def test_a_view_does_not_depend_on_its_batch(policy: AugmentPolicy) -> None:
    images, index, view = some_images(9), np.arange(9) * 7, np.arange(9) % 3
    together = view_images(images, index, view, policy, seed=3)
    order = np.array([4, 8, 1, 0])
    assert torch.equal(view_images(images[order], index[order], view[order], policy, seed=3), together[order])
    for place in range(9):
        alone = view_images(images[place : place + 1], index[place : place + 1], view[place : place + 1], policy, 3)
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("policy", [EVERYTHING, MORE], ids=["everything", "more"])
def test_a_large_view_does_not_depend_on_its_batch_or_threads(policy: AugmentPolicy) -> None:
    """At this size torch shares one image's pixels among threads, where sums could be taken in another order."""
    images, index = some_images(3, side=224), np.arange(3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = view_images(images, index, 5, policy)
        alone = view_images(images[1:2], index[1:2], 5, policy)
        torch.set_num_threads(1)
        assert torch.equal(view_images(images, index, 5, policy), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[1])


@POLICY_CASES
def test_views_are_images(policy: AugmentPolicy) -> None:
    views = view_images(some_images(64), np.arange(64), np.arange(64), policy)
    assert views.shape == (64, 3, 16, 16)
    assert views.dtype == torch.float32
    assert views.is_contiguous()
    assert views.min() >= 0
    assert views.max() <= 1


def test_a_policy_that_is_off_changes_no_bit() -> None:
    images = some_images(4)
    views = view_images(images, np.arange(4), 9, POLICIES["none"])
    assert torch.equal(views, images.permute(0, 3, 1, 2).float() / 255)
    assert torch.equal((views * 255).round().byte().permute(0, 2, 3, 1), images)


def test_float_images_give_the_same_views() -> None:
    images = some_images(4)
    floats = plain_images(images).permute(0, 2, 3, 1)
    expected = view_images(images, np.arange(4), 1, EVERYTHING)
    assert torch.equal(view_images(floats, np.arange(4), 1, EVERYTHING), expected)


def test_index_view_seed_and_policy_all_matter() -> None:
    image = some_images(1)
    other = POLICIES["digits"].model_copy(update={"rotation": 11.0})
    cases = [(i, v, s, p) for i in range(3) for v in range(3) for s in range(2) for p in (POLICIES["digits"], other)]
    views = {view_images(image, np.array([i]), v, p, s).numpy().tobytes() for i, v, s, p in cases}
    assert len(views) == len(cases)


def test_draws_are_uniform_and_unrelated() -> None:
    index, view = (axis.ravel() for axis in np.meshgrid(np.arange(200), np.arange(100), indexing="ij"))
    draws = view_draws(POLICIES["digits"], 0, index, view)
    table = np.stack([draws[name] for name in DRAWS])
    count = table.shape[1]
    assert ((table > 0) & (table < 1)).all()
    bins = np.stack([np.histogram(row, bins=20, range=(0, 1))[0] for row in table])
    chi_squared = ((bins - count / 20) ** 2 / (count / 20)).sum(axis=1)
    assert (chi_squared < 50).all()  # 19 degrees of freedom: one in 10 000 exceeds 50
    assert np.abs(np.corrcoef(table) - np.eye(len(DRAWS))).max() < 5 / math.sqrt(count)
    square = draws["rotation"].reshape(200, 100)
    neighbours = [(square[1:], square[:-1]), (square[:, 1:], square[:, :-1])]
    assert all(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(count) for a, b in neighbours)


def test_switching_one_draw_off_leaves_the_order_of_draws() -> None:
    """The draws of a policy are its own (its hash is in the key), but a place belongs to one purpose for good."""
    assert DRAWS.index("rotation") == 6
    assert DRAWS[:4] == ("scale", "ratio", "crop_x", "crop_y")
    assert len(set(DRAWS)) == len(DRAWS) == 16
    assert LATER_DRAWS[0] == "hue"


def slow_warp(image: np.ndarray, policy: AugmentPolicy, draw: dict[str, float]) -> np.ndarray:
    """One pixel after the other, from the sentence: crop, turn, shift; bilinear; black outside. [3, S, S]."""
    side = image.shape[1]
    area = policy.scale[0] + draw["scale"] * (policy.scale[1] - policy.scale[0])
    ratio = math.exp(math.log(policy.ratio[0]) + draw["ratio"] * math.log(policy.ratio[1] / policy.ratio[0]))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if area <= 1:
        width, height = min(width, 1), min(height, 1)
    # In pixels: the middle of the crop, somewhere it fits, then the shift.
    middle_x = side / 2 + (draw["crop_x"] - 0.5) * side * abs(1 - width)
    middle_y = side / 2 + (draw["crop_y"] - 0.5) * side * abs(1 - height)
    middle_x += (2 * draw["translate_x"] - 1) * policy.translate * side
    middle_y += (2 * draw["translate_y"] - 1) * policy.translate * side
    angle = math.radians((2 * draw["rotation"] - 1) * policy.rotation)
    result = np.zeros_like(image)
    for row in range(side):
        for column in range(side):
            u, v = column + 0.5 - side / 2, row + 0.5 - side / 2
            x = middle_x + width * (u * math.cos(angle) - v * math.sin(angle))
            y = middle_y + height * (u * math.sin(angle) + v * math.cos(angle))
            if not (0 <= x <= side and 0 <= y <= side):
                continue
            x, y = min(max(x - 0.5, 0), side - 1), min(max(y - 0.5, 0), side - 1)
            left, top = int(x), int(y)
            right, bottom = min(left + 1, side - 1), min(top + 1, side - 1)
            dx, dy = x - left, y - top
            upper = image[:, top, left] * (1 - dx) + image[:, top, right] * dx
            lower = image[:, bottom, left] * (1 - dx) + image[:, bottom, right] * dx
            result[:, row, column] = upper * (1 - dy) + lower * dy
    return result


@pytest.mark.parametrize(
    "policy",
    [
        POLICIES["digits"],
        AugmentPolicy(scale=(0.08, 1.0), ratio=(0.75, 4 / 3)),
        AugmentPolicy(rotation=180, translate=0.5),
        AugmentPolicy(scale=(1.2, 2.0)),
    ],
    ids=["digits", "crop", "turn and shift", "shrink"],
)
def test_warp_equals_the_slow_version(policy: AugmentPolicy) -> None:
    images = some_images(12, side=11)
    plain = plain_images(images).double().numpy()
    draws = view_draws(policy, 4, np.arange(12), 2)
    expected = np.stack(
        [slow_warp(plain[b], policy, {name: float(draws[name][b]) for name in DRAWS}) for b in range(12)]
    )
    views = view_images(images, np.arange(12), 2, policy, 4).numpy()
    # Where a position falls on the border to within rounding, either answer is right.
    assert (np.abs(views - expected) > 1e-5).sum() <= 3


def test_a_full_turn_and_a_flip_are_exact() -> None:
    images = some_images(50)
    plain = plain_images(images)
    views = view_images(images, np.arange(50), 0, AugmentPolicy(flip=0.5))
    flipped = [torch.equal(view, image.flip(2)) for view, image in zip(views, plain, strict=True)]
    kept = [torch.equal(view, image) for view, image in zip(views, plain, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 10 < sum(flipped) < 40
    assert torch.equal(view_images(images, np.arange(50), 0, AugmentPolicy(flip=1)), plain.flip(3))


def test_colour_equals_the_slow_version() -> None:
    policy = AugmentPolicy(brightness=0.4, contrast=0.5, saturation=0.6)
    images = some_images(5)
    draws = view_draws(policy, 0, np.arange(5), 7)
    grey_of = np.array([0.299, 0.587, 0.114])
    for b, view in enumerate(view_images(images, np.arange(5), 7, policy)):
        pixels = images[b].double().numpy() / 255
        factors = [1 + (2 * draws[name][b] - 1) * getattr(policy, name) for name in ("brightness", "contrast")]
        mean = (pixels @ grey_of).mean() * factors[0]
        pixels = np.clip(mean + (pixels * factors[0] - mean) * factors[1], 0, 1)
        grey = (pixels @ grey_of)[..., None]
        saturation = 1 + (2 * draws["saturation"][b] - 1) * policy.saturation
        pixels = np.clip(grey + (pixels - grey) * saturation, 0, 1)
        assert np.abs(view.permute(1, 2, 0).numpy() - pixels).max() < 1e-5


def test_erasing_blacks_out_one_rectangle() -> None:
    images = torch.full((200, 20, 20, 3), 255, dtype=torch.uint8)
    views = view_images(images, np.arange(200), 0, AugmentPolicy(erasing=0.5))
    shares = []
    for view in views:
        black = (view == 0).all(dim=0)
        rows, columns = black.any(dim=1), black.any(dim=0)
        assert torch.equal(black, rows[:, None] & columns[None, :])
        assert torch.equal(view, (~black).float().expand(3, -1, -1))
        shares.append(black.float().mean().item())
    assert 70 < sum(share > 0 for share in shares) < 130
    assert max(shares) < 0.5


def test_golden_pixels() -> None:
    """Fails when a change of code changes the views: then raise VIEWS_VERSION and these numbers with it."""
    digits = view_images(some_images(3), np.array([0, 5, 1000]), np.array([0, 3, 49]), POLICIES["digits"], seed=1)
    assert digits[1, 0, 4, 4:8].tolist() == pytest.approx(GOLDEN_DIGITS, abs=1e-4)
    standard = view_images(some_images(3), np.array([0, 5, 1000]), np.array([0, 3, 49]), POLICIES["standard"], seed=1)
    assert standard[2, :, 8, 8].tolist() == pytest.approx(GOLDEN_STANDARD, abs=1e-4)
    ofa = view_images(some_images(3), np.array([0, 5, 1000]), np.array([0, 3, 49]), POLICIES["ofa"], seed=1)
    assert ofa[:, 1, 5, 5].tolist() == pytest.approx(GOLDEN_OFA, abs=1e-2)


def test_golden_draws() -> None:
    """The same on every machine, to the last bit: by a hash over the words from which all draws are made."""
    index, view = np.arange(50) * 1000, np.arange(50)
    for name, expected in GOLDEN_WORDS.items():
        key = view_key(POLICIES[name], 3)
        streams = [random_words(key, stream, index, view, blocks=4) for stream in (0, STREAM_OPERATION, STREAM_MIX)]
        digest = hashlib.sha256(np.stack(streams).astype("<u8").tobytes()).hexdigest()
        assert digest[:16] == expected, name
    mix = draw_mix(POLICIES["ofa"], index[:5], view[:5], 50_000, seed=3)
    assert mix.index.tolist() == GOLDEN_PARTNERS
    assert mix.share.tolist() == pytest.approx(GOLDEN_SHARES, abs=1e-9)
    number, magnitude = operation_draws(POLICIES["ofa"], 3, index[:4], view[:4])
    assert [[OPERATIONS[place] if place >= 0 else "" for place in row] for row in number] == GOLDEN_OPERATIONS
    assert magnitude[0].tolist() == pytest.approx(GOLDEN_MAGNITUDES, abs=1e-9)


def test_policies_of_before_keep_their_hash() -> None:
    """A setting that came later and is off leaves the name of a policy, and so its views, as they were."""
    assert {name: POLICIES[name].hash for name in GOLDEN_HASHES} == GOLDEN_HASHES
    assert FIRST_SCENES.hash == "94f2fe1b8b859781"
    assert AugmentPolicy(magnitude=5.0).hash != AugmentPolicy().hash


GOLDEN_HASHES = {
    "none": "ae5d9b713e60c8c9",
    "digits": "66f3f1686c1a1c1d",
    "standard": "f5c3fc2fb55b3492",
    "crop": "bc664e97bc3ca853",
    "cifar": "d376eb3e2e6e8ad4",
}
GOLDEN_WORDS = {"digits": "6c4351b318435732", "ofa": "645c8f7991ea5402"}
GOLDEN_PARTNERS = [32422, 40026, 20674, 47437, 47470]
GOLDEN_SHARES = [0.42850193505, 0.647707886666, 0.77924360145, 0.92650399985, 0.179706323521]
GOLDEN_OPERATIONS = [["", ""], ["", ""], ["sharpness", "translate_x"], ["brightness", "invert"]]
GOLDEN_MAGNITUDES = [-0.830380165217, 0.935390062897]
GOLDEN_OFA = [0.8549, 0.5176, 0.9098]
GOLDEN_DIGITS = [0.87336, 0.90055, 0.92135, 0.93597]
GOLDEN_STANDARD = [0.67775, 0.65178, 0.5262]


def test_another_process_makes_the_same_view(elsewhere: AnotherProcess) -> None:
    code = (
        "import numpy as np, torch; from heterokd.datasets.views.policy import POLICIES; "
        "from heterokd.datasets.views.render import view_images; "
        "images = torch.arange(2 * 8 * 8 * 3).remainder(251).byte().view(2, 8, 8, 3); "
        "print(view_images(images, np.array([3, 4]), 2, POLICIES['standard'], 7).double().sum((1, 2, 3)).tolist())"
    )
    images = torch.arange(2 * 8 * 8 * 3).remainder(251).byte().view(2, 8, 8, 3)
    views = view_images(images, np.array([3, 4]), 2, POLICIES["standard"], 7)
    assert elsewhere(code).strip() == str(views.double().sum((1, 2, 3)).tolist())


def test_another_process_mixes_the_same_view(elsewhere: AnotherProcess) -> None:
    code = (
        "import numpy as np, torch; from heterokd.datasets.views.mixing import draw_mix, mix_views; "
        "from heterokd.datasets.views.render import view_images; "
        "from heterokd.datasets.views.policy import POLICIES; "
        "images = torch.arange(4 * 8 * 8 * 3).remainder(251).byte().view(4, 8, 8, 3); ofa = POLICIES['ofa']; "
        "mix = draw_mix(ofa, np.arange(4), 2, 4, 7); first = view_images(images, np.arange(4), 2, ofa, 7); "
        "second = view_images(images[torch.from_numpy(mix.index)], mix.index, mix.view, ofa, 7); "
        "print(mix_views(first, second, mix)[0].double().sum((1, 2, 3)).tolist())"
    )
    images = torch.arange(4 * 8 * 8 * 3).remainder(251).byte().view(4, 8, 8, 3)
    mixed, _ = mixed_views(POLICIES["ofa"], images, np.arange(4), 2, seed=7)
    assert elsewhere(code) == f"{mixed.double().sum((1, 2, 3)).tolist()}\n"


def test_policy_refuses_what_makes_no_sense() -> None:
    for wrong in ({"scale": (1.0, 0.5)}, {"ratio": (0.0, 1.0)}, {"flip": 1.5}, {"rotation": float("nan")}, {"zoom": 1}):
        with pytest.raises(ValidationError):
            AugmentPolicy(**wrong)
    assert all(field.description for field in AugmentPolicy.model_fields.values())


def test_policy_hash_names_its_settings() -> None:
    hashes = {policy.hash for policy in POLICIES.values()}
    assert len(hashes) == len(POLICIES)
    assert AugmentPolicy(**POLICIES["digits"].model_dump()).hash == POLICIES["digits"].hash
    assert AugmentPolicy.model_validate_json(POLICIES["standard"].model_dump_json()).hash == POLICIES["standard"].hash
    assert philox_key("a", 1) != philox_key("a", 2)


def test_permutation_is_one_and_is_the_same_everywhere() -> None:
    assert sorted(permutation(1000, 3, 0)) == list(range(1000))
    assert permutation(8, 0, 0).tolist() == GOLDEN_ORDER
    assert permutation(8, 1, 0).tolist() != GOLDEN_ORDER
    assert permutation(8, 0, 1).tolist() != GOLDEN_ORDER


GOLDEN_ORDER = [1, 4, 2, 3, 6, 0, 5, 7]


# --- hue, RandAugment, erasing with noise: against PIL and torchvision, one image after the other


def test_hue_equals_torchvision() -> None:
    pixels = plain_images(some_images(6, side=24)).double()
    turns = torch.tensor([-0.5, -0.21, 0.0, 0.07, 0.3, 0.5]).double().view(-1, 1, 1, 1)
    expected = torch.stack([adjust_hue(image, float(turn)) for image, turn in zip(pixels, turns, strict=True)])
    assert (turn_hue(pixels, turns) - expected).abs().max() < 1e-6
    grey = torch.full((1, 3, 4, 4), 0.4)
    assert torch.allclose(turn_hue(grey, torch.full((1, 1, 1, 1), 0.3)), grey)


def pil_operation(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Timm's operation of that name (its `...Increasing`), from the sentence, by PIL."""
    strength, width, height = abs(magnitude), image.width, image.height
    factor = max(0.1, 1 + 0.9 * magnitude)

    def move(*matrix: float) -> Image.Image:
        transform = Image.Transform.AFFINE
        return image.transform(image.size, transform, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)

    operations: dict[str, Callable[[], Image.Image]] = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(30 * magnitude, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
        "posterize": lambda: (
            ImageOps.posterize(image, 4 - int(strength * 4)) if strength < 1 else image.point(lambda _: 0)
        ),
        "solarize": lambda: ImageOps.solarize(image, 256 - min(256, int(strength * 256))),
        "solarize_add": lambda: image.point(lambda x: min(255, x + int(strength * 110)) if x < 128 else x),
        "colour": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear_x": lambda: move(1, 0.3 * magnitude, 0, 0, 1, 0),
        "shear_y": lambda: move(1, 0, 0, 0.3 * magnitude, 1, 0),
        "translate_x": lambda: move(1, 0, 0.45 * magnitude * width, 0, 1, 0),
        "translate_y": lambda: move(1, 0, 0, 0, 1, 0.45 * magnitude * height),
    }
    return operations[name]()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pil(name: str) -> None:
    images = torch.cat([some_images(7, side=20), (some_images(1, side=20) // 64) * 40])
    magnitudes = np.array([-1.0, -0.93, -0.4, 0.05, 0.37, 0.9, 1.0, 0.62])
    number = np.full(8, OPERATIONS.index(name))
    change = (_look_up, _move, _saturate, _sharpen)[KINDS[number[0]]]
    changed = change(images.permute(0, 3, 1, 2).contiguous(), number, magnitudes).permute(0, 2, 3, 1).int().numpy()
    for image, magnitude, got in zip(images.numpy(), magnitudes.tolist(), changed, strict=True):
        expected = np.asarray(pil_operation(Image.fromarray(image), name, magnitude)).astype(int)
        off = np.abs(got - expected)
        if KINDS[number[0]] == 1:  # PIL places pixels in 1 / 65536, and cuts levels where we round
            assert (off.max(axis=2) > 2).mean() < 0.02, magnitude
        else:
            assert off.max() <= 1, magnitude
            assert (off > 0).mean() < 0.02, magnitude


def test_operations_are_drawn_as_the_policy_says() -> None:
    policy = POLICIES["ofa"]
    number, magnitude = operation_draws(policy, 0, np.arange(30_000), 0)
    assert number.shape == magnitude.shape == (30_000, 2)
    assert (number >= 0).mean() == pytest.approx(0.5, abs=0.01)
    counts = np.bincount(number[number >= 0], minlength=len(OPERATIONS))
    assert (np.abs(counts / counts.sum() - 1 / 15) < 0.005).all()
    strength = np.abs(magnitude) * 10
    assert strength.mean() == pytest.approx(9, abs=0.03)  # a few are cut at 10
    assert strength.std() == pytest.approx(0.5, abs=0.03)
    assert (magnitude < 0).mean() == pytest.approx(0.5, abs=0.01)


def test_erased_pixels_show_noise() -> None:
    images = torch.zeros(300, 32, 32, 3, dtype=torch.uint8)
    black = view_images(images + 255, np.arange(300), 0, AugmentPolicy(erasing=0.5))
    policy = AugmentPolicy(erasing=0.5, erasing_noise=True)
    views = view_images(images, np.arange(300), 0, policy)
    shares = [(view > 0).any(dim=0).float().mean().item() for view in views]
    assert 100 < sum(share > 0 for share in shares) < 200
    assert black.shape == views.shape
    colours = views[views > 0]
    assert colours.mean().item() == pytest.approx(0.5, abs=0.01)
    assert colours.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert torch.equal(views[7:9], view_images(images[7:9], np.array([7, 8]), 0, policy))


# --- mixing


def mixed_views(
    policy: AugmentPolicy, images: Tensor, index: np.ndarray, view: np.ndarray | int, seed: int = 0
) -> tuple[Tensor, np.ndarray]:
    """Mixed views of a data set `images` [N, S, S, 3]."""
    mix = draw_mix(policy, index, view, len(images), seed)
    first = view_images(images[torch.from_numpy(index)], index, view, policy, seed)
    second = view_images(images[torch.from_numpy(mix.index)], mix.index, mix.view, policy, seed)
    return mix_views(first, second, mix)


@pytest.mark.parametrize(
    "policy",
    [POLICIES["ofa"], MORE, AugmentPolicy(mixup=0.2), AugmentPolicy(cutmix=1.0)],
    ids=["ofa", "more", "mixup", "cutmix"],
)
def test_a_mixed_view_does_not_depend_on_its_batch(policy: AugmentPolicy) -> None:
    images, index, view = some_images(12), np.arange(12), np.arange(12) % 5
    together, shares = mixed_views(policy, images, index, view, seed=3)
    order = np.array([4, 11, 1, 0])
    some, few = mixed_views(policy, images, order, view[order], seed=3)
    assert torch.equal(some, together[order])
    assert (few == shares[order]).all()
    for place in range(12):
        alone, _ = mixed_views(policy, images, np.array([place]), int(view[place]), seed=3)
        assert torch.equal(alone[0], together[place])


def test_mixed_views_equal_the_slow_version() -> None:
    images, index = some_images(40, side=12), np.arange(40)
    policy = AugmentPolicy(mixup=0.8, cutmix=1.0)
    mix = draw_mix(policy, index, 6, 40)
    mixed, shares = mixed_views(policy, images, index, 6)
    plain = plain_images(images)
    assert 10 < mix.pieces.sum() < 30
    for b in range(40):
        own, other = plain[b], plain[mix.index[b]]
        if not mix.pieces[b]:
            assert shares[b] == mix.share[b]
            assert torch.allclose(mixed[b], own * mix.share[b] + other * (1 - mix.share[b]), atol=1e-6)
            continue
        side, replaced = math.sqrt(1 - mix.share[b]), 0
        for row in range(12):
            for column in range(12):
                x, y = (column + 0.5) / 12, (row + 0.5) / 12
                inside = -side / 2 <= x - mix.centre[0, b] < side / 2 and -side / 2 <= y - mix.centre[1, b] < side / 2
                replaced += inside
                assert torch.equal(mixed[b, :, row, column], (other if inside else own)[:, row, column])
        assert shares[b] == pytest.approx(1 - replaced / 144)


@pytest.mark.parametrize("concentration", [0.2, 0.8, 1.0, 3.0])
def test_shares_are_beta_distributed(concentration: float) -> None:
    generator = np.random.default_rng(0)
    shares = symmetric_beta(np.full(20_000, concentration), *generator.random((4, 20_000)))
    assert ((shares >= 0) & (shares <= 1)).all()
    assert stats.kstest(shares, stats.beta(concentration, concentration).cdf).pvalue > 1e-3


def test_partners_come_from_the_whole_split() -> None:
    mix = draw_mix(AugmentPolicy(mixup=1.0), np.arange(20_000), 0, 10)
    assert (np.abs(np.bincount(mix.index, minlength=10) / 20_000 - 0.1) < 0.01).all()
    assert len(np.unique(mix.view)) > 19_900
    other = draw_mix(AugmentPolicy(mixup=1.0), np.arange(20_000), 1, 10)
    assert (mix.index != other.index).mean() == pytest.approx(0.9, abs=0.02)


@settings(max_examples=40, deadline=None)
@given(
    mixup=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 10.0]),
    cutmix=st.sampled_from([1e-3, 0.5, 1.0, 10.0]),
    operations=st.integers(0, 8),
    magnitude=st.floats(0, 10),
    seed=st.integers(0, 2**31),
    view=st.integers(0, 2**31 - 1),
    count=st.integers(1, 9),
    side=st.integers(1, 9),
)
def test_whatever_is_drawn_is_an_image(
    mixup: float, cutmix: float, operations: int, magnitude: float, seed: int, view: int, count: int, side: int
) -> None:
    policy = MORE.model_copy(
        update={"mixup": mixup, "cutmix": cutmix, "operations": operations, "magnitude": magnitude, "erasing": 1.0}
    )
    images, labels = some_images(count, side=side), np.arange(count) % 3
    mix = draw_mix(policy, np.arange(count), view, count, seed)
    assert ((mix.index >= 0) & (mix.index < count)).all()
    assert ((mix.view >= 0) & (mix.view < 2**31)).all()
    mixed, share = mixed_views(policy, images, np.arange(count), view, seed)
    assert ((share >= 0) & (share <= 1)).all()
    assert mixed.shape == (count, 3, side, side)
    assert mixed.isfinite().all()
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    shares = mix_labels(labels, labels[mix.index], share, 3)
    assert torch.allclose(shares.sum(dim=1), torch.ones(count))
    assert (shares >= 0).all()


# --- views of images with label maps


def scenes(count: int = 4, height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 7, (count, height, width), generator=generator, dtype=torch.uint8)


def test_scene_without_augmentation_is_the_scene_itself() -> None:
    images, maps = scenes()
    views, labels = view_scenes(images, maps, np.arange(4), 0, POLICIES["none"], (12, 20))
    assert torch.equal(views, plain_images(images))
    assert torch.equal(labels, maps.long())


def test_labels_follow_their_pixels() -> None:
    """An image that shows its own labels as grey levels: after any warp both must tell the same."""
    maps = scenes(height=32, width=48)[1]
    maps = torch.nn.functional.interpolate(maps[:, None, :4, :6].float(), (32, 48)).to(torch.uint8)[:, 0]
    images = (maps * 30)[..., None].expand(-1, -1, -1, 3).contiguous()
    policy = AugmentPolicy(scale=(0.4, 1.5), rotation=15, flip=0.5, translate=0.1)
    views, labels = view_scenes(images, maps, np.arange(4), 5, policy, (24, 24))
    shown = views[:, 0] * 255 / 30
    inside = labels != 255
    near = (shown - labels).abs() < 0.25  # away from borders between classes bilinear and nearest coincide
    assert inside.float().mean() > 0.5
    assert near[inside].float().mean() > 0.7
    assert not views[~inside[:, None].expand(-1, 3, -1, -1)].any(), "what lies outside is black"


def test_crop_keeps_the_canvas_scale_and_lies_inside() -> None:
    images, maps = scenes(2, 64, 96)
    maps[:] = 3
    views, labels = view_scenes(images, maps, np.arange(2), 1, AugmentPolicy(), (32, 32))
    assert views.shape == (2, 3, 32, 32)
    assert (labels == 3).all(), "an unscaled crop does not leave the canvas"
    other = view_scenes(images, maps, np.arange(2), 2, AugmentPolicy(), (32, 32))[0]
    assert not torch.equal(views, other), "crops begin at other places in other views"


def test_scene_shown_smaller_is_surrounded_by_pixels_that_count_nowhere() -> None:
    images, maps = scenes(2, 32, 32)
    maps[:] = 3
    labels = view_scenes(images, maps, np.arange(2), 0, AugmentPolicy(scale=(4.0, 4.0)), (32, 32))[1]
    assert set(labels.unique().tolist()) == {3, 255}
    assert (labels == 3).float().mean() == pytest.approx(0.25, abs=0.03)


def test_scenes_draw_their_zoom_evenly_as_published_programs_do() -> None:
    """With a crop of the canvas' size, an image at zoom z < 1 covers z**2 of its view: 13.9 % of pixels are padding."""
    images, maps = (
        torch.full((1500, 16, 16, *more), level, dtype=torch.uint8) for more, level in (((3,), 200), ((), 3))
    )
    fill = (0.25, 0.5, 0.75)
    views, labels = view_scenes(images, maps, np.arange(1500), 0, POLICIES["scenes"], (16, 16), 0, fill)
    covered = (labels == 3).float().mean((1, 2))
    assert 1 - covered.mean() == pytest.approx(0.139, abs=0.015)
    assert (covered < 1).float().mean() == pytest.approx(1 / 3, abs=0.04)
    outside = (labels == 255)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(views[outside], torch.tensor(fill).view(1, 3, 1, 1).expand_as(views)[outside])
    older = view_scenes(images, maps, np.arange(1500), 0, FIRST_SCENES, (16, 16))[1]
    assert (older == 255).float().mean() == pytest.approx(0.438, abs=0.02)


def test_zoom_replaces_scale() -> None:
    with pytest.raises(ValidationError, match="zoom and scale both set the size of the crop"):
        AugmentPolicy(zoom=(0.5, 2.0), scale=(0.5, 1.0))


def test_scene_is_the_same_alone_and_in_a_batch() -> None:
    images, maps = scenes(4, 32, 40)
    policy = AugmentPolicy(scale=(0.4, 1.5), rotation=15, flip=0.5, brightness=0.2, contrast=0.2, erasing=0.5)
    views, labels = view_scenes(images, maps, np.arange(4), np.array([3, 1, 4, 1]), policy, (24, 32), seed=2)
    for place, view in enumerate((3, 1, 4, 1)):
        one, label = view_scenes(
            images[place : place + 1], maps[place : place + 1], np.array([place]), view, policy, (24, 32), seed=2
        )
        assert torch.equal(one[0], views[place])
        assert torch.equal(label[0], labels[place])
