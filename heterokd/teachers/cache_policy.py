"""Decide which trainings read the teacher's outputs from a cache, and from which cache.

A cache belongs to a teacher, a data set and the views of a seed. All trials of a search have the same seed; all
configurations that a confirmation compares on a seed share its cache.

A cache stores the signals that the methods of a search read, and no others. The signals are part of its key. If a
complete cache of the same outputs with more signals exists, it is used, and none with fewer is built; if a search reads
more than a cache holds, another is built next to it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import lru_cache
from typing import Literal

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.config.services import CachingSettings
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import CacheError, PairError
from heterokd.networks.network import predict_spec
from heterokd.outputs import Signal, TaskName
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.build import MANIFEST
from heterokd.teachers.cache.cached_teacher import CacheAccess, CachedTeacher, open_or_build
from heterokd.teachers.cache.key import CacheKey, CacheSettings, make_key
from heterokd.teachers.cache.maintenance import repair_cache
from heterokd.teachers.cache.records import Verify, read_key
from heterokd.teachers.cache.shards import cache_bytes
from heterokd.training.task_modules import TASK_MODULES
from heterokd.training.teacher import LiveTeacher, Teacher

CacheUse = Literal["built", "shared", "found"]
"""How a training uses its cache: "built" completes it first; "shared" reads the shards that exist and runs the teacher
for the rest; "found" reads a complete cache, and otherwise runs the teacher."""

GIGABYTE = 10**9
CHECKED_BYTES = 2**31
"""Maximum size of a cache whose checksums are all verified before a search, which takes a second or two."""

logger = logging.getLogger(__name__)


def stored_signals(task: TaskName) -> Signal:
    """Return the signals that caches of a task hold."""
    return TASK_MODULES[task].cached_signals


def is_served(recipe: Recipe, splits: Splits, live: LiveTeacher) -> bool:
    """Return whether a cache can hold all signals that the recipe's method reads of its teacher.

    The tail comes from the loaded network. A method that reads nothing needs no cache.
    """
    return read_signals(recipe, splits, live) != Signal.NONE


def read_signals(recipe: Recipe, splits: Splits, live: LiveTeacher) -> Signal:
    """Return the signals that the recipe's method reads from a cache; none if it needs the running teacher."""
    size = recipe.data.image_size
    student = predict_spec(recipe.student.network, splits.num_classes, recipe.student.options, size)
    with torch.device("meta"):
        needs = recipe.method_class(recipe.method_params, student, live.spec).teacher_needs
    stored = stored_signals(recipe.task) & live.spec.serves
    return Signal.NONE if needs & ~(stored | Signal.TAIL) else needs & stored


def searched_signals(experiment: Experiment, splits: Splits, live: LiveTeacher) -> Signal:
    """Return the signals that the methods of an experiment read from a cache; methods that do not exist read none."""
    found, stored = Signal.NONE, stored_signals(experiment.data.task) & live.spec.serves
    for method in experiment.methods:
        with suppress(PairError):
            if read_signals(experiment.recipe(experiment.published(method)), splits, live):
                # Other parameters of the method may read more than its defaults.
                found |= experiment.method_class(method).teacher_needs & stored
    return found


def cache_key(
    recipe: Recipe, splits: Splits, live: LiveTeacher, root: Workspace, signals: Signal = Signal.NONE
) -> CacheKey:
    """Return the key of a recipe's cache.

    Args:
        recipe: the training.
        splits: its data set.
        live: its teacher.
        root: holds the caches; a complete cache with more signals is preferred to an incomplete one.
        signals: what the cache holds in addition to what the method reads.
    """
    wanted = read_signals(recipe, splits, live) | signals
    most = wanted | (stored_signals(recipe.task) & live.spec.serves)
    keys = [
        make_key(splits, cached_views(recipe), live.network, _settings(recipe, held))
        for held in dict.fromkeys((wanted, most))  # there are two signals, so that nothing lies between
    ]
    complete = [key for key in keys if root.cache_folder.at(key.id).exists(MANIFEST)]
    return (complete or keys)[0]


def cached_views(recipe: Recipe) -> ViewSpec:
    """Return the views of the training images that a recipe's cache holds."""
    views = recipe.views or recipe.training.epochs
    size = None if recipe.teacher_size == recipe.data.image_size else recipe.teacher_size
    data = recipe.data
    return ViewSpec(data.policy, recipe.training.seed, views, data.view_crop, size, data.fill)


def is_small_enough(recipe: Recipe, key: CacheKey) -> bool:
    """Return whether a recipe's cache fits into `cache.max_gb`."""
    return cache_bytes(key) <= recipe.cache.max_gb * GIGABYTE


