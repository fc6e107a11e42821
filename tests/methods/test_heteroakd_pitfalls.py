"""Seventeen ways to get HeteroAKD wrong, known from programs in circulation: each is written out, and shown to differ.

Every test holds the wrong form beside what the method does, on an input where the two part.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.methods import heteroakd
from heterokd.methods.heteroakd import HeteroAKD
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec, labels_at
from heterokd.training.distiller import Distiller
from heterokd.training.task_modules import SegmentationTask

K = 4


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Scores of student and teacher [2, K, 6, 6], and labels without IGNORE."""
    generator = torch.Generator().manual_seed(0)
    student_z, teacher_z = 2 * torch.randn(2, 2, K, 6, 6, generator=generator)
    return student_z.requires_grad_(), teacher_z.requires_grad_(), torch.randint(K, (2, 6, 6), generator=generator)


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, K).permute(0, 3, 1, 2).float()


def naive_entropy(z: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, one_hot(labels), reduction="none")


def method(**params: object) -> HeteroAKD:
    torch.manual_seed(0)
    return HeteroAKD(HeteroAKD.Params(**params), SPEC, OutputSpec(K, 10, (), 24, logits_stride=2))


SPEC = OutputSpec(K, 6, (), 24, logits_stride=4)


def given() -> tuple[Outputs, Outputs, Batch]:
    """A student at stride 4, a teacher at stride 2, labels at the images' size."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    student = Outputs(leaf(2, K, 6, 6), leaf(2, 6, 6, 6))
    teacher = Outputs(leaf(2, K, 12, 12), leaf(2, 10, 12, 12))
    labels = torch.randint(K, (2, 24, 24), generator=generator)
    labels[:, :8] = IGNORE
    return student, teacher, Batch(torch.zeros(2, 3, 24, 24), labels, torch.arange(2))


def test_01_divergence_with_its_sides_exchanged(case):
    student, teacher, _ = case
    wrong = F.kl_div(teacher.log_softmax(1), student.softmax(1), reduction="none").sum(1).mean()
    right = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()
    found = heteroakd.pixel_kd_loss(student, teacher)
    assert found.item() == pytest.approx(right.item(), rel=1e-5)
    assert found.item() != pytest.approx(wrong.item(), rel=1e-2)
    (moved,) = torch.autograd.grad(wrong, teacher, retain_graph=True)
    assert moved.abs().sum() > 0
    found.backward()
    assert teacher.grad is None


def test_02_divergence_summed_over_pixels(case):
    student, teacher, _ = case
    wrong = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    assert wrong.item() == pytest.approx(36 * heteroakd.pixel_kd_loss(student, teacher).item(), rel=1e-4)
    larger = [each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (student, teacher)]
    assert heteroakd.pixel_kd_loss(*larger).item() == pytest.approx(heteroakd.pixel_kd_loss(student, teacher).item())


def test_03_no_ignored_label(case):
    student_z, teacher_z, labels = case
    labels[0, :3] = IGNORE
    with pytest.raises(RuntimeError):
        one_hot(labels)
    assert heteroakd.heteroakd_loss(student_z, teacher_z, labels).isfinite()
    as_class_0 = heteroakd.heteroakd_loss(student_z, teacher_z, labels.where(labels != IGNORE, 0))
    assert heteroakd.heteroakd_loss(student_z, teacher_z, labels).item() != pytest.approx(as_class_0.item(), rel=1e-3)


def test_04_labels_of_the_images_size_beside_scores_at_a_stride(case):
    student_z, _, _ = case
    labels = torch.randint(K, (2, 24, 24))
    with pytest.raises(ValueError, match="must be the same as input size"):
        naive_entropy(student_z, labels)
    right = naive_entropy(student_z, labels_at(labels, (6, 6)))
    torch.testing.assert_close(heteroakd.per_class_entropy(student_z, labels), right)


def test_05_task_loss_on_logits_at_a_stride():
    student, _, batch = given()
    with pytest.raises(RuntimeError, match="size"):
        F.cross_entropy(student.logits, batch.labels, ignore_index=IGNORE)
    resized = F.interpolate(student.logits, (24, 24), mode="bilinear", align_corners=False)
    right = F.cross_entropy(resized, batch.labels, ignore_index=IGNORE)
    assert SegmentationTask(K)(student.logits, batch.labels).item() == pytest.approx(right.item(), rel=1e-5)


def test_06_relu_as_the_projectors_last_layer():
    student, teacher, batch = given()
    floor = math.log(2)  # what an absent class costs at least when no score is below 0
    for projector, can_call_absent in (("conv-bn-relu", False), ("conv-bn", True), ("conv-bn-relu-conv1x1", True)):
        student_z, _ = method(projector=projector)._projected(student, teacher)
        entropy = heteroakd.per_class_entropy(student_z, batch.labels)
        labels = labels_at(batch.labels, (6, 6)).unsqueeze(1)
        absent = (torch.arange(K).view(1, K, 1, 1) != labels) & (labels != IGNORE)
        assert (entropy[absent].min().item() < floor - 1e-3) is can_call_absent, projector
    assert HeteroAKD.Params().projector == "conv-bn"


def test_07_projectors_that_no_optimizer_knows():
    student = build_network("fpn-test_resnet", K, image_size=32)
    distiller = Distiller(student, HeteroAKD(None, student.spec, student.spec), SegmentationTask(K))
    wrong, right = (set(map(id, each.parameters())) for each in (student, distiller))
    projectors = {id(weight) for weight in distiller.method.parameters()}
    assert len(projectors) == 6
    assert not projectors & wrong
    assert projectors <= right
    before = [weight.detach().clone() for weight in distiller.method.parameters()]
    images, labels = torch.rand(2, 3, 32, 32), torch.randint(K, (2, 32, 32))
    with torch.no_grad():
        teacher = student(images, distiller.method.teacher_needs)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller(Batch(images, labels, torch.arange(2)), teacher, 1.0)[0].backward()
    optimizer.step()
    pairs = zip(before, distiller.method.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


def test_08_a_target_that_moves_towards_the_student(case):
    student_z, teacher_z, labels = case
    loose = HeteroAKD.Params(detach=False)
    (target_s, target_t) = torch.autograd.grad(
        heteroakd.heteroakd_loss(student_z, teacher_z, labels, loose), (student_z, teacher_z)
    )
    assert target_t.abs().sum() > 0
    loss = heteroakd.heteroakd_loss(student_z, teacher_z, labels)
    loss.backward()
    assert teacher_z.grad is None
    with torch.no_grad():
        _, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels)
        _, weights = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels)
        right = weights * (student_z.sigmoid() - hybrid_z.sigmoid()) / (2 * K)
    torch.testing.assert_close(student_z.grad, right)
    assert (target_s - right).abs().max() > 1e-3


def test_09_a_teacher_inside_the_trained_module():
    student = build_network("fpn-test_resnet", K, image_size=32)
    teacher = build_network("fpn-test_resnet", K, image_size=32).eval().requires_grad_(False)
    wrong = torch.nn.ModuleDict({"student": student, "teacher": teacher}).train()
    assert teacher.training  # its batch norms would move
    assert any(name.startswith("teacher.") for name in wrong.state_dict())
    teacher.eval()
    distiller = Distiller(student, HeteroAKD(None, student.spec, teacher.spec), SegmentationTask(K)).train()
    assert not teacher.training
    held = set(map(id, distiller.modules()))
    assert not any(id(module) in held for module in teacher.modules())


def test_10_two_denominators_and_raw_exponentials(case):
    student_z, teacher_z, labels = case
    _, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels)

    def wrong(student_z: Tensor) -> Tensor:
        H_s, H_hat = naive_entropy(student_z, labels), naive_entropy(hybrid_z, labels)
        gain = (H_s - H_hat).clamp(min=0)
        plain, raised = H_s.exp(), (H_s + gain).exp()
        return torch.where(gain > 0, raised / raised.sum((2, 3), True), plain / plain.sum((2, 3), True))

    _, right = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels)
    torch.testing.assert_close(right.sum((2, 3)), torch.ones(2, K))
    assert (wrong(student_z).sum((2, 3)) - 1).abs().max() > 0.01
    assert wrong(100 * student_z).isnan().any()
    _, large = heteroakd.knowledge_evaluation(100 * student_z, hybrid_z, labels)
    torch.testing.assert_close(large.sum((2, 3)), torch.ones(2, K))


def test_11_weights_that_sum_to_one_averaged_over_pixels_again(case):
    student_z, teacher_z, labels = (each.detach() for each in case)

    def wrong(student_z: Tensor, teacher_z: Tensor, labels: Tensor) -> Tensor:
        _, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels)
        _, weights = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels)
        return (weights * F.binary_cross_entropy_with_logits(student_z, hybrid_z.sigmoid(), reduction="none")).mean()

    right = heteroakd.heteroakd_loss(student_z, teacher_z, labels)
    assert right.item() == pytest.approx(36 * wrong(student_z, teacher_z, labels).item(), rel=1e-5)
    larger = [each.repeat_interleave(4, -1).repeat_interleave(4, -2) for each in (student_z, teacher_z, labels)]
    assert wrong(*larger).item() == pytest.approx(wrong(student_z, teacher_z, labels).item() / 16, rel=1e-4)
    assert heteroakd.heteroakd_loss(*larger).item() == pytest.approx(right.item(), rel=1e-4)


def test_12_cross_entropy_of_rounded_probabilities(case):
    _, _, labels = case
    student_z, teacher_z = torch.full((2, K, 6, 6), -200.0, requires_grad=True), torch.full((2, K, 6, 6), 2.0)
    weights, valid = torch.full_like(teacher_z, 1 / 36), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    wrong = (weights * F.binary_cross_entropy(student_z.sigmoid(), teacher_z.sigmoid(), reduction="none")).sum()
    (stuck,) = torch.autograd.grad(wrong, student_z)
    assert stuck.abs().max() == 0
    found = heteroakd.transfer_loss(student_z, teacher_z, weights, valid)
    assert found.item() == pytest.approx(200 * torch.tensor(2.0).sigmoid().item(), rel=1e-4)
    found.backward()
    assert student_z.grad.abs().min() > 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heteroakd.heteroakd_loss(student_z, teacher_z, labels).isfinite()


def test_13_the_displayed_share_and_the_displayed_indicator(case):
    student_z, teacher_z, labels = case
    H_s, H_t = (heteroakd.per_class_entropy(z, labels) for z in (student_z, teacher_z))
    wrong = 1 - (H_t + H_s) / H_t
    share, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels)
    assert (wrong < 0).all()
    assert ((share >= 0) & (share <= 1)).all()
    torch.testing.assert_close(share, H_s / (H_s + H_t))
    gain, _ = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels)
    difference = H_s - heteroakd.per_class_entropy(hybrid_z, labels)
    assert (gain[difference <= 0] == 0).all()
    torch.testing.assert_close(gain, difference.clamp_min(0))
    assert ((1 + difference) - gain).median() > 0.9


def test_14_an_epsilon_that_half_precision_rounds_to_zero():
    certain = torch.tensor([[20.0, -20.0]], dtype=torch.float16).view(1, 2, 1, 1)
    labels = torch.zeros(1, 1, 1, dtype=torch.long)
    entropy = F.softplus(torch.tensor(-20.0, dtype=torch.float16))
    assert (entropy / (entropy + entropy + torch.tensor(1e-8, dtype=torch.float16))).isnan()
    share, hybrid_z = heteroakd.knowledge_mixing(certain, certain, labels)
    assert (share == 0.5).all()
    assert torch.equal(hybrid_z, certain.float())
    share, _ = heteroakd.knowledge_mixing(certain, 0.9 * certain, labels)  # both nearly certain, the student more so
    assert (share < 0.2).all()


def test_15_no_warm_up_and_weights_that_are_not_the_papers():
    params = HeteroAKD.Params()
    assert (params.kd_weight, params.weight, params.temperature) == (0.1, 1.0, 1.0)
    assert 0.2 <= params.warmup <= 0.3
    module, outputs = method(), given()
    early, late = (module(*outputs, progress) for progress in (0.0, 1.0))
    assert early["kd"].item() == early["hakd"].item() == 0 < early["projectors"].item()
    assert min(late["kd"].item(), late["hakd"].item()) > 0


def test_16_the_students_map_brought_to_the_teachers_grid():
    student, teacher, batch = given()
    module = method()
    student_z, teacher_z = module._projected(student, teacher)
    assert student_z.shape == teacher_z.shape == (2, K, 6, 6)
    wrong = F.interpolate(student_z, (12, 12), mode="bilinear", align_corners=False)
    assert wrong.numel() == 4 * student_z.numel()
    torch.testing.assert_close(student_z, module.student_projector(student.embedding))
    built = HeteroAKD(None, OutputSpec(K, 6, (), 24), OutputSpec(K, 77, (), 24))  # widths come from the specs
    assert built.teacher_projector[0].in_channels == 77
    assert all(term.isfinite() for term in module(student, teacher, batch, 1.0).values())


def test_17_maps_of_the_images_size_kept_for_the_backward_pass():
    student, teacher, batch = given()
    full_size = batch.labels.numel() * K * 4

    def largest_kept(loss: object) -> int:
        sizes = [0]

        def keep(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float32:
                sizes.append(tensor.numel() * 4)
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss()
        return max(sizes)

    def wrong() -> Tensor:
        projected = method()._projected(student, teacher)
        scores = [F.interpolate(z, (24, 24), mode="bilinear", align_corners=False) for z in projected]
        return heteroakd.heteroakd_loss(*scores, batch.labels, HeteroAKD.Params(detach=False))

    assert largest_kept(wrong) >= full_size
    for resolution in ("map", "label"):
        module = method(resolution=resolution)
        assert largest_kept(lambda module=module: module(student, teacher, batch, 1.0)) < full_size
