"""Decision: the result of a promotion, as text, as JSON and for the registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from heterokd.formatting import metric_name


@dataclass(frozen=True)
class Gate:
    """A condition of a promotion.

    Attributes:
        name: what is measured, with its unit.
        required: the bound, or `-`.
        measured: the value; None if it was not measured.
        passed: None if it was not checked, which does not prevent the promotion.
        note: reason, conditions or opponent.
    """

    name: str
    required: str
    measured: float | None
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class PairedComparison:
    """Two students on the same test images.

    Attributes:
        against: names the opponent.
        score: of the opponent.
        gain: score of the challenger minus that.
        low: lower end of the gain's 95 % interval.
        high: upper end.
        test: name of the paired test; the interval is Wald's for paired proportions with McNemar's test, and the
            percentiles of the resampled gains with the bootstrap.
        p_value: of the test, two-sided.
        wins: images that only the challenger gets right; None in segmentation, where an image is right in part.
        losses: images that only the opponent gets right; None in segmentation.
    """

    against: str
    score: float
    gain: float
    low: float
    high: float
    test: str
    p_value: float
    wins: int | None = None
    losses: int | None = None

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
        study: its name.
        model: the registered model.
        alias: that is moved.
        promoted: whether every gate is passed (in a dry run: whether it would be promoted).
        changed: whether this call moved the alias.
        reason: a sentence.
        trial: number of the challenger's trial.
        method: that made it.
        challenger: its version; None in a dry run if it is not registered.
        champion: version that held the alias before.
        metric: what the score is, as in metric keys: top1 or miou.
        test_score: of the challenger.
        test_images: how many.
        test_digest: SHA-256 of the test images and labels.
        comparison: with the champion, or with the scratch baseline when there is no champion.
        gates: all conditions.
        test_low: lower end of the 95 % interval of the score; None in decisions of before it was measured.
        test_high: upper end.
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

    @property
    def score_name(self) -> str:
        """Name of the score: top-1 or mIoU."""
        return metric_name(self.metric)

    def to_json(self) -> str:
        """Format as a JSON object on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """Parse what `to_json` wrote."""
        content = json.loads(text)
        comparison = content.pop("comparison")
        gates = tuple(Gate(**gate) for gate in content.pop("gates"))
        return cls(**content, comparison=PairedComparison(**comparison) if comparison else None, gates=gates)

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (gate, required, measured, passed) of text."""
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
            f"{promoted} with {score:.4f} {name} on test; there is no champion and the study has no scratch trial, "
            "so nothing was compared"
        )
    return f"{promoted}: {score:.4f} {name} on test against {comparison.score:.4f} of {comparison.against}"
