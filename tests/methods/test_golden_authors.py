"""Values and gradients of the authors' programs, computed there in float64 from the same random numbers.

Each row names the program it comes from. Our losses compute in float32, hence the tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from heterokd.methods import (
    af_dcd,
    at,
    cat_kd,
    cc,
    cirkd,
    crd,
    ctkd,
    cwd,
    dist,
    dkd,
    ifvd,
    kd,
    ldrld,
    lskd,
    mldr_kd,
    nkd,
    ofa,
    ofd,
    pixel_kd,
    review_kd,
    rkd,
    rld,
    rsd,
    sdd,
    skd,
    srd,
    srrl,
    tekap,
    ttm,
    vkd,
    wttm,
)


@dataclass(frozen=True)
class Inputs:
    """Student's and teacher's tensors, labels, and random numbers drawn after them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    extra: Tensor


def draw(
    seed: int, student: tuple[int, ...], teacher: tuple[int, ...] = (), *, scales: tuple[float, float] = (1, 1)
) -> Inputs:
    """Draw from one generator in the order student, teacher, labels, extra; the classes are the second dimension."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = scales[0] * normal(*student), scales[1] * normal(*(teacher or student))
    if seed == 32:  # margins of OFD follow the maps at once
        return Inputs(first, second, torch.empty(0), torch.rand(student[1], generator=generator, dtype=torch.float64))
    labels = torch.randint(0, student[1], student[:1], generator=generator)
    return Inputs(first, second, labels, normal(3, *student) if len(student) == 2 else torch.empty(0))


FEW_CLASSES = draw(11, (8, 10), scales=(2, 4))
MANY_CLASSES = draw(12, (16, 100), scales=(2, 4))


@dataclass(frozen=True)
class Golden:
    """A loss of ours and what the authors' program gives.

    Attributes:
        loss: of ours, a scalar.
        inputs: its inputs.
        value: of the authors' program.
        gradient_norm: Euclidean length of its gradient with respect to the student's tensor.
        tolerance: relative, of the gradient's length.
    """

    loss: Callable[[Inputs], Tensor]
    inputs: Inputs
    value: float
    gradient_norm: float
    tolerance: float = 2e-5


LABELS = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(1))
"""Of maps that are a quarter as wide."""

GOLDEN = {
    "at: megvii-research/mdistiller AT.py at a08d46f": Golden(
        lambda x: at.at_loss([x.student], [x.teacher]), draw(51, (3, 8, 6, 6)), 0.00771292126, 0.0018779382
    ),
    "review_kd, one map: megvii-research/mdistiller ReviewKD.py at a08d46f": Golden(
        lambda x: review_kd.hierarchical_context_loss(x.student, x.teacher),
        draw(52, (3, 8, 7, 7)),
        1.27112324,
        0.0513598241,
    ),
    "cc, after the embeddings: Hao840/OFAKD correlation.py at f7bb896": Golden(
        lambda x: 0.02 * cc.adjacent_loss(x.student, x.teacher), draw(53, (8, 16)), 0.365811407, 0.070082866
    ),
    "pixel_kd: winycg/CIRKD kd.py at dab64db": Golden(
        lambda x: pixel_kd.pixel_kd_loss(x.student, x.teacher, LABELS),
        draw(54, (2, 5, 8, 8), scales=(2, 2)),
        1.74837381,
        0.0672982701,
    ),
    "ifvd: winycg/CIRKD ifvd.py at dab64db": Golden(
        lambda x: ifvd.intra_class_loss(x.student, x.teacher, LABELS, 5),
        draw(55, (2, 12, 8, 8)),
        0.154920385,
        0.0270910492,
    ),
    "cirkd, images of a batch: winycg/CIRKD cirkd_mini_batch.py at dab64db": Golden(
        lambda x: cirkd.minibatch_loss(x.student, x.teacher), draw(56, (3, 12, 6, 6)), 3.46950555, 0.190095966
    ),
    "kd: megvii-research/mdistiller KD.py": Golden(
        lambda x: kd.kd_loss(x.student, x.teacher, 4.0), FEW_CLASSES, 7.332351222808518, 0.5014917127334969
    ),
    "dkd, 10 classes: megvii-research/mdistiller DKD.py": Golden(
        lambda x: dkd.dkd_loss(x.student, x.teacher, x.labels, 1.0, 2.0, 1.0),
        FEW_CLASSES,
        4.918707398728755,
        0.6485854569376922,
    ),
    "dkd, 100 classes: megvii-research/mdistiller DKD.py": Golden(
        lambda x: dkd.dkd_loss(x.student, x.teacher, x.labels, 1.0, 8.0, 4.0),
        MANY_CLASSES,
        73.38254958411464,
        1.008099885567715,
    ),
    "ofa: Hao840/OFAKD ofa.py": Golden(
        lambda x: ofa.ofa_loss(x.student, x.teacher, x.labels, 1.5, 1.0),
        FEW_CLASSES,
        2.7761352992210524,
        0.3865570437966375,
    ),
    "ttm: zkxufo/TTM ttm.py": Golden(
        lambda x: ttm.ttm_loss(x.student, x.teacher, 0.1), FEW_CLASSES, 1.4414375885108939, 0.20097782771517333
    ),
    "wttm: zkxufo/TTM wttm.py": Golden(
        lambda x: wttm.wttm_loss(x.student, x.teacher, 0.2), MANY_CLASSES, 37.890302843713236, 1.5321594282756916
    ),
    "ctkd: zhengli97/CTKD KD.py": Golden(
        lambda x: ctkd.ctkd_loss(x.student, x.teacher, 1 + 20 * torch.sigmoid(torch.ones(1))),
        FEW_CLASSES,
        8.421697009514686,
        0.46863804929230657,
    ),
    "ldrld: yema-web/LDRLD LDRLD.py": Golden(
        lambda x: ldrld.ldrld_loss(x.student, x.teacher, 7, 10.5, 7.0, 4.0),
        FEW_CLASSES,
        44.80409526828538,
        4.357578404349966,
    ),
    "tekap: mdimtiazh/TeKAP Ours_TeKAP_L.py, weighted by 0.9 in train_student.py": Golden(
        lambda x: tekap.tekap_loss(x.student, x.teacher, x.extra, perturbed_weight=0.72),
        FEW_CLASSES,
        20.282421634116783,
        1.4430256791927616,
    ),
    "dist: Hao840/OFAKD dist.py": Golden(
        lambda x: dist.dist_loss(x.student, x.teacher, 1.0, 1.0, 1.0),
        MANY_CLASSES,
        1.9636450400139331,
        0.03899885231637254,
    ),
    "lskd: sunshangquan/logit-standardization-KD KD.py": Golden(
        lambda x: lskd.lskd_loss(x.student, x.teacher, 2.0), MANY_CLASSES, 0.9635881272446545, 0.013406277579251452
    ),
    "rld: zju-SWJ/RLD RLD.py": Golden(
        lambda x: rld.rld_loss(x.student, x.teacher, x.labels, 1.0, 8.0, 4.0, 1.0),
        MANY_CLASSES,
        32.33615518660257,
        0.8189685433787135,
    ),
    "nkd: yzd-v/cls_KD nkd.py": Golden(
        lambda x: nkd.nkd_loss(x.student, x.teacher, x.labels, 1.5, 1.0),
        MANY_CLASSES,
        9.66999151709037,
        0.25063796895605894,
    ),
    "rsd: VISION-SJTU/RSD rsd.py, settings of train.py": Golden(
        lambda x: 0.1 * rsd.rsd_loss(x.student, x.teacher, 0.01, "sum"),
        draw(21, (32, 48)),
        5.253665988888539,
        0.2659634917125754,
        tolerance=3e-5,  # the program adds 1e-5 to the standard deviations
    ),
    "rkd: megvii-research/mdistiller RKD.py": Golden(
        lambda x: rkd.rkd_loss(x.student, x.teacher, 25.0, 50.0),
        draw(23, (16, 32), (16, 48)),
        1.3321625430123796,
        0.3240555717419977,
    ),
    "ofd: megvii-research/mdistiller OFD.py": Golden(
        lambda x: ofd.partial_l2(x.student, x.teacher, -x.extra),
        draw(32, (3, 8, 8, 8)),
        699.9273255638461,
        30.54891870566171,
    ),
    "cat_kd: GzyAftermath/CAT-KD CAT_KD.py": Golden(
        lambda x: 400 * cat_kd.cat_kd_loss(x.student, x.teacher, 2, True),
        draw(34, (4, 10, 7, 7)),
        200.86363254054467,
        19.00150323705655,
    ),
    "sdd: SDD_DKD.py": Golden(
        lambda x: sdd.sdd_loss(3 * x.student, 3 * x.teacher, x.labels, sdd.SDD.Params(kind="dkd")),
        draw(36, (4, 10, 8, 8)),
        16.29415330473301,
        1.112151941347555,
    ),
    "skd: winycg/CIRKD skd.py": Golden(
        lambda x: skd.pairwise_loss(x.student, x.teacher),
        draw(42, (2, 16, 16, 16)),
        0.021619801929054973,
        0.0026221613679136887,
    ),
    "cwd: winycg/CIRKD cwd.py": Golden(
        lambda x: cwd.channel_wise_loss(x.student, x.teacher, None, 4.0),
        draw(44, (2, 16, 16, 16)),
        0.9719657026998471,
        0.015612694275362068,
    ),
    "af_dcd: OSVAI/Af-DCD ocmgd.py": Golden(
        lambda x: af_dcd.contrastive_loss(x.student, x.teacher),
        draw(46, (2, 32, 32, 32)),
        274.7863612665961,
        7.280700392305901,
    ),
    "mldr_kd: Ethan-Yang02/MLDR-KD dfra.py at 0db65bc": Golden(
        lambda x: mldr_kd.mldr_kd_loss(x.student, x.teacher, 1.0, 2.0),
        draw(22, (16, 10), scales=(1, 2)),
        3.3589848765,
        0.3162016963,
    ),
    "mldr_kd, tau 2: Ethan-Yang02/MLDR-KD dfra.py at 0db65bc": Golden(
        lambda x: mldr_kd.mldr_kd_loss(x.student, x.teacher, 2.0, 1.0),
        draw(22, (16, 10), scales=(1, 2)),
        0.5427681699,
        0.0420985238,
    ),
    "srrl, feature means: jingyang2017/KD_SRRL AIN.py at d2e802f": Golden(
        lambda x: srrl.feature_mean_loss(x.student, x.teacher),
        draw(22, (8, 12, 4, 4)),
        0.1079990845,
        0.0167704387,
    ),
    "srd: roymiles/Simple-Recipe-Distillation single.py at 31e8477": Golden(
        lambda x: srd.srd_loss(x.student, x.teacher), draw(22, (32, 24)), 9.1023061929, 0.1041189757
    ),
    # There BN has eps 0, here 1e-4.
    "srd, correlation: roymiles/Simple-Recipe-Distillation deit/models.py at 31e8477": Golden(
        lambda x: srd.srd_loss(x.student, x.teacher, 4, "correlation"),
        draw(22, (32, 24)),
        3.2682907996,
        0.1508000343,
        tolerance=2e-4,
    ),
    "vkd: roymiles/VkD engine.py at 6f8a507": Golden(
        lambda x: vkd.vkd_loss(x.student, x.teacher), draw(22, (32, 24)), 0.7460182632, 0.0291328857
    ),
}


def check(loss: Tensor, source: Tensor, value: float, gradient_norm: float) -> None:
    (gradient,) = torch.autograd.grad(loss, source)
    assert loss.item() == pytest.approx(value, rel=2e-5)
    assert gradient.norm().item() == pytest.approx(gradient_norm, rel=2e-5)


def test_crds_loss_is_the_authors() -> None:
    """`ContrastLoss` of megvii-research/mdistiller CRD.py at a08d46f: 16 negatives of 50 images, tau 0.5."""
    generator = torch.Generator().manual_seed(57)
    cosines = torch.randn(6, 17, generator=generator, dtype=torch.float64, requires_grad=True)
    similar = cosines / 0.5
    log_mean = similar.detach().exp().mean().log()
    loss = crd.nce_loss(crd.Similarities(similar[:, 0], similar[:, 1:], log_mean), torch.ones(6, 16))
    check(loss, cosines, 5.18635947, 0.859535022)


def test_cirkds_memory_loss_is_the_authors() -> None:
    """`contrast_sim_kd` of winycg/CIRKD cirkd_memory.py at dab64db, for 30 remembered vectors."""
    generator = torch.Generator().manual_seed(58)
    student, teacher = (torch.randn(2, 12, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    vectors = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    loss = cirkd.memory_loss(student, teacher, torch.nn.functional.normalize(vectors, dim=1))
    check(loss, student, 4.9958503, 0.340762757)


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_authors_program(name: str) -> None:
    golden = GOLDEN[name]
    student = golden.inputs.student.clone().requires_grad_()
    inputs = Inputs(student, golden.inputs.teacher, golden.inputs.labels, golden.inputs.extra)
    loss = golden.loss(inputs)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(golden.value, rel=2e-5)
    assert gradient.norm().item() == pytest.approx(golden.gradient_norm, rel=golden.tolerance)
