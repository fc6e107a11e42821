"""FBT, HCD and HeteroAKD: ten steps of training equal those of a slow reference that is written from the papers alone.

The references share with the methods the networks and the learnable modules' weights, nothing else: every equation is
computed here again, in loops where the method has a formula over tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.method import Method
from heterokd.methods import METHODS
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.training.distiller import Distiller
from heterokd.training.task_modules import build_task

STEPS = 10
CLASSES = 5
LEARNING_RATE = {"hcd": 0.001, "fbt": 0.005, "heteroakd": 0.005}
"""Small: larger steps amplify float32 rounding until weights differ visibly."""

Reference = Callable[[Method, Outputs, Outputs, Tensor], Tensor]
"""Loss of a step, from the method, both networks' outputs and the labels."""


def networks(student: str, teacher: str, size: int, seed: int) -> tuple[AnyNetwork, AnyNetwork]:
    torch.manual_seed(seed)
    return tuple(build_network(name, CLASSES, image_size=size) for name in (student, teacher))  # type: ignore[return-value]


def batches(size: int, *, maps: bool) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        images = torch.rand(4, 3, size, size, generator=generator)
        labels = torch.randint(0, CLASSES, (4, size, size) if maps else (4,), generator=generator)
        if maps:
            labels[:, :5] = 255  # ignored
        yield Batch(images, labels, torch.arange(4))


