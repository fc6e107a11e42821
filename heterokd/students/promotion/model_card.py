"""Model card of a version: description, test results, origin, limits."""

from __future__ import annotations

import html
import inspect
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.split import REST, Splits
from heterokd.errors import CacheError
from heterokd.formatting import package_version
from heterokd.method import summary as method_summary
from heterokd.methods import BASELINE
from heterokd.networks.bodies import published_licence
from heterokd.storage.teacher_card import TeacherCard
from heterokd.storage.workspace import Workspace
from heterokd.students.promotion.decision import Decision
from heterokd.students.registry import describe_student, taken_words
from heterokd.study.gain import Gain
from heterokd.study.ranked_config import RankedConfig
from heterokd.tasks import TASKS
from heterokd.teachers.cache.key import CacheKey

DESCRIPTION_LIMIT = 5000
"""Maximum number of characters of a version's description in MLflow's database."""
UNKNOWN = "unknown"
LIBRARIES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "mlflow")


@dataclass(frozen=True)
class Lineage:
    """Origin of a student, in addition to its recipe.

    Attributes:
        teacher: card of the teacher in the study's summary, if there is a card.
        config: the student's configuration, if it is a leader of its study.
        cache: id of the teacher's cache that it was trained from, or the reason why there is none.
        commit: git commit of the training; None outside of a checkout.
        weights: SHA-256 of the student's weights.
        scratch: mean of the study's best student without a teacher on val, if it has the teacher's metric.
        metric: metric of the study, of which the card shows the configuration's estimate.
        gain: gain of the configuration over the study's best student without a teacher.
    """

    teacher: TeacherCard | None
    config: RankedConfig | None
    cache: str
    commit: str | None
    weights: str
    scratch: float | None = None
    metric: str = ""
    gain: Gain | None = None


def model_card(
    decision: Decision, recipe: Recipe, splits: Splits, taken: tuple[int, int] | None, lineage: Lineage
) -> str:
    """Write the card in Markdown; `taken` is the only image size that the graph takes, None: any size."""
    parts = [
        _what(decision, recipe, splits, taken),
        _figures(decision, lineage),
        _method(recipe),
        _origins(recipe, lineage),
        _limits(recipe, splits, decision, lineage),
        _lineage(recipe, splits, decision, lineage),
        _environment(),
        f"## Recipe\n\n{_fenced(recipe.to_yaml(), 'yaml')}",
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Escape text for Markdown, which may contain HTML; a name's line breaks and control characters become blanks."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    marked = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain)
    return html.escape(marked, quote=False)


def _fenced(text: str, language: str) -> str:
    """Return text as a code block whose fence the text does not contain."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def shortened(card: str) -> str:
    """Shorten a card to `DESCRIPTION_LIMIT`: the first sections, and a line about the rest."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card
    rest = "\n\nThe other sections are in model_card.md, among the run's artifacts and in the study's folder.\n"
    shown = ""
    for section in re.split(r"(?=\n\n## )", card):
        if len(shown) + len(section) + len(rest) > DESCRIPTION_LIMIT:
            break
        shown += section
    return shown + rest


def cache_of(recipe: Recipe, splits: Splits, teacher_weights: str | None, root: Workspace) -> str:
    """Return the id of the cache that a recipe's training reads, or the reason why it reads none."""
    if not recipe.method_class.teacher_needs:
        return "none: the method reads no teacher"
    if not recipe.cache.enabled:
        return "none: cache.enabled is false, the teacher ran live"
    for file in sorted(root.caches.glob("*/key.json")):
        try:
            key = CacheKey.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, CacheError):
            continue  # damaged: `heterokd cache --verify` reports it
        here = (splits.fingerprint, recipe.training.seed, recipe.data.policy.hash, teacher_weights)
        if (key.data, key.seed, key.policy, key.teacher) == here:
            return key.id
    return "none is stored: the teacher ran live, or its cache was deleted"


def _what(decision: Decision, recipe: Recipe, splits: Splits, taken: tuple[int, int] | None) -> str:
    task = TASKS[recipe.task]
    size = f"of {taken_words(taken)}{task.size_words(recipe.data.view_size)}"
    names = ", ".join(map(escaped, splits.class_names[:20]))
    return (
        f"{escaped(describe_student(recipe, splits))}: trial {decision.trial} of study {decision.study}.\n\n"
        f"Input: RGB images in [0, 1], {size}; output: {task.output_words} "
        f"{names}{', ...' if splits.num_classes > 20 else ''}."
    )


def _figures(decision: Decision, lineage: Lineage) -> str:
    rows = "\n".join(f"| {' | '.join(row)} |" for row in decision.table())
    reason = decision.reason[0].upper() + decision.reason[1:]
    interval = ""
    if decision.test_low is not None and decision.test_high is not None:
        interval = f" (95 % interval {decision.test_low:.4f} to {decision.test_high:.4f})"
    lines = [
        "## Figures",
        "",
        f"Test {decision.score_name} {decision.test_score:.4f}{decision.classes}{interval} over "
        f"{decision.test_images} images. {reason}.",
    ]
    if decision.comparison is not None:
        lines += ["", str(decision.comparison)]
    if lineage.config is not None:
        lines += ["", f"On val, when this was written: {lineage.metric} {lineage.config.estimate}."]
    if lineage.gain is not None:
        lines[-1] += f" Gain over the study's best student without a teacher: {lineage.gain.verdict}."
    return "\n".join([*lines, "", "| gate | required | measured | passed |", "|---|---|---|---|", rows])