# One parameter for each thing that decides where outputs come from.
def training_teacher(
    recipe: Recipe,
    splits: Splits,
    live: LiveTeacher,
    root: Workspace,
    device: torch.device | str,
    use: CacheUse,
    signals: Signal = Signal.NONE,
) -> Teacher:
    """Return the teacher of a training: a cache where it serves the method, else the live network.

    `signals` are what other trainings read from the same cache. In fp32 on a CPU both are bit-equal if the batch size
    is a multiple of 16, see `heterokd.teachers.cache.compute`.

    Raises:
        CacheError: the cache is damaged, or of something else.
    """
    if not recipe.cache.enabled or not is_served(recipe, splits, live):
        return live
    key = cache_key(recipe, splits, live, root, signals)
    is_complete = root.cache_folder.at(key.id).exists(MANIFEST)
    if not is_complete and use == "built" and is_small_enough(recipe, key):
        try:
            return open_cache(recipe, splits, live, root, device, build=True, signals=signals)
        except CacheError as error:
            logger.warning("the teacher's cache is incomplete (%s); the teacher runs for missing views", error)
    # Rounding is part of the recipe: outputs that are not stored are computed and rounded as records are.
    is_rounded = recipe.cache != CachingSettings(views=recipe.cache.views, max_gb=recipe.cache.max_gb)
    if is_complete or is_rounded or (use == "shared" and is_small_enough(recipe, key)):
        try:
            return open_cache(recipe, splits, live, root, device, build=False, signals=signals)
        except CacheError as error:
            _repair(root, key, error)
            return open_cache(recipe, splits, live, root, device, build=False, signals=signals)
    return live


def check_cache(recipe: Recipe, splits: Splits, live: LiveTeacher, root: Workspace, key: CacheKey) -> None:
    """Verify a recipe's cache: all checksums of a small cache, a sample of the checksums of a larger cache.

    Raises:
        CacheError: the cache is damaged, or of something else.
    """
    folder = root.cache_folder.at(key.id)
    if folder.exists(MANIFEST):
        verify: Verify = "full" if cache_bytes(key) <= CHECKED_BYTES else "sample"
        access = CacheAccess("complete", verify=verify, copies=root.caches)
        settings = _settings(recipe, key.serves)
        open_or_build(root.cache_folder, splits, cached_views(recipe), live, settings, access)
    elif folder.exists("key.json"):
        read_key(folder)


def mended_cache(
    recipe: Recipe, splits: Splits, live: LiveTeacher, root: Workspace, signals: Signal = Signal.NONE
) -> CacheKey:
    """Verify a recipe's cache as `check_cache` does, and delete damaged files, so that they are computed again.

    See `cache_key` for `signals`.

    Raises:
        CacheError: the cache is of something else.
    """
    key = cache_key(recipe, splits, live, root, signals)
    try:
        check_cache(recipe, splits, live, root, key)
    except CacheError as error:
        _repair(root, key, error)
        check_cache(recipe, splits, live, root, key)
    return key


def _repair(root: Workspace, key: CacheKey, error: CacheError) -> None:
    """Repair a cache; raise the error that it was opened with if it has no damaged files."""
    repaired = repair_cache(root.cache_folder.at(key.id), key)
    if not repaired:
        raise error
    logger.warning("%s (%d files of the cache are computed again)", error, len(repaired))


# One parameter for each thing that decides where outputs come from.
def open_cache(
    recipe: Recipe,
    splits: Splits,
    live: LiveTeacher,
    root: Workspace,
    device: torch.device | str,
    *,
    build: bool,
    signals: Signal = Signal.NONE,
) -> CachedTeacher:
    """Open the cached teacher of a recipe, once per process; see `cache_key` for `signals`.

    With `build`, complete the cache first, together with other processes that build it.

    Raises:
        CacheError: the cache is damaged, of something else, or too large for the disk.
    """
    views = cached_views(recipe)
    settings = _settings(recipe, cache_key(recipe, splits, live, root, signals).serves)
    if not build:
        return _opened(root, splits, views, live, settings, str(device))
    access = CacheAccess("build", device, copies=root.caches)
    return open_or_build(root.cache_folder, splits, views, live, settings, access)


@lru_cache(maxsize=8)
def _opened(
    root: Workspace, splits: Splits, views: ViewSpec, live: LiveTeacher, settings: CacheSettings, device: str
) -> CachedTeacher:
    access = CacheAccess("partial", device, copies=root.caches)
    return open_or_build(root.cache_folder, splits, views, live, settings, access)


def _settings(recipe: Recipe, signals: Signal) -> CacheSettings:
    # Without logits there is nothing to keep the largest of.
    top_k = recipe.cache.top_k if Signal.LOGITS in signals else None
    return CacheSettings(signals, recipe.cache.dtype, top_k, precision=recipe.cache.precision)
