"""TeKAP on features against CRD, which has its own recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heterokd.methods.crd import CRD, Similarities, nce_loss
from heterokd.methods.tekap import normal_noise
from heterokd.methods.tekap_feature import TeKAPFeature, tekap_feature_loss
from heterokd.outputs import Batch, Outputs, OutputSpec

STUDENT = OutputSpec(num_classes=5, embedding_dim=6, stages=())
TEACHER = OutputSpec(num_classes=5, embedding_dim=9, stages=())
SMALL = {"bank_size": 16, "negatives": 8, "width": 4}
BATCH = Batch(torch.zeros(4, 3, 4, 4), torch.tensor([0, 1, 2, 1]), torch.tensor([3, 7, 9, 10]))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**params: object) -> TeKAPFeature:
    torch.manual_seed(0)
    return TeKAPFeature(TeKAPFeature.Params.model_validate({**SMALL, **params}), STUDENT, TEACHER)


def run(method: TeKAPFeature | CRD, seed: int = 0, progress: float = 0.25) -> dict[str, float]:
    student, teacher = Outputs(embedding=normal(4, 6, seed=seed)), Outputs(embedding=normal(4, 9, seed=seed + 100))
    return {name: term.item() for name, term in method(student, teacher, BATCH, progress).items()}


def test_without_noise_it_is_crd_with_more_weight() -> None:
    torch.manual_seed(0)
    crd = CRD(CRD.Params.model_validate({**SMALL, "weight": 1.0}), STUDENT, TEACHER)
    method = build(noise_share=0.0, copies=3, perturbed_weight=0.5, memory_updates="once")
    for seed in (0, 1):
        expected = run(crd, seed)["crd"]
        assert run(method, seed) == pytest.approx({"crd": 0.8 * expected, "perturbed": 1.5 * expected}, rel=1e-5)


def test_updated_once_the_memory_keeps_the_teacher_as_it_is() -> None:
    quiet, loud = (build(noise_share=share, noise_scale=3.0, memory_updates="once") for share in (0.0, 0.9))
    terms = run(quiet), run(loud)
    assert terms[0]["crd"] == terms[1]["crd"]
    assert terms[0]["perturbed"] != pytest.approx(terms[1]["perturbed"], rel=1e-2)
    for key, value in quiet.state_dict().items():
        torch.testing.assert_close(value, loud.state_dict()[key], rtol=0, atol=0)


def test_each_copy_updates_the_memory_with_itself_and_the_student() -> None:
    method = build(noise_share=0.3, noise_scale=0.5, copies=2, momentum=0.75)
    run(method)
    contrast, memory = method.contrast, method.contrast.memory
    student, teacher = (F.normalize(contrast.embed_student(normal(4, 6, seed=0)), dim=1), normal(4, 9, seed=100))
    noises = normal_noise(BATCH.index, 0.25, 2, 9)
    seen = [teacher, *(0.7 * teacher + 0.3 * 0.5 * noise for noise in noises)]
    first, *others = (F.normalize(contrast.embed_teacher(each), dim=1) for each in seen)
    row = first
    for other in others:
        row = F.normalize(0.75 * row + 0.25 * other, dim=1)
    torch.testing.assert_close(memory.teacher[BATCH.index], row)
    torch.testing.assert_close(memory.student[BATCH.index], student)


def test_perturbed_term_equals_a_recomputation() -> None:
    """The second term by hand: perturb, embed, compare with the student's memory; the student's direction stays."""
    method = build(noise_share=0.3, noise_scale=0.5, copies=2, memory_updates="once")
    terms = run(method)
    contrast, memory = method.contrast, method.contrast.memory
    counts = memory.draw(BATCH.labels, BATCH.index, 0.25, 8)
    embedded = F.normalize(contrast.embed_student(normal(4, 6, seed=0)), dim=1)
    clean = F.normalize(contrast.embed_teacher(normal(4, 9, seed=100)), dim=1)

    def side(own: torch.Tensor, other: torch.Tensor, bank: torch.Tensor, direction: int) -> torch.Tensor:
        # The first step: positives are the present embeddings.
        compared = (own * other).sum(1) / 0.07, own @ bank.T / 0.07
        return nce_loss(Similarities(*compared, memory.log_means[direction]), counts)

    student_side = side(embedded, clean, memory.teacher, 0)
    expected = 0.0
    for noise in normal_noise(BATCH.index, 0.25, 2, 9):
        perturbed = F.normalize(contrast.embed_teacher(0.7 * normal(4, 9, seed=100) + 0.3 * 0.5 * noise), dim=1)
        expected += (student_side + side(perturbed, embedded, memory.student, 1)).item()
    assert terms["perturbed"] == pytest.approx(0.8 * expected, rel=1e-5)
    assert terms["crd"] == pytest.approx(
        0.8 * (student_side + side(clean, embedded, memory.student, 1)).item(), rel=1e-5
    )


def test_loss_sums_the_weighted_terms() -> None:
    one, two, three = (
        Similarities(normal(3, seed=seed), normal(3, 5, seed=seed + 10), torch.tensor(0.1)) for seed in (0, 1, 2)
    )
    counts = torch.ones(3, 5)
    a, b, c = (nce_loss(x, counts).item() for x in (one, two, three))
    loss = tekap_feature_loss(one, two, [three, two], counts, 0.5, 2.0).item()
    assert loss == pytest.approx(0.5 * (a + b) + 2.0 * (2 * a + b + c), rel=1e-5)