def _method(recipe: Recipe) -> str:
    method = recipe.method_class
    module = inspect.getmodule(method)
    text = inspect.cleandoc((module.__doc__ if module else None) or "")
    source = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if "http" in part]
    values = ", ".join(f"{key} {escaped(str(value))}" for key, value in recipe.params.items()) or "none"
    reference = escaped(source[0]) if source else "not from a paper; see the method's file."
    block = re.search(r"(?:^    .*\n?)+", text, re.M)
    equation = "" if block is None else f"\n\n{_fenced(inspect.cleandoc(block[0]), 'text')}"
    return (
        f"## Method\n\n`{recipe.method}`: {escaped(method_summary(method))}\n\nParameters: {values}.\n\n"
        f"Equation: {reference}{equation}"
    )


def _origins(recipe: Recipe, lineage: Lineage) -> str:
    teacher = recipe.teacher
    card = lineage.teacher
    score = "" if card is None else f", {card.metric} {card.val_score:.4f}{card.classes}"
    if teacher.ensemble:
        origin, licence = "the networks in its name, which answer together", f"{UNKNOWN} (see each network)"
    elif teacher.checkpoint is not None:
        fitted = "" if card is None or card.source == str(teacher.checkpoint) else f" ({card.source})"
        origin, licence = f"a given checkpoint{fitted}", f"{UNKNOWN} (the checkpoint does not state it)"
    elif teacher.pretrained:
        origin, licence = "timm's published weights", published_licence(teacher.network)
    else:
        start = "random weights" if teacher.start_from is None else f"the weights in {teacher.start_from}"
        origin, licence = f"fitted here from {start}", "the licence of the data below"
    student = "from random weights"
    if recipe.student.start_from is not None:
        student = f"from the weights in {recipe.student.start_from}"
    if recipe.student.pretrained:
        student = f"from timm's published weights (licence: {published_licence(recipe.student.network)})"
    dataset = recipe.data.dataset_class
    lines = [
        "## Teacher, student, data",
        "",
        f"- teacher: {escaped(teacher.network)}, {origin}{score}; licence: {licence}",
        f"- student: {escaped(recipe.student.network)}, {student}",
        f"- data: {recipe.data.dataset}, {escaped(method_summary(dataset).rstrip('.'))}; "
        f"licence: {escaped(dataset.licence)}",
    ]
    if recipe.method == BASELINE:
        lines[2] = f"- teacher: not used (the study's teacher is {escaped(teacher.network)})"
    elif card is not None:
        members = f"members on val: {', '.join(card.members)}" if card.members else ""
        about = "; ".join(filter(None, (card.reason, card.calibration(), members)))
        lines[3:3] = [f"- the teacher: {escaped(about)}"] if about else []
    return "\n".join(lines)


def _limits(recipe: Recipe, splits: Splits, decision: Decision, lineage: Lineage) -> str:
    unit = TASKS[recipe.task].unit
    lines = [
        "## Limits",
        "",
        f"- Trained on {len(splits.train)} images of {recipe.data.dataset}{_unlabelled(recipe, splits)}, tested on "
        f"{decision.test_images} of the same source; performance on images from other sources is unknown.",
        f"- It predicts one of {splits.num_classes} classes for every {unit}, also if none of them is correct.",
        "- Its probabilities are not calibrated, and no subgroup of images was evaluated separately.",
        "- The test interval covers the choice of test images, not the variance between training seeds.",
    ]
    if lineage.teacher is not None and recipe.method != BASELINE:
        lines += [f"- Its teacher: {problem}." for problem in lineage.teacher.problems()]
        scratch = lineage.scratch
        if scratch is not None and lineage.teacher.val_score < scratch:
            lines.append(
                f"- Its teacher reaches {lineage.teacher.val_score:.4f} on val, less than the student without a "
                f"teacher ({scratch:.4f})."
            )
    return "\n".join(lines)


def _unlabelled(recipe: Recipe, splits: Splits) -> str:
    if splits.unlabelled is None or not recipe.method_class.learns_unlabelled():
        return ""
    source = (
        "of its training images" if recipe.data.unlabelled == REST else f"below {escaped(str(recipe.data.unlabelled))}"
    )
    share = recipe.training.unlabelled_share
    return f" and {len(splits.unlabelled)} {source} without labels ({share:.0%} of each batch)"


def _lineage(recipe: Recipe, splits: Splits, decision: Decision, lineage: Lineage) -> str:
    rows = {
        "student's weights (SHA-256)": lineage.weights,
        "teacher's weights (SHA-256)": UNKNOWN if lineage.teacher is None else lineage.teacher.weights,
        "teacher's cache": lineage.cache,
        "data and split (SHA-256)": splits.fingerprint,
        "test images and labels (SHA-256)": decision.test_digest,
        "recipe": recipe.hash,
        "seed": str(recipe.training.seed),
        "git commit of the training": lineage.commit or f"{UNKNOWN} (not trained in a git checkout)",
    }
    return "## Lineage\n\n" + "\n".join(f"- {key}: {value}" for key, value in rows.items())


def _environment() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        "## Environment of the test\n\n"
        f"heterokd {package_version()}, Python {platform.python_version()}, {libraries}; "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processor(s)."
    )
