"""Distiller: student and method as a single trainable module, which DDP wraps. It does not hold the teacher.

A method's memories (`Method.memories`, hundreds of MiB in some methods) are part of its state, but DDP does not
broadcast them from rank 0: each rank builds them from the same seed and fills them itself. Another module that wraps a
method needs the same attribute, `_ddp_params_and_buffers_to_ignore`.
"""

from __future__ import annotations

from torch import Tensor, nn

from heterokd.method import Method
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal
from heterokd.training.task_modules import Task

AUXILIARY_STAGE = 3
"""Stage of the auxiliary head, as in PSPNet, CIRKD's program and mmsegmentation: the last but one."""


class AuxiliaryHead(nn.Module):
    """A classifier of pixels on a stage of the student, whose task loss trains the encoder directly.

    Args:
        spec: outputs of the student.
        weight: of its loss.

    Raises:
        PairError: the student gives no stages.
    """

    def __init__(self, spec: OutputSpec, weight: float) -> None:
        super().__init__()
        channels, self.weight = spec.at(AUXILIARY_STAGE).channels, weight
        width = max(8, channels // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(width, spec.num_classes, 1),
        )

    def forward(self, stages: tuple[Tensor, ...]) -> Tensor:
        """Compute logits [B, K, h, w] from the stages' maps."""
        logits: Tensor = self.layers(stages[AUXILIARY_STAGE - 1])
        return logits


class Distiller(nn.Module):
    """Distillation step: the student's forward, the task loss (added only here) and the method's terms.

    Args:
        student: network to train.
        method: distillation loss, with its projectors.
        task: task loss.
        task_weight: multiplier of the task loss; 0 for a method that does without it (`Method.uses_task_loss`).
        auxiliary: a head on a stage of the student, for the training alone.
    """

    def __init__(
        self,
        student: AnyNetwork,
        method: Method,
        task: Task,
        task_weight: float = 1.0,
        auxiliary: AuxiliaryHead | None = None,
    ) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.student = student
        self.method = method
        self.task = task
        self.task_weight = task_weight if method.uses_task_loss else 0.0
        # Read by DDP: names of parameters and buffers that it does not synchronise.
        self._ddp_params_and_buffers_to_ignore = [
            f"method.{memory}.{name}"
            for memory in method.memories
            for name, _ in method.get_submodule(memory).named_buffers()
        ]

    @property
    def teacher_needs(self) -> Signal:
        """Signals of the teacher that a step reads."""
        return self.method.teacher_needs

    def forward(self, batch: Batch, teacher: Outputs, progress: float) -> tuple[Tensor, Losses]:
        """Return the total loss and its named terms: `task`, `auxiliary` if there is such a head, and the method's."""
        stages = Signal.NONE if self.auxiliary is None else Signal.STAGES
        outputs = self.student(batch.images, self.method.student_needs | Signal.LOGITS | stages)
        losses: Losses = {"task": self.task_weight * self.task(outputs.logits, batch.labels, batch.weights)}
        if self.auxiliary is not None:
            losses["auxiliary"] = self.auxiliary.weight * self.task(self.auxiliary(outputs.stages), batch.labels)
        student = outputs.only(self.method.student_needs, "student")
        losses |= self.method.terms(student, teacher.only(self.method.teacher_needs, "teacher"), batch, progress)
        return sum(losses.values(), start=losses["task"].new_zeros(())), losses
