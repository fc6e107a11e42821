"""Decision: the result of a promotion, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from heterokd.formatting import format_classes, metric_name
from heterokd.storage.typed_json import parse
from heterokd.training.paired_tests import PairedTest


@dataclass(frozen=True)
class Gate:
    """A condition of a promotion.

    Attributes:
        name: measured quantity, with its unit.
        required: bound, or `-`.
        measured: value; None if it was not measured.
        passed: whether the gate is passed; None if it was not checked, which does not prevent the promotion.
        note: reason, conditions or opponent.
    """

    name: str
    required: str
    measured: float | None
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PairedComparison(PairedTest):
    """Paired test of the challenger and its opponent on the test images.

    Attributes:
        against: name of the opponent.
    """

    against: str

    def __str__(self) -> str:
        alone = "" if self.wins is None else f"right alone {self.wins}, wrong alone {self.losses}; "
        return (
            f"Gain over {self.against}: {self.gain:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f}; "
            f"{alone}{self.test} p = {self.p_value:.3g})."
        )


@dataclass(frozen=True)
class Decision:
    """The result of a promotion.

    Attributes:
        study: name of the study.
        model: name of the registered model.
        alias: alias that the promotion moves.
        promoted: whether every gate is passed (in a dry run: whether it would be promoted).
        changed: whether this call moved the alias.
        reason: summary in a sentence.
        trial: number of the challenger's trial.
        method: method of that trial.
        challenger: version of the challenger; None in a dry run if it is not registered.
        champion: version that had the alias before.
        metric: score as in metric keys: top1 or miou.
        test_score: score of the challenger.
        test_images: number of test images.
        test_digest: SHA-256 of the test images and labels.
        comparison: comparison with the champion, or with the scratch baseline if there is no champion.
        gates: all conditions.
        test_low: lower end of the 95 % interval of the score; None in older decisions, without an interval.
        test_high: upper end.
        champion_student: version, trial and method of the champion.
        unfinished: whether the study was not finished.
        iou_classes: number of classes in the mean of mIoU on test; None for other scores and in older decisions.
    """

    study: str
    model: str
    alias: str
    promoted: bool
    changed: bool
    reason: str
    trial: int
    method: str
    challenger: str | None
    champion: str | None
    metric: str
    test_score: float
    test_images: int
    test_digest: str
    comparison: PairedComparison | None
    gates: tuple[Gate, ...]
    test_low: float | None = None
    test_high: float | None = None
    champion_student: str = ""
    unfinished: bool = False
    iou_classes: int | None = None

    @property
    def classes(self) -> str:
        """` (11 classes)` if the score is an mIoU of so many classes."""
        return format_classes(() if self.iou_classes is None else (self.iou_classes,))

    @property
    def score_name(self) -> str:
        """Name of the score: top-1 or mIoU."""
        return metric_name(self.metric)

    def to_json(self) -> str:
        """Format as a JSON object in a line."""
        return json.dumps(self.content())

    def content(self) -> dict[str, object]:
        """Return the values as JSON; the last three only if they are not empty."""
        content = asdict(self)
        optional = ("champion_student", "unfinished", "iou_classes")
        return {key: value for key, value in content.items() if value or key not in optional}

    @property
    def subject(self) -> str:
        """What was judged: trial, method and version of the challenger and of the champion."""
        version = "not registered" if self.challenger is None else f"version {self.challenger} of {self.model}"
        state = ", which is not finished" if self.unfinished else ""
        champion = self.champion_student or ("none" if self.champion is None else f"version {self.champion}")
        return (
            f"{version}: trial {self.trial}, {self.method} (study {self.study}{state}); {self.alias} before: {champion}"
        )

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """Parse the text of `to_json`."""
        return parse(cls, json.loads(text))

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return rows (gate, required, measured, passed) of text."""
        words = {True: "yes", False: "no", None: "not checked"}
        return [
            (
                f"{gate.name} ({gate.note})" if gate.note else gate.name,
                gate.required,
                "-" if gate.measured is None else f"{gate.measured:.4g}",
                words[gate.passed],
            )
            for gate in self.gates
        ]


def reason(
    failed: Sequence[Gate], comparison: PairedComparison | None, metric: str, score: float, *, dry_run: bool = False
) -> str:
    """Summarise the decision in a sentence."""
    refused, promoted = ("would be refused", "would be promoted") if dry_run else ("refused", "promoted")
    if failed:
        causes = [
            f"{gate.name}: {gate.note}"
            if gate.measured is None
            else f"{gate.name} is {gate.measured:.4g}, required {gate.required}"
            for gate in failed
        ]
        return f"{refused}: " + "; ".join(causes)
    name = metric_name(metric)
    if comparison is None:
        return (
            f"{promoted} with {score:.4f} {name} on test, without a comparison: there is no champion, and the study "
            "has no scratch trial"
        )
    return f"{promoted}: {score:.4f} {name} on test against {comparison.score:.4f} of {comparison.against}"
