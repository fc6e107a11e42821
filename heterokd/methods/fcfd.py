"""FCFD: features are alike when the rest of either network makes the same of them.

Liu, Kan, Shan, Chen: "Function-Consistent Feature Distillation", ICLR 2023, https://arxiv.org/abs/2304.11832

    s_k, t_k maps of stage k = 1..4;  z logits;  B_k bridge student -> teacher, C_k bridge teacher -> student
    T_j^i, S_j^i stages j to i of teacher and student (i = fc: to the logits);  MSE: mean over batch and entries
    L_kl         = tau^2 KL( softmax(z_t / tau) || softmax(z_s / tau) )
    L_appearance = sum_k MSE(B_k(s_k), t_k) + MSE(mean over positions of B_4(s_4), that of t_4)
    a path is a front and a crossing k = 1..3:  student first: z_m = T_{k+1}^fc(B_k(s_k));
                                                teacher first: z_m = S_{k+1}^fc(C_k(t_k));  n of the six are drawn
    L_path_kl    = sum over drawn paths of tau^2 KL( softmax(z_t / tau) || softmax(z_m / tau) )
    L_function   = sum over drawn student-first paths of sum_{i > k} MSE(T_{k+1}^i(B_k(s_k)), t_i) (stage 4 pooled, too)
    L = w_kl L_kl + w_p L_path_kl + r w_f (L_appearance + L_function),  r rises from 0 to 1 in the first warm-up share

Defaults are those of the authors' ImageNet run ResNet-34 -> ResNet-18 (tau 1, w_f 0.02, two paths, warm-up 5 of 100
epochs); ResNet-50 -> MobileNet has w_f 5, and so have all CIFAR-100 runs but ResNet56 -> ResNet20, at tau 4 or 8. Paths
cross once, as theirs.

`teacher_norms`: the paper's teacher is fixed; `running`, the default, normalises its maps with the statistics of its
training, as every other method here does. The authors' program (LiuDongyang6/FCFD, commit 2aefb7b, `IN/main.py`:
`self.model.train()`) leaves the teacher in training mode, so that its batch norms use the batch's statistics, in its
maps and logits as on the mixed paths; `batch` does the same, and the published settings name it. The difference grows
as batches get smaller and views get farther from the teacher's training; teachers without batch norm have none.
`batch` runs the teacher's stages once more, from the input of stage 1, whose norm keeps its running statistics (the
program's does not), and the teacher's running statistics stay as they are.

The drawn paths are a function of the batch's images (those of all data-parallel workers) and of progress, so a resumed
training draws the same ones, and so do all workers.
Batch norms of the student's stages see other maps on a mixed path: there they normalise with that batch and leave the
running statistics, which evaluation uses, alone (the authors keep a second set that nothing reads). torch's own
SyncBatchNorm does not offer that; `training.sync_batch_norm` does. The student is run once more per teacher-first path
and the teacher, live, per student-first path.

Deviations: C_k is drawn by some steps only, so MSE(C_k(t_k), s_k), s_k detached, trains it at every step (term
`bridge`; its weight is w_f): unused weights stop distributed training, and the term moves nothing but C_k. Bridges
between two CNNs are a 3x3 convolution and batch norm (strided where the target grid is smaller, after nearest
upsampling where it is wider, for which the authors transpose a convolution) without their LeakyReLU, since not every
CNN ends its stages in ReLU; all others are patch embedding and window attention (`_projectors.Bridge`). Maps
are compared as the stages give them, so pooling is not preceded by a ReLU. Behind a crossing, class tokens start from
the network's parameter. The warm-up is linear in steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heterokd.distributed import gathered
from heterokd.domains import Float, Int
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import Bridge, initialise
from heterokd.methods.kd import kd_loss
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal

CROSSINGS = (1, 2, 3)
"""After which stages a path may go over to the other network."""

PATHS = tuple((student_first, k) for student_first in (True, False) for k in CROSSINGS)
"""Every path: whether the student's stages are the front, and after which stage it crosses."""


def draw_paths(count: int, index: Tensor, progress: float) -> list[tuple[bool, int]]:
    """Return `count` different paths, the same ones for the same images `index` [B] at the same progress."""
    return random.Random(f"{index.tolist()} {progress!r}").sample(PATHS, count)


