"""PAT: the student's stages see each other's regions, and a frozen teacher is prompted with what the student lacks.

Lin, Yao, Hsu, Xie, Shuai, Cheng: "Perspective-Aware Teaching: Adapting Knowledge for Heterogeneous Distillation",
ICCV 2025, https://arxiv.org/abs/2501.08885

    s_j, t_j maps of stage j = 1..4, t_0 what enters stage 1, z logits; s student, t plain teacher, p prompted teacher
    RAA (region-aware attention): U_j = PatchEmbed_j(s_j), 4 x 4 tokens of one width;  U = [U_1 .. U_4], 64 queries
        q = W_q LN(U) + e,  k = W_k LN(U) + e,  v = W_v LN(U),  e sinusoidal;  O = softmax(q k' / sqrt(d)) v, 8 heads
        a_j = Align_j(O_j)                                                          of the shape of t_j
    AFP (adaptive feedback prompts), before each teacher stage:
        p_0 = t_0,  f_j = Align'_j(sg(a_j) - t_j)                                   feedback, of the shape of p_{j-1}
        p_j = T_j( p_{j-1} + beta_j Prompt_j(Fuse_j([p_{j-1} ; f_j])) ),  z_p = head(p_4)       T_j: frozen stage j
        Fuse: conv 1x1, 5x5, 1x1, SE, 1x1;  Prompt: the same, with groups and a depthwise 5x5
    L = alpha tau^2 KL(z_t || z_s) + beta sum_j HCL(a_j, p_j) + gamma KL(z_t || z_p)           HCL: see `review_kd.py`

Defaults are those of the authors' code: all weights 1, tau 1, 64 queries, width 512, prompts before all four stages.

The gradient of HCL and of the last term passes through the frozen teacher to the prompts; its weights get none. So the
teacher runs twice at every step, once with activations kept, and no cache can ever serve it.

Differences from the authors' code, which takes feedback from the previous batch, so from other images (here: from
the same images, with the plain teacher's maps, since p_j is not known before its prompt); cuts off the last token as
the class token, which timm puts first; gives maps back to token networks without transposing, so that prompted tokens
are shuffled even when beta is 0; adds the position e of an image in its batch where that of a query is meant; lets SE
give its channel weights alone, without the map they weigh; and runs on "cuda" by name. Here each of these is
corrected, on any device. Class tokens go through the stages untouched by prompts. SE has a SiLU, as in
EfficientNet, since a single ReLU unit may be dead from the start. With these mended in it, the program (commit a7aff3f)
gives the same losses and weights over whole steps (tests/methods/test_golden_pat.py); as it is, on the same small CNN
teacher, `features` differs by 1 % and `prompts` by a factor of up to 2 in three steps.

Align' and Align of a CNN teacher resize first, so that their batch norms take statistics over the teacher's grid, as
the program does; `norm_grid: source`, which versions before schema 2 ran, resizes last. This differs only where the
teacher's side is not a multiple of the regions' (14 and 7 of 224 pixels), by 0.5 % of `features` in the same steps.

The authors start beta at 0: at the first step the prompted teacher is the plain teacher, and no gradient passes beta to
the prompts behind it. Here it starts at `initial_gate`, small and not 0, so that all weights learn from the first step
on; 0 is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from heterokd.domains import Choice, Float
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, Verification
from heterokd.methods._projectors import count_heads, initialise
from heterokd.methods.kd import kd_loss
from heterokd.methods.review_kd import hierarchical_context_loss
from heterokd.outputs import Batch, Kind, Losses, Outputs, OutputSpec, Signal, StageSpec

REGION_SIDE = 4
"""Regions per side of every stage: 4 stages of 4 x 4 are the 64 queries."""

HEADS = 8
NormGrid = Literal["target", "source"]
SQUEEZE = 16
"""By how much SE narrows the channels between its two layers."""


def pat_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    prompted_logits: Tensor,
    aligned_maps: Sequence[Tensor],
    prompted_maps: Sequence[Tensor],
    params: PAT.Params,
) -> Losses:
    """Compute the three weighted terms of `pat_loss`."""
    pairs = zip(aligned_maps, prompted_maps, strict=True)
    features = torch.stack([hierarchical_context_loss(aligned, prompted) for aligned, prompted in pairs]).sum()
    return {
        "kl": params.kl_weight * kd_loss(student_logits, teacher_logits, params.temperature),
        "features": params.feature_weight * features,
        "prompts": params.prompt_weight * kd_loss(prompted_logits, teacher_logits),
    }


def pat_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    prompted_logits: Tensor,
    aligned_maps: Sequence[Tensor],
    prompted_maps: Sequence[Tensor],
    params: PAT.Params | None = None,
) -> Tensor:
    """Compute L without the student's cross-entropy; a scalar.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K] of the plain teacher.
        prompted_logits: [B, K] of the prompted teacher; takes gradient.
        aligned_maps: the student's four maps after attention, each of the shape of the teacher's.
        prompted_maps: [B, C, H, W] of the prompted teacher's four stages; take gradient.
        params: weights and temperature; None: the defaults.
    """
    terms = pat_terms(
        student_logits, teacher_logits, prompted_logits, aligned_maps, prompted_maps, params or PAT.Params()
    )
    return torch.stack(list(terms.values())).sum()


def sinusoids(count: int, width: int) -> Tensor:
    """Vaswani et al.'s fixed positions, [count, width]: sines in the even columns, cosines in the odd ones."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(count).unsqueeze(1) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, :width]


