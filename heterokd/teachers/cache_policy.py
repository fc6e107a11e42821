"""Which trainings read the teacher's outputs from a cache, and which cache that is.

A cache belongs to a teacher, a data set and the views of one seed. The trials of a search share a seed, and each seed
of a confirmation is shared by the leaders that are compared on it.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal

import torch

from heterokd.config.recipe import Recipe
from heterokd.config.services import CachingSettings
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.errors import CacheError
from heterokd.networks.network import predict_spec
from heterokd.outputs import Signal
from heterokd.storage.workspace import Workspace
from heterokd.tasks import TaskName
from heterokd.teachers.cache.build import Progress
from heterokd.teachers.cache.cached_teacher import CachedTeacher, CacheSettings, open_or_build
from heterokd.teachers.cache.key import CacheKey, make_key
from heterokd.teachers.cache.records import Verify, read_key
from heterokd.teachers.cache.shards import cache_bytes
from heterokd.training.task_modules import TASK_MODULES
from heterokd.training.teacher import LiveTeacher, Teacher

CacheUse = Literal["built", "shared", "found"]
"""What a training does about its cache: complete it first; read what others have built so far, and run the teacher for
the rest; read it if it is complete, and otherwise run the teacher."""

GIGABYTE = 10**9
CHECKED_BYTES = 2**31
"""A cache of at most this size is read as a whole before a search, which takes a second or two."""

logger = logging.getLogger(__name__)


def stored_signals(task: TaskName) -> Signal:
    """What caches of a task hold."""
    return TASK_MODULES[task].cached_signals


def is_served(recipe: Recipe, splits: Splits, live: LiveTeacher) -> bool:
    """Whether a cache holds all that the recipe's method reads of its teacher.

    What is not stored, the loaded network gives: its tail. A method that reads nothing needs no cache.
    """
    size = recipe.data.image_size
    student = predict_spec(recipe.student.network, splits.num_classes, recipe.student.options, size)
    with torch.device("meta"):
        needs = recipe.method_class(recipe.method_params, student, live.spec).teacher_needs
    stored = stored_signals(recipe.task)
    return bool(needs & stored) and not needs & ~(stored | Signal.TAIL)


def cache_key(recipe: Recipe, splits: Splits, live: LiveTeacher) -> CacheKey:
    """The name and the shape of a recipe's cache."""
    settings = _settings(recipe)
    return make_key(
        splits,
        recipe.data.policy,
        recipe.training.seed,
        recipe.views or recipe.training.epochs,
        live.network,
        signals=settings.signals,
        dtype=settings.dtype,
        top_k=settings.top_k,
        crop=recipe.data.view_crop,
    )


def is_small_enough(recipe: Recipe, key: CacheKey) -> bool:
    """Whether a recipe's cache keeps within `cache.max_gb`."""
    return cache_bytes(key) <= recipe.cache.max_gb * GIGABYTE


def training_teacher(
    recipe: Recipe, splits: Splits, live: LiveTeacher, root: Workspace, device: torch.device | str, use: CacheUse
) -> Teacher:
    """Who answers for the teacher in one training: a cache where it can, the network itself elsewhere.

    In fp32 on a CPU both give the same numbers to the last bit where the batch is a multiple of 16, see
    `heterokd.teachers.cache.compute`.

    Args:
        recipe: the training.
        splits: its data.
        live: its teacher's network.
        root: caches lie under `caches/`.
        device: where to train.
        use: see `CacheUse`.

    Raises:
        CacheError: the cache is damaged, or of something else.
    """
    if not recipe.cache.enabled or not is_served(recipe, splits, live):
        return live
    key = cache_key(recipe, splits, live)
    complete = root.cache_folder.at(key.id).exists("manifest.json")
    if not complete and use == "built" and is_small_enough(recipe, key):
        try:
            return open_cache(recipe, splits, live, root, device, build=True)
        except CacheError as error:
            logger.warning("the teacher's cache is not complete (%s): the teacher runs for what is missing", error)
            use = "found"
    if not complete and (use == "found" or not is_small_enough(recipe, key)):
        if recipe.cache != CachingSettings(views=recipe.cache.views, max_gb=recipe.cache.max_gb):
            # Rounded outputs are part of the recipe: what is not stored is computed and rounded as if it had been.
            return open_cache(recipe, splits, live, root, device, build=False)
        return live
    return open_cache(recipe, splits, live, root, device, build=False)


def check_cache(recipe: Recipe, splits: Splits, live: LiveTeacher, root: Workspace) -> None:
    """Audit what is there of a recipe's cache: all of a small one's checksums, some of a larger one's.

    Raises:
        CacheError: it is damaged, or of something else.
    """
    key = cache_key(recipe, splits, live)
    folder = root.cache_folder.at(key.id)
    if folder.exists("manifest.json"):
        verify: Verify = "full" if cache_bytes(key) <= CHECKED_BYTES else "sample"
        seed, views, crop = recipe.training.seed, recipe.views or recipe.training.epochs, recipe.data.view_crop
        settings = _settings(recipe)
        open_or_build(
            root.cache_folder,
            splits,
            recipe.data.policy,
            seed,
            views,
            live,
            settings,
            build=False,
            crop=crop,
            verify=verify,
            copies=root.caches,
        )
    elif folder.exists("key.json"):
        read_key(folder)


def open_cache(
    recipe: Recipe,
    splits: Splits,
    live: LiveTeacher,
    root: Workspace,
    device: torch.device | str,
    *,
    build: bool,
    progress: Progress | None = None,
) -> CachedTeacher:
    """The teacher of a recipe, read from its cache; opened and audited once per process.

    Args:
        recipe: the training.
        splits: its data.
        live: its teacher's network.
        root: caches lie under `caches/`.
        device: where the teacher runs.
        build: complete the cache first, together with whoever else is at it.
        progress: told after each shard that is built.

    Raises:
        CacheError: damaged, of something else, or too large for the disk.
    """
    seed, views = recipe.training.seed, recipe.views or recipe.training.epochs
    asked = (splits, recipe.data.policy, seed, views, live, _settings(recipe))
    if not build:
        return _opened(root, *asked, recipe.data.view_crop, str(device))
    return open_or_build(
        root.cache_folder,
        *asked,
        build=True,
        crop=recipe.data.view_crop,
        device=device,
        copies=root.caches,
        progress=progress,
    )


@lru_cache(maxsize=8)
def _opened(
    root: Workspace,
    splits: Splits,
    policy: AugmentPolicy,
    seed: int,
    views: int,
    live: LiveTeacher,
    settings: CacheSettings,
    crop: tuple[int, int] | None,
    device: str,
) -> CachedTeacher:
    return open_or_build(
        root.cache_folder,
        splits,
        policy,
        seed,
        views,
        live,
        settings,
        build=False,
        partial=True,
        crop=crop,
        device=device,
        copies=root.caches,
    )


def _settings(recipe: Recipe) -> CacheSettings:
    return CacheSettings(stored_signals(recipe.task), recipe.cache.dtype, recipe.cache.top_k)