def map_loss(student_map: Tensor, teacher_map: Tensor, *, is_last: bool) -> Tensor:
    """Compute MSE of two maps [B, C, H, W]; of the last stage also that of their means over positions. A scalar."""
    student_BCHW, teacher_BCHW = student_map.float(), teacher_map.float()
    loss = F.mse_loss(student_BCHW, teacher_BCHW)
    if is_last:
        loss = loss + F.mse_loss(student_BCHW.mean(dim=(2, 3)), teacher_BCHW.mean(dim=(2, 3)))
    return loss


# One argument for each symbol of the equation.
def fcfd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    path_logits: Sequence[Tensor],
    appearance: Sequence[Tensor],
    function: Sequence[Tensor],
    bridge: Sequence[Tensor],
    params: FCFD.Params,
    progress: float,
) -> Losses:
    """Compute the five weighted terms, from logits [B, K] and the `map_loss` scalars of each kind."""

    def total(losses: Iterable[Tensor]) -> Tensor:
        return sum(losses, start=student_logits.new_zeros((), dtype=torch.float32))

    ramp = min(1.0, progress / params.warmup) if params.warmup else 1.0
    path_kl = total(kd_loss(logits, teacher_logits, params.temperature) for logits in path_logits)
    return {
        "kl": params.kl_weight * kd_loss(student_logits, teacher_logits, params.temperature),
        "path_kl": params.path_kl_weight * path_kl,
        "appearance": ramp * params.feature_weight * total(appearance),
        "function": ramp * params.feature_weight * total(function),
        "bridge": ramp * params.feature_weight * total(bridge),
    }


def fcfd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    path_logits: Sequence[Tensor],
    bridged_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    params: FCFD.Params | None = None,
) -> Tensor:
    """Compute L without L_function and warm-up: what is needed of paths that the caller has run. A scalar.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        path_logits: [B, K] of every mixed path.
        bridged_maps: the student's four maps, each already of the shape of the teacher's.
        teacher_maps: four maps [B, C, H, W].
        params: weights and temperature; None: the defaults.
    """
    last = len(teacher_maps) - 1
    pairs = zip(bridged_maps, teacher_maps, strict=True)
    appearance = [map_loss(ours, theirs.detach(), is_last=i == last) for i, (ours, theirs) in enumerate(pairs)]
    terms = fcfd_terms(
        student_logits, teacher_logits, path_logits, appearance, (), (), params or FCFD.Params(), progress=1.0
    )
    return torch.stack(list(terms.values())).sum()


class BatchStatistics(TorchFunctionMode):
    """Context in which batch norms that train normalise with their batch and leave their running statistics alone.

    Args:
        frozen: also those in evaluation mode, a teacher's.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, but `F.batch_norm` in training mode without running mean and variance."""
        kwargs = dict(kwargs or {})
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            kwargs |= dict(zip(names, args, strict=False))
            args = (kwargs.pop("input"),)
            if kwargs.get("training") or self.frozen:
                kwargs |= {"running_mean": None, "running_var": None, "training": True}
        return func(*args, **kwargs)