class RegionEmbedding(nn.Module):
    """A map to 4 x 4 tokens: convolution with kernel = stride, after nearest upsampling where the grid does not fit."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        patch = -(-side // REGION_SIDE)
        self.side = patch * REGION_SIDE
        self.embed = nn.Conv2d(channels, width, patch, patch)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, 16, width]."""
        x = map_BCHW
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="nearest")
        tokens: Tensor = self.embed(x).flatten(2).transpose(1, 2)
        return tokens


class RegionAttention(nn.Module):
    """RAA: the regions of all stages attend to each other."""

    positions: Tensor

    def __init__(self, spec: OutputSpec, width: int) -> None:
        super().__init__()
        self.heads = count_heads(width, HEADS)
        self.embeddings = nn.ModuleList(
            RegionEmbedding(stage.channels, spec.side(j), width) for j, stage in enumerate(spec.stages, 1)
        )
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("positions", sinusoids(len(spec.stages) * REGION_SIDE**2, width), persistent=False)
        initialise(self)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, H, W] -> for each stage a map of regions [B, width, 4, 4]."""
        tokens = [embedding(stage) for embedding, stage in zip(self.embeddings, stages, strict=True)]
        query, key, value = self.qkv(self.norm(torch.cat(tokens, dim=1))).chunk(3, dim=2)
        position = self.positions.to(query.dtype)

        def split(x_BND: Tensor) -> Tensor:
            B, N, _ = x_BND.shape
            return x_BND.reshape(B, N, self.heads, -1).transpose(1, 2)

        attended = F.scaled_dot_product_attention(split(query + position), split(key + position), split(value))
        mixed_BDN = attended.transpose(1, 2).flatten(2).transpose(1, 2)
        return [x.reshape(*x.shape[:2], REGION_SIDE, REGION_SIDE) for x in mixed_BDN.chunk(len(tokens), dim=2)]


class Align(nn.Module):
    """A map to the shape of another: for CNNs nearest grid, batch norm, 1x1 convolution; for tokens two linear layers.

    The linear layers mix channels, then positions, each after a batch norm.
    """

    def __init__(
        self, channels: int, side: int, target_channels: int, target_side: int, kind: Kind, norm_grid: NormGrid
    ) -> None:
        super().__init__()
        self.target_side = target_side
        # A grid of whole repetitions has the same mean and variance: the small one is cheaper.
        self.resize_first = norm_grid == "target" and target_side % side != 0
        self.is_cnn = kind == "cnn"
        self.norm: nn.Module = nn.BatchNorm2d(channels) if self.is_cnn else nn.BatchNorm1d(side**2)
        if self.is_cnn:
            self.channel_mixer: nn.Module = nn.Conv2d(channels, target_channels, 1, bias=False)
        else:
            self.channel_mixer = nn.Linear(channels, target_channels, bias=False)  # a batch norm follows
            self.position_norm = nn.BatchNorm1d(target_channels)
            self.position_mixer = nn.Linear(side**2, target_side**2)
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, channels, side, side] -> [B, target_channels, target_side, target_side]."""
        if self.is_cnn:
            size = (self.target_side, self.target_side)
            if self.resize_first:
                map_BCHW = F.interpolate(map_BCHW, size=size, mode="nearest")
            x: Tensor = self.channel_mixer(self.norm(map_BCHW))
            return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")
        tokens_BND = self.channel_mixer(self.norm(map_BCHW.flatten(2).transpose(1, 2)))
        mixed_BDN: Tensor = self.position_mixer(self.position_norm(tokens_BND.transpose(1, 2)))
        return mixed_BDN.reshape(*mixed_BDN.shape[:2], self.target_side, self.target_side)


