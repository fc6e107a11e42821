"""Distiller: student and method as one trainable module, the thing that DDP wraps. It never holds the teacher.

A method's memories (`Method.memories`: hundreds of MiB in some) are in its state, but DDP does not copy them from the
first worker, neither when it wraps nor at every step: each worker builds them from the same seed and fills them itself.
Who wraps a method in a module of another kind, and wants that too, sets the attribute that is set here.
"""

from __future__ import annotations

from torch import Tensor, nn

from heterokd.method import Method
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch, Losses, Outputs, Signal
from heterokd.training.task_modules import Task


class Distiller(nn.Module):
    """One distillation step: the student's forward, the task loss (added here, once) and the method's terms.

    Args:
        student: the network that is trained and kept.
        method: the loss, with its projectors.
        task: the task loss.
        task_weight: multiplies the task loss.
    """

    def __init__(self, student: AnyNetwork, method: Method, task: Task, task_weight: float = 1.0) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.task = task
        self.task_weight = task_weight
        # The name under which DDP looks for what it shall leave alone.
        self._ddp_params_and_buffers_to_ignore = [
            f"method.{memory}.{name}"
            for memory in method.memories
            for name, _ in method.get_submodule(memory).named_buffers()
        ]

    @property
    def teacher_needs(self) -> Signal:
        """What the teacher must give for one step."""
        return self.method.teacher_needs

    def forward(self, batch: Batch, teacher: Outputs, progress: float) -> tuple[Tensor, Losses]:
        """The loss to differentiate, and its named terms (`task` and the method's own), which sum to it."""
        outputs = self.student(batch.images, self.method.student_needs | Signal.LOGITS)
        losses: Losses = {"task": self.task_weight * self.task(outputs.logits, batch.labels)}
        losses.update(
            self.method(
                outputs.only(self.method.student_needs, "student"),
                teacher.only(self.method.teacher_needs, "teacher"),
                batch,
                progress,
            )
        )
        total = sum(losses.values(), start=losses["task"].new_zeros(()))
        return total, losses
