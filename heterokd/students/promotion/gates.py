"""Gates of a promotion in addition to the gain: costs, parity with the trained student, export to ONNX, rollback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from heterokd.config.costs import COSTS, LATENCY
from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.config.services import PromotionSettings
from heterokd.datasets.io.draws import check_class_names
from heterokd.datasets.io.loaders import open_test
from heterokd.datasets.io.split import Splits
from heterokd.errors import CostError, NetworkError
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.networks.onnx_graph import runtime_fault
from heterokd.networks.student_cost import StudentCost
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.students.export.accuracy import Accuracy
from heterokd.students.export.export import try_export, try_int8
from heterokd.students.export.parity import Parity
from heterokd.students.promotion.aliases import rolled_back_tag
from heterokd.students.promotion.challenger import Candidate
from heterokd.students.promotion.decision import Gate
from heterokd.students.promotion.served import ServingModel
from heterokd.tracking.runs import StudyRuns
from heterokd.training.meters import upsample
from heterokd.training.paired_tests import ImageConfusions, ImageResults
from heterokd.training.student import open_student

PARITY = 1e-4
"""Maximum difference between logits of the registered model and of the trained student."""
PARITY_IMAGES = 8

Int8 = Callable[[AnyNetwork, Splits, Recipe], Accuracy]
"""Function that measures what a student loses in 8 bits; see `try_int8`."""

Export = Callable[[AnyNetwork, Splits, tuple[int, int], str], Parity]
"""Function that exports a student to a format and compares the file with it; see `try_export`."""


def cost_gates(candidate: Candidate, experiment: Experiment, num_classes: int) -> Iterator[Gate]:
    """Compare the candidate's costs with the limits: measured here as by the search, or from the search's table."""
    search, settings = experiment.search, experiment.promotion
    limits = {name: limit for name, (_, limit) in settings.cost_limits.items()}
    size = candidate.recipe.data.view_size
    for name in dict.fromkeys(("params_m", "latency_ms", *limits)):
        cost, limit = STUDENT_COSTS[name](search.runtime), limits.get(name)
        try:
            value = _cost(cost, candidate, search.listed_costs(name), num_classes)
        except CostError as error:
            yield replace(_limited(cost.label(), limit, math.inf, str(error)), measured=None)
            continue
        yield _limited(cost.label(), limit, value, search.cost_conditions(name, size))
    state = [*candidate.model.parameters(), *candidate.model.buffers()]
    size_mb = sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e6
    yield _limited("weights in MB", settings.max_size_mb, size_mb)


def _cost(cost: StudentCost, candidate: Candidate, listed: Mapping[str, float], num_classes: int) -> float:
    """Return a cost of the model that would be served, or, in other runtimes than torch on the CPU, of the network.

    Raises:
        CostError: it cannot be measured, or the table does not list the student.
    """
    size, network, runtime = candidate.recipe.data.view_size, candidate.recipe.student.network, cost.timed_in
    if listed:
        if network not in listed:
            raise CostError(f"{COSTS} has no value for {network}")
        return listed[network]
    if not cost.is_timed or (runtime.name, runtime.device) == ("torch", "cpu"):
        return cost.measure(candidate.model, size)
    if fault := runtime_fault(runtime):
        raise CostError(f"{LATENCY}.{fault[0]} {fault[1]}")
    if not candidate.trial.weights.exists():
        raise CostError("the trial's weights are missing")
    student = open_student(candidate.recipe, candidate.trial.weights, num_classes)
    return cost.measure(deployable(student), size)


def _limited(name: str, limit: float | None, measured: float, note: str = "") -> Gate:
    passed = None if limit is None else measured <= limit
    return Gate(name, "-" if limit is None else f"<= {limit:g}", measured, passed, note)


def recall_gates(results: ImageResults, class_names: tuple[str, ...], settings: PromotionSettings) -> Iterator[Gate]:
    """Compare the recall of classes on test with `promotion.min_recall`.

    Raises:
        DataError: the data set has no such class.
    """
    check_class_names(settings.min_recall, class_names, "promotion.min_recall")
    for name, least in settings.min_recall.items():
        correct, count = results.found(class_names.index(name))
        gate = Gate(f"recall of {name} on test", f">= {least:g}", None, passed=False, note="test has none of it")
        if count:
            recall = correct / count
            gate = replace(gate, measured=recall, passed=recall >= least, note=f"{correct} of {count}")
        yield gate


def iou_gates(results: ImageResults, class_names: tuple[str, ...], settings: PromotionSettings) -> Iterator[Gate]:
    """Yield the number of classes in the mean of mIoU on test, and compare classes with `promotion.min_iou`.

    Raises:
        DataError: the data set has no such class.
    """
    check_class_names(settings.min_iou, class_names, "promotion.min_iou")
    if isinstance(results, ImageConfusions):
        yield Gate("classes in the mean of mIoU on test", "-", results.classes, None)
    for name, least in settings.min_iou.items():
        assert isinstance(results, ImageConfusions)  # of segmentation, see `Experiment`
        number = class_names.index(name)
        gate = Gate(f"IoU of {name} on test", f">= {least:g}", None, passed=False, note="test has none of it")
        if results.found(number)[1]:
            iou = results.iou(number)
            gate = replace(gate, measured=iou, passed=iou >= least, note="")
        yield gate


def parity_gate(candidate: Candidate, splits: Splits) -> Gate:
    """Compare the model that would be served with the trained student."""
    name, required = "largest difference of a logit", f"<= {PARITY:g}"
    if not candidate.trial.weights.exists():
        return Gate(name, required, None, None, "the trial's weights are missing")
    student = open_student(candidate.recipe, candidate.trial.weights, splits.num_classes)
    images = next(iter(open_test(splits))).images[:PARITY_IMAGES]
    if isinstance(candidate.model, ServingModel) and candidate.model.size is not None:
        # Cropped or padded to a single window: the student processes a larger image as a whole, the graph by windows.
        height, width = candidate.model.size
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
    with torch.inference_mode():
        trained, served = student(images).logits, candidate.model(images)
        if trained.dim() == 4:
            trained = upsample(trained, served.shape[-2:])
        difference = float((trained - served).abs().max())
    return Gate(name, required, difference, difference <= PARITY, "registered model against trained student")


def export_gate(candidate: Candidate, settings: PromotionSettings, splits: Splits, export: Export = try_export) -> Gate:
    """Export the student to ONNX and compare the file with it."""
    name = "largest difference of a logit after export to ONNX"
    if not settings.export_parity:
        return Gate(name, "-", None, None)
    if not candidate.trial.weights.exists():
        return Gate(name, "to agree", None, passed=False, note="the trial's weights are missing")
    student = open_student(candidate.recipe, candidate.trial.weights, splits.num_classes)
    try:
        parity = export(student, splits, candidate.recipe.data.view_size, "onnx")
    except NetworkError as error:
        return Gate(name, "to agree", None, passed=False, note=str(error))
    note = "images of val, batch 1 and 5, ONNX Runtime"
    return Gate(name, f"<= {parity.tolerance:.3g}", parity.difference, parity.agrees, note)


def int8_gates(
    candidate: Candidate, settings: PromotionSettings, splits: Splits, measure: Int8 = try_int8
) -> Iterator[Gate]:
    """Quantize the student and compare what it loses on val with `promotion.max_int8_drop`, if that is set."""
    if settings.max_int8_drop is None:
        return
    name, required = "loss on val in 8 bits", f"<= {settings.max_int8_drop:g}"
    if not candidate.trial.weights.exists():
        yield Gate(name, required, None, passed=False, note="the trial's weights are missing")
        return
    student = open_student(candidate.recipe, candidate.trial.weights, splits.num_classes)
    try:
        found = measure(student, splits, candidate.recipe)
    except NetworkError as error:
        yield Gate(name, required, None, passed=False, note=str(error))
        return
    note = f"{found.metric} {found.file:.4f}, in 32 bits {found.student:.4f}; static quantization of ONNX Runtime"
    yield Gate(name, required, found.drop, found.drop <= settings.max_int8_drop, note)


def rollback_gates(runs: StudyRuns, candidate: Candidate, alias: str) -> Iterator[Gate]:
    """Refuse a version that was rolled back before."""
    if candidate.version is None:
        return
    tag = rolled_back_tag(alias)
    version = runs.client.get_model_version(runs.experiment.registered_model, candidate.version)
    if (when := version.tags.get(tag)) is not None:
        note = f"version {candidate.version} was rolled back at {when}; delete its tag {tag!r} to allow it again"
        yield Gate("rolled back", "never", None, passed=False, note=note)