class SqueezeExcitation(nn.Module):
    """Channel weights of a map from its means (Hu et al., https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // SQUEEZE), 1)
        self.excite = nn.Conv2d(max(1, channels // SQUEEZE), channels, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        weights: Tensor = self.excite(F.silu(self.squeeze(map_BCHW.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return map_BCHW * weights


class Prompt(nn.Module):
    """AFP of one stage: what enters the teacher's stage, plus a gated prompt made of it and of the feedback."""

    def __init__(
        self, entry: StageSpec, entry_side: int, stage: StageSpec, side: int, initial_gate: float, norm_grid: NormGrid
    ) -> None:
        super().__init__()
        channels = entry.channels
        groups = math.gcd(4, channels)
        same = (stage.channels, side) == (channels, entry_side)
        self.align = nn.Identity() if same else Align(stage.channels, side, channels, entry_side, stage.kind, norm_grid)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.Conv2d(channels, channels, 5, padding=2),
            nn.Conv2d(channels, channels, 1),
            SqueezeExcitation(channels),
            nn.Conv2d(channels, channels, 1),
        )
        self.prompt = nn.Sequential(
            nn.Conv2d(channels, channels, 1, groups=groups),
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, channels, 1),
            SqueezeExcitation(channels),
            nn.Conv2d(channels, channels, 1, groups=groups),
        )
        self.gate = nn.Parameter(torch.tensor([initial_gate]))
        initialise(self)

    def forward(self, map_BCHW: Tensor, feedback: Tensor) -> Tensor:
        """Add a prompt to a stage's input, from the input and feedback of the shape of the stage's output."""
        fused = self.fuse(torch.cat((map_BCHW, self.align(feedback).to(map_BCHW.dtype)), dim=1))
        prompted: Tensor = map_BCHW + self.gate * self.prompt(fused)
        return prompted


class PAT(Method):
    """Let the student's stages attend to each other, and prompt the teacher with what the student lacks."""

    verification = Verification(
        program="jimmylin0979/PAT",
        commit="a7aff3f",
        file="distillers/pat.py",
        value=1e-5,
        gradient=8e-6,
        open_readings="3 steps, with its feedback, SE, positions and tokens mended: corrected here, see the file",
        defaults="program",
    )

    class Params(MethodParams):
        """Parameters of PAT."""

        temperature: Annotated[float, Float(1, 8, log=True)] = Field(
            1.0, gt=0, description="tau: divides logits in the distillation from the plain teacher"
        )
        kl_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="alpha: multiplies distillation from the plain teacher's logits"
        )
        feature_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="beta: multiplies the difference of the student's maps and the prompted teacher's"
        )
        prompt_weight: Annotated[float, Float(0.1, 10, log=True)] = Field(
            1.0, ge=0, description="gamma: multiplies what keeps the prompted teacher's logits near the plain teacher's"
        )
        initial_gate: float = Field(
            0.01, ge=-1, le=1, description="beta_j: where the learned gate of every prompt starts; the authors use 0"
        )
        width: Annotated[int, Choice(128, 256, 512)] = Field(
            512, ge=2, description="numbers per region in the attention over the student's stages"
        )
        norm_grid: NormGrid = Field(
            "target",
            description="grid over which a CNN's aligning batch norms take statistics: after or before resizing",
        )
        prompted_stages: str = Field(
            "1234",
            pattern="^1?2?3?4?$",
            min_length=1,
            coerce_numbers_to_str=True,
            description="the teacher's stages that a prompt precedes, shallow to deep, one digit each",
        )

    student_needs = Signal.LOGITS | Signal.STAGES
    teacher_needs = Signal.LOGITS | Signal.STAGES | Signal.STEM | Signal.TAIL
    params: Params

    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        """Build the attention over the student's stages, the aligning layers, and the teacher's prompts.

        Raises:
            PairError: a network has not four stages, or the input of the teacher's first stage is unknown.
        """
        if teacher.stem is None:
            raise PairError("pat: the teacher's spec must say what enters its first stage (stem), which is prompted")
        for owner, spec in (("student", student), ("teacher", teacher)):
            if len(spec.stages) != 4:
                raise PairError(f"pat: the {owner} must have 4 stages, it has {len(spec.stages)}")
        width = self.params.width
        self.attention = RegionAttention(student, width)
        self.aligns = nn.ModuleList(
            Align(width, REGION_SIDE, stage.channels, teacher.side(j), stage.kind, self.params.norm_grid)
            for j, stage in enumerate(teacher.stages, 1)
        )
        self.prompts = nn.ModuleDict()
        for j in map(int, self.params.prompted_stages):
            entry, stage, gate = teacher.at(j - 1), teacher.at(j), self.params.initial_gate
            sides = teacher.side(j - 1), teacher.side(j)
            self.prompts[str(j)] = Prompt(entry, sides[0], stage, sides[1], gate, self.params.norm_grid)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """Compute the terms `kl`, `features`, `prompts`."""
        plain = [each.detach() for each in teacher.stages]
        regions = self.attention(student.stages)
        aligned = [align(each) for align, each in zip(self.aligns, regions, strict=True)]
        tail, entry = teacher.tail, teacher.stem
        prompted = []
        for j in (1, 2, 3, 4):
            x = entry.detach() if j == 1 else entry
            if str(j) in self.prompts:
                x = self.prompts[str(j)](x, aligned[j - 1].detach() - plain[j - 1])
            entry = tail.step(x, j, like=entry)  # the class tokens of what the prompt was added to go on
            prompted.append(entry)
        return pat_terms(student.logits, teacher.logits, tail(entry, 5), aligned, prompted, self.params)
