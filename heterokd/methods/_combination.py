"""Combinations: the terms of two methods in a training, `dist+crd`.

    L = task loss + L_first + second_weight * L_second

Each member keeps its parameters, domains and defaults, named `MEMBER_PARAMETER` (`crd_temperature`); the domain of
`second_weight` is added. The order of the members matters only for this weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, create_model, model_validator
from pydantic.fields import FieldInfo
from torch import Tensor

from heterokd.domains import Float, Scalar
from heterokd.errors import PairError
from heterokd.method import Method, MethodFigure, MethodParams
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec

SECOND_WEIGHT = "second_weight"


class Combination(Method):
    """Sum the terms of two methods.

    Attributes:
        members: names and classes of the two methods.
    """

    members: ClassVar[tuple[tuple[str, type[Method]], tuple[str, type[Method]]]]

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build both methods; PairError names the member that cannot exist for the pair."""
        built = []
        for name, kind in self.members:
            try:
                built.append(kind(_params_of(self.params, name, kind), student, teacher))
            except PairError as error:
                raise PairError(f"{name}: {error}") from error
        self.first, self.second = built
        self.student_needs = self.first.student_needs | self.second.student_needs
        self.teacher_needs = self.first.teacher_needs | self.second.teacher_needs
        self.uses_task_loss = self.first.uses_task_loss and self.second.uses_task_loss

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms of both methods; a term of the second has its method's name in front if both have it."""
        losses = dict(self.first.terms(student, teacher, batch, progress))
        weight = float(getattr(self.params, SECOND_WEIGHT))
        for term, value in self.second.terms(student, teacher, batch, progress).items():
            losses[f"{self.members[1][0]}_{term}" if term in losses else term] = weight * value
        return losses

    @classmethod
    def gather_settings(cls) -> dict[str, Scalar]:
        """Return the settings of both members."""
        return {f"{name}_{key}": value for name, kind in cls.members for key, value in kind.gather_settings().items()}

    def figure(self, student: Outputs, teacher: Outputs, labels: Tensor) -> MethodFigure | None:
        """Return the figure of the first member that has any."""
        return next((method.figure(student, teacher, labels) for method in self._members() if method.has_figure), None)

    def _members(self) -> tuple[Method, Method]:
        return self.first, self.second


def combine(name: str, first: tuple[str, type[Method]], second: tuple[str, type[Method]]) -> type[Method]:
    """Make the class of a combination.

    Args:
        name: of the combination.
        first: name and class of the first method.
        second: name and class of the second method, whose terms are multiplied by `second_weight`.
    """
    members = (first, second)
    fields: dict[str, Any] = {}
    for member, kind in members:
        for key, field in kind.Params.model_fields.items():
            fields[f"{member}_{key}"] = (field.annotation, _copy_of(field))
    fields[SECOND_WEIGHT] = (
        Annotated[float, Float(0.1, 10, log=True)],
        Field(1.0, ge=0, description=f"multiplies the terms of {second[0]}"),
    )

    def unread(self: MethodParams) -> frozenset[str]:
        return frozenset(f"{name}_{key}" for name, kind in members for key in _params_of(self, name, kind).unread)

    validators: dict[str, Any] = {"members": model_validator(mode="after")(_members_are_valid(members))}
    params = create_model(
        "Params",
        __base__=MethodParams,
        __doc__=f"Parameters of {name}.",
        __validators__=validators,
        **fields,
    )
    params.unread = property(unread)  # type: ignore[method-assign,assignment]
    content = {
        "__doc__": f"Sum the terms of {first[0]} and {second[0]}.",
        "__module__": __name__,
        "Params": params,
        "members": members,
        "student_needs": first[1].student_needs | second[1].student_needs,
        "teacher_needs": first[1].teacher_needs | second[1].teacher_needs,
        "tasks": first[1].tasks & second[1].tasks,
        "memories": tuple(
            f"{place}.{memory}"
            for place, (_, kind) in zip(("first", "second"), members, strict=True)
            for memory in kind.memories
        ),
        "has_figure": any(kind.has_figure for _, kind in members),
        "uses_task_loss": all(kind.uses_task_loss for _, kind in members),
        "reads_labels": first[1].reads_labels if first[1].reads_labels == second[1].reads_labels else "some",
    }
    return cast(type[Method], type("".join(part.title() for part in name.split("+")), (Combination,), content))


def _copy_of(field: FieldInfo) -> FieldInfo:
    """Copy a field, since `create_model` completes the fields that it is given."""
    return FieldInfo.merge_field_infos(field)


def _members_are_valid(members: tuple[tuple[str, type[Method]], ...]) -> Callable[[MethodParams], MethodParams]:
    """Return a validator that checks each member's rules on several of its parameters."""

    def check(params: MethodParams) -> MethodParams:
        for name, kind in members:
            _params_of(params, name, kind)
        return params

    return check


def _params_of(params: MethodParams, name: str, kind: type[Method]) -> MethodParams:
    return kind.Params.model_validate({key: getattr(params, f"{name}_{key}") for key in kind.Params.model_fields})
