"""Adversarial terms of segmentation methods: a discriminator separates the student's and the teacher's logit maps.

Liu, Chen, Liu, Qin, Luo, Wang: "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019,
https://arxiv.org/abs/1903.04197 (its holistic term), in the hinge form of CIRKD's code:

    discriminator   mean( relu(1 - D(z_t)) ) + mean( relu(1 + D(z_s)) )        z_s without gradient
    generator       - mean( D(z_s) )                                           D's weights without gradient

Deviations: both terms share a backward pass and D is trained by the student's optimizer, where the code uses a
separate Adam (learning rate 4e-4) and a second backward pass. D is designed for grids of 64 x 64 or more; smaller ones
get fewer layers. The paper's D reads the image and the logits; this D, like the code's, only the logits. The gate of
its self-attention starts slightly above the code's 0, so that all weights learn from the first step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from heterokd.methods._projectors import resize_map
from heterokd.outputs import IGNORE, OutputSpec, labels_at

LAST_SIDE = 4
"""Side of the last convolution's kernel, the minimum side of its input."""
MOST_HALVINGS = 4
FIRST_GATE = 0.1


class PositionAttention(nn.Module):
    """Self-attention over a map's positions, added through a learned gate (Zhang et al., SAGAN, ICML 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1, bias=False)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Parameter(torch.full((1,), FIRST_GATE))

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        query, key, value = (
            layer(map_BCHW).flatten(2).transpose(1, 2).contiguous() for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return map_BCHW + self.gate * attended.transpose(1, 2).reshape(map_BCHW.shape)


class Discriminator(nn.Module):
    """Spectrally normalised 4x4 convolutions that halve a logit map four times, self-attention after the last two.

    Args:
        student: shapes of the student's outputs; the grid of its logits determines the number of halvings.
        width: channels after the first convolution; they double with each.
    """

    def __init__(self, student: OutputSpec, width: int = 64) -> None:
        super().__init__()
        side = -(-student.image_size // (student.logits_stride or 1))
        halvings = next(count for count in range(MOST_HALVINGS, 0, -1) if side >= LAST_SIDE << count or count == 1)
        self.smallest = LAST_SIDE << halvings
        layers: list[nn.Module] = [nn.BatchNorm2d(student.num_classes, track_running_stats=False)]
        before = student.num_classes
        for halving in range(halvings):
            after = width << halving
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.1)]
            if halving >= halvings - 2:
                layers.append(PositionAttention(after))
            before = after
        layers.append(nn.Conv2d(before, 1, LAST_SIDE, bias=False))  # the hinge loss is symmetric
        self.layers = nn.Sequential(*layers)

    def forward(self, logits_BKHW: Tensor) -> Tensor:
        """Score logits [B, K, H, W], enlarged if the grid is too small: [B, 1, h, w], large for the teacher's."""
        height, width = (max(side, self.smallest) for side in logits_BKHW.shape[-2:])
        with torch.autocast(logits_BKHW.device.type, enabled=False):
            answers: Tensor = self.layers(resize_map(logits_BKHW, (height, width)))
        return answers

    def losses(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the generator's term, which trains only the student, and the discriminator's, which trains only D.

        Args:
            student_logits: [B, K, H, W].
            teacher_logits: [B, K, h, w], interpolated (bilinear) to the student's grid; take no gradient.
            labels: class numbers of any height and width; where they are IGNORE, both logits are replaced by zeros.

        Returns:
            Two float32 scalars without weights.
        """
        size = student_logits.shape[-2], student_logits.shape[-1]
        ignored_B1HW = (labels_at(labels, size) == IGNORE).unsqueeze(1)
        ours = student_logits.float().masked_fill(ignored_B1HW, 0)
        theirs = resize_map(teacher_logits.detach(), size).masked_fill(ignored_B1HW, 0)
        frozen = {name: weight.detach() for name, weight in self.named_parameters()}
        generator = generator_loss(functional_call(self, frozen, (ours,)))
        return generator, discriminator_loss(self(ours.detach()), self(theirs))


def generator_loss(student_answers: Tensor) -> Tensor:
    """Compute the student's term: minus the mean of D's scores of its logits, a scalar."""
    return -student_answers.mean()


def discriminator_loss(student_answers: Tensor, teacher_answers: Tensor) -> Tensor:
    """Compute D's hinge loss, a scalar: scores below -1 for the student and above 1 for the teacher cost nothing."""
    return F.relu(1 - teacher_answers).mean() + F.relu(1 + student_answers).mean()