class ConvBridge(nn.Module):
    """A CNN's map to another CNN's: 3x3 convolution with stride, and batch norm; grids as in `projectors.Bridge`."""

    def __init__(self, channels: int, side: int, target_channels: int, target_side: int) -> None:
        super().__init__()
        ratio = max(1, side // target_side)
        self.side = ratio * target_side
        self.conv = nn.Conv2d(channels, target_channels, 3, ratio, 1, bias=False)
        self.norm = nn.BatchNorm2d(target_channels)
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, target_channels, target_side, target_side]."""
        x = map_BCHW
        if x.shape[-1] < self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="nearest")
        elif x.shape[-1] > self.side:
            x = F.adaptive_avg_pool2d(x, self.side)
        bridged: Tensor = self.norm(self.conv(x))
        return bridged


def make_bridge(source: OutputSpec, target: OutputSpec, stage: int) -> nn.Module:
    """Build the bridge from stage `stage` of one network to the same stage of another."""
    here, there = source.stages[stage - 1], target.stages[stage - 1]
    shape = (here.channels, source.side(stage), there.channels, target.side(stage))
    return ConvBridge(*shape) if here.kind == there.kind == "cnn" else Bridge(*shape)


class FCFD(Method):
    """Match features by what the rest of either network makes of them."""

    verification = Verification(
        open_readings="whole steps: not run against the program; bridges of token networks",
        defaults="program LiuDongyang6/FCFD at 2aefb7b, ImageNet",
    )

    class Params(MethodParams):
        """Parameters of FCFD."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides logits in both distillation terms, which are multiplied by its square"
        )
        kl_weight: float = Field(1.0, ge=0, description="w_kl: multiplies distillation from the teacher to the student")
        path_kl_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="w_p: multiplies distillation from the teacher to the mixed paths"
        )
        feature_weight: Annotated[float, Float(0.005, 5, log=True)] = Field(
            0.02, ge=0, description="w_f: multiplies the squared differences of maps"
        )
        paths: Annotated[int, Int(1, 6)] = Field(
            2, ge=1, le=len(PATHS), description="n: how many of the six mixed paths every step draws and runs"
        )
        warmup: float = Field(
            0.05, ge=0, le=1, description="share of the training in which w_f rises from zero to its value"
        )
        teacher_norms: Literal["running", "batch"] = Field(
            "running",
            description="statistics of the teacher's batch norms: those of its training, or as in the authors' program "
            "those of the batch",
        )

    student_needs = Signal.LOGITS | Signal.STAGES | Signal.TAIL
    teacher_needs = Signal.LOGITS | Signal.STAGES | Signal.TAIL | Signal.STEM
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build bridges to the teacher after every stage, and to the student after the stages where paths cross.

        Raises:
            PairError: a network has not four stages, or the teacher's stages cannot be run again.
        """
        is_rerun = self.params.teacher_norms == "batch"
        if is_rerun and teacher.stem is None:
            raise PairError(
                "fcfd: teacher_norms batch runs the teacher again from the input of its stage 1, which is not a square "
                "map; use teacher_norms: running"
            )
        self.teacher_needs = Signal.TAIL | (Signal.STEM if is_rerun else Signal.LOGITS | Signal.STAGES)
        for owner, spec in (("student", student), ("teacher", teacher)):
            if len(spec.stages) != 4:
                raise PairError(f"fcfd: the {owner} must have 4 stages to be mixed, it has {len(spec.stages)}")
        self.to_teacher = nn.ModuleList(make_bridge(student, teacher, stage) for stage in (1, 2, 3, 4))
        self.to_student = nn.ModuleList(make_bridge(teacher, student, stage) for stage in CROSSINGS)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kl`, `path_kl`, `appearance`, `function`, `bridge`."""
        student_tail, teacher_tail = student.tail, teacher.tail
        teacher_logits, targets = self._targets(teacher)
        in_teacher = [bridge(each) for bridge, each in zip(self.to_teacher, student.stages, strict=True)]
        in_student = [bridge(each) for bridge, each in zip(self.to_student, targets, strict=False)]

        path_logits, function = [], []
        for student_first, k in draw_paths(self.params.paths, gathered(batch.index), progress):
            if student_first:
                x = in_teacher[k - 1]
                with self._norms_of_teacher():
                    for j in range(k + 1, 5):
                        x = teacher_tail.step(x, j)
                        function.append(map_loss(x, targets[j - 1], is_last=j == 4))
                    path_logits.append(teacher_tail(x, 5))
            else:
                with BatchStatistics():
                    path_logits.append(student_tail(in_student[k - 1], k + 1))

        appearance = [map_loss(x, targets[i], is_last=i == 3) for i, x in enumerate(in_teacher)]
        bridge = [map_loss(x, student.stages[i].detach(), is_last=False) for i, x in enumerate(in_student)]
        return fcfd_terms(
            student.logits, teacher_logits, path_logits, appearance, function, bridge, self.params, progress
        )

    def _norms_of_teacher(self) -> AbstractContextManager[object]:
        return BatchStatistics(frozen=True) if self.params.teacher_norms == "batch" else nullcontext()

    def _targets(self, teacher: Outputs) -> tuple[Tensor, list[Tensor]]:
        """Return the teacher's logits and four maps, without gradient."""
        if self.params.teacher_norms == "running":
            return teacher.logits, [each.detach() for each in teacher.stages]
        tail, x = teacher.tail, teacher.stem
        maps: list[Tensor] = []
        with torch.no_grad(), self._norms_of_teacher():
            for j in (1, 2, 3, 4):
                x = tail.step(x, j)
                maps.append(x)
            return tail(x, 5), maps
