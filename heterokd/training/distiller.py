"""Distiller: student and method as a single trainable module, which DDP wraps. It does not hold the teacher.

A method's memories (`Method.memories`, hundreds of MiB in some methods) are part of its state, but DDP does not
broadcast them from rank 0: each rank builds them from the same seed and fills them itself. Another module that wraps a
method needs the same attribute, `_ddp_params_and_buffers_to_ignore`.
"""

from __future__ import annotations

from torch import Tensor, nn

from heterokd.method import Method
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch, Losses, Outputs, Signal
from heterokd.training.task_modules import Task


class Distiller(nn.Module):
    """Distillation step: the student's forward, the task loss (added only here) and the method's terms.

    Args:
        student: network to train.
        method: distillation loss, with its projectors.
        task: task loss.
        task_weight: multiplier of the task loss; 0 for a method that does without it (`Method.uses_task_loss`).
    """

    def __init__(self, student: AnyNetwork, method: Method, task: Task, task_weight: float = 1.0) -> None:
        super().__init__()
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
        """Return the total loss and its named terms (`task` and the method's)."""
        outputs = self.student(batch.images, self.method.student_needs | Signal.LOGITS)
        losses: Losses = {"task": self.task_weight * self.task(outputs.logits, batch.labels, batch.weights)}
        student = outputs.only(self.method.student_needs, "student")
        losses |= self.method(student, teacher.only(self.method.teacher_needs, "teacher"), batch, progress)
        return sum(losses.values(), start=losses["task"].new_zeros(())), losses