def check_steps(
    name: str, pair: tuple[AnyNetwork, AnyNetwork], size: int, reference: Reference, params: dict[str, object]
) -> None:
    """Train twice from the same weights and compare the student's weights after each step."""
    student, teacher = pair
    teacher.eval().requires_grad_(False)
    for module in student.modules():
        if isinstance(module, nn.Dropout):  # both trainings must see the same student
            module.p = 0.0
    maps = "segmentation" in METHODS[name].tasks
    signals = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | (Signal.NONE if maps else Signal.TAIL)
    torch.manual_seed(1)
    method = METHODS[name](METHODS[name].Params(**params), student.spec, teacher.spec)
    ours = Distiller(student, method, build_task("segmentation" if maps else "classification", CLASSES))
    plain_student, plain_method = copy.deepcopy(student), copy.deepcopy(method)
    optimizers = [
        torch.optim.SGD([*first.parameters(), *second.parameters()], lr=LEARNING_RATE[name], momentum=0.9)
        for first, second in ((student, method), (plain_student, plain_method))
    ]
    before = copy.deepcopy(student.state_dict())
    for step, batch in enumerate(batches(size, maps=maps)):
        with torch.no_grad():
            outputs = teacher(batch.images, signals)
        total, _ = ours(batch, outputs, 1.0)
        seen = plain_student(batch.images, signals)
        plain = reference(plain_method, seen, outputs, batch.labels)
        assert total.item() == pytest.approx(plain.item(), rel=1e-4), f"loss of step {step}"
        for optimizer, loss in zip(optimizers, (total, plain), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = 0.0
    for key, value in student.state_dict().items():
        if not value.dtype.is_floating_point:
            continue
        torch.testing.assert_close(value, plain_student.state_dict()[key], rtol=2e-3, atol=2e-4, msg=key)
        moved = max(moved, float((value - before[key]).abs().max()))
    assert moved > 0.005, "ten steps must move the weights, or they prove nothing"
    for (key, value), expected in zip(method.named_parameters(), plain_method.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=2e-4, msg=key)


# --- HCD


def hcd(method: Method, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """Eq. 2-15 of the paper: alpha 1, beta 10, gamma 8, tau 4, n 4, theta 0.5."""
    tau, n, theta = 4.0, 4, 0.5
    z_s, z_t = student.logits, teacher.logits
    total = F.cross_entropy(z_s, labels)
    total = total + tau**2 * F.kl_div(
        (z_s / tau).log_softmax(1), (z_t / tau).softmax(1), reduction="batchmean"
    )  # alpha L_KL
    for i, stage in enumerate(student.stages, start=1):
        x = stage
        for block in method.get_submodule(f"projectors.{i}").layers:
            for layer in block if isinstance(block, nn.Sequential) else [block]:
                x = layer(x)
        pooled = x.flatten(2).mean(2)
        first, _, second = method.get_submodule(f"mappers.{i}")
        hidden = torch.cat([pooled, teacher.embedding], 1) @ first.weight.T + first.bias
        z = hidden.clamp_min(0) @ second.weight.T + second.bias
        fused = [z[:, j * CLASSES : (j + 1) * CLASSES] + z_t for j in range(n)]
        for q in fused:
            divergence = (q / tau).softmax(1) * ((q / tau).log_softmax(1) - (z_s / tau).log_softmax(1))
            total = total + 10 * tau**2 * divergence.sum(1).mean() / n
            total = total + F.cross_entropy(q, labels) / n
        overlap = z_s.new_zeros(())
        for b, label in enumerate(labels.tolist()):
            rows = []
            for q in fused:
                row = torch.stack([q[b, c] if c != label else q[b, c] * 0 for c in range(CLASSES)]) + 1e-8
                rows.append(row / row.norm())
            for j in range(n):
                for k in range(n):
                    if j != k:
                        overlap = overlap + ((rows[j] * rows[k]).sum() - theta).clamp_min(0) ** 2
        total = total + 8 * overlap / (len(labels) * n * (n - 1))
    return total


@pytest.mark.parametrize(("student", "teacher"), [("test_resnet", "test_vit"), ("test_vit", "test_resnet")])
def test_hcd(student: str, teacher: str) -> None:
    check_steps("hcd", networks(student, teacher, 64, 0), 64, hcd, {})


# --- FBT


def window_attention(block: nn.Module, x: Tensor) -> Tensor:
    """Add a Swin window attention without shift, and the two linear layers; x [B, H, W, C]."""
    B, H, W, C = x.shape
    side = min(7, H)
    heads = max(h for h in range(1, max(1, C // 32) + 1) if C % h == 0)
    normed = F.layer_norm(x, (C,), block.norm1.weight, block.norm1.bias)
    attention, width = block.attention, C // heads
    padded = normed.new_zeros(B, -(-H // side) * side, -(-W // side) * side, C)
    padded[:, :H, :W] = normed
    result = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], side):
        for left in range(0, padded.shape[2], side):
            tokens = padded[:, top : top + side, left : left + side].reshape(B, side * side, C)
            q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=2)
            parts = []
            for head in range(heads):
                of = slice(head * width, (head + 1) * width)
                score = q[..., of] @ k[..., of].transpose(1, 2) / math.sqrt(width)
                bias = torch.stack(
                    [
                        torch.stack(
                            [
                                block.bias[
                                    (a // side - b // side + side - 1) * (2 * side - 1)
                                    + a % side
                                    - b % side
                                    + side
                                    - 1,
                                    head,
                                ]
                                for b in range(side * side)
                            ]
                        )
                        for a in range(side * side)
                    ]
                )
                parts.append((score + bias).softmax(2) @ v[..., of])
            mixed = torch.cat(parts, dim=2) @ attention.out.weight.T + attention.out.bias
            result[:, top : top + side, left : left + side] = mixed.reshape(B, side, side, C)
    x = x + result[:, :H, :W]
    return x + block.mlp(F.layer_norm(x, (C,), block.norm2.weight, block.norm2.bias))


def fbt(method: Method, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """Eq. 1-3, which contain the labels: no cross-entropy; gamma 1, tau_2 learned from 0.07."""
    front, back = (teacher.stages[2], student.tail) if method.front_is_teacher else (student.stages[2], teacher.tail)
    bridge = method.bridge
    ratio, goal = max(1, front.shape[2] // bridge.target_side), bridge.target_side
    x = F.conv2d(front, bridge.embed.weight, bridge.embed.bias, stride=ratio)
    if x.shape[2] < goal:
        x = x.repeat_interleave(goal // x.shape[2], 2).repeat_interleave(goal // x.shape[3], 3)
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, (x.shape[3],), bridge.norm.weight, bridge.norm.bias)
    x = window_attention(bridge.blocks[0], x)
    fused = back.outputs(x.permute(0, 3, 1, 2).contiguous(), 4)

    def pair(z_a: Tensor, f_a: Tensor, z_b: Tensor, f_b: Tensor) -> Tensor:
        p_a, p_b = z_a.softmax(1), z_b.softmax(1)
        ofa, contrast = z_a.new_zeros(()), z_a.new_zeros(())
        if f_a.shape[1] != f_b.shape[1]:
            f_b = f_b @ method.align.weight.T + method.align.bias
        for i, y in enumerate(labels.tolist()):
            for c in range(CLASSES):
                share = 1 + p_a[i, y] if c == y else p_a[i, c]
                ofa = ofa + share * (p_a[i, c] / p_b[i, c]).log()
            cosines = torch.stack([F.cosine_similarity(f_b[i], f_a[j], dim=0) for j in range(len(labels))])
            contrast = contrast - (cosines * method.logit_scale.exp()).log_softmax(0)[i]
        return (ofa + contrast) / len(labels)

    s, t, f = (student.logits, student.embedding), (teacher.logits, teacher.embedding), (fused.logits, fused.embedding)
    return pair(*t, *s) + pair(*t, *f) + pair(f[0].detach(), f[1].detach(), *s)


@pytest.mark.parametrize(("student", "teacher"), [("test_resnet", "test_vit"), ("test_vit", "test_resnet")])
def test_fbt(student: str, teacher: str) -> None:
    check_steps("fbt", networks(student, teacher, 64, 0), 64, fbt, {})


# --- HeteroAKD


def heteroakd(method: Method, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """Eq. 1-11 after warm-up: lambda1 0.1, lambda2 1, tau 1; and the projectors' own loss, weight 0.05."""

    def at(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def labels_at(size: torch.Size) -> Tensor:
        return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()

    small = labels_at(student.embedding.shape[-2:])
    valid = small != 255

    def project(sequence: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, sequence[0].weight)
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (part[None, :, None, None] for part in (sequence[1].weight, sequence[1].bias))
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    z_s = project(method.student_projector, student.embedding)
    z_t = project(method.teacher_projector, teacher.embedding)
    z_t = at(z_t, z_s.shape[-2:])

    def entropy(z: Tensor) -> Tensor:
        found = []
        for c in range(CLASSES):
            sigma = z[:, c].sigmoid()
            found.append(torch.where(small == c, -sigma.log(), -(1 - sigma).log()) * valid)
        return torch.stack(found, 1)

    with torch.no_grad():
        h_s, h_t = entropy(z_s), entropy(z_t)
        share = torch.where(valid[:, None], h_s / (h_s + h_t), 0.5)
        mixed = share * z_t + (1 - share) * z_s
        urgency = h_s + (h_s - entropy(mixed)).clamp_min(0)
        target = mixed.sigmoid()
    transfer = z_s.new_zeros(())
    for b in range(len(labels)):
        where = valid[b]
        for c in range(CLASSES):
            weights = urgency[b, c][where].softmax(0)
            goal, score = target[b, c][where], z_s[b, c][where]
            transfer = (
                transfer - (weights * (goal * score.sigmoid().log() + (1 - goal) * (-score).sigmoid().log())).sum()
            )
    transfer = transfer / (len(labels) * CLASSES)
    p_t, counted = at(teacher.logits, student.logits.shape[-2:]), labels_at(student.logits.shape[-2:]) != 255
    divergence = (p_t.softmax(1) * (p_t.log_softmax(1) - student.logits.log_softmax(1))).sum(1)
    own = (entropy(z_s).sum() + entropy(z_t).sum()) / valid.sum()
    task = F.cross_entropy(at(student.logits, labels.shape[-2:]), labels, ignore_index=255)
    return task + 0.1 * divergence[counted].mean() + transfer + 0.05 * own


def test_heteroakd() -> None:
    pair = networks("deeplabv3plus-test_resnet", "segformer-mit_b0", 64, 0)
    check_steps("heteroakd", pair, 64, heteroakd, {})
