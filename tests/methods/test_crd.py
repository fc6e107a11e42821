"""CRD against loops in float64, and against the quotients that the authors' code computes."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from heterokd.methods._random_words import draw_counts, random_words
from heterokd.methods.crd import CRD, ContrastMemory, Similarities, crd_loss
from heterokd.outputs import Batch, Outputs, OutputSpec

STUDENT = OutputSpec(num_classes=5, embedding_dim=6, stages=())
TEACHER = OutputSpec(num_classes=5, embedding_dim=9, stages=())
TAU = 0.07


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(labels: list[int], index: list[int]) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 4, 4), torch.tensor(labels), torch.tensor(index))


def run(method: CRD, batch: Batch, seed: int = 0, progress: float = 0.0) -> torch.Tensor:
    student, teacher = normal(len(batch), 6, seed=seed), normal(len(batch), 9, seed=seed + 100)
    terms = method(Outputs(embedding=student), Outputs(embedding=teacher), batch, progress)
    assert terms.keys() == {"crd"}
    return terms["crd"]


def small(**params: object) -> CRD:
    torch.manual_seed(0)
    return CRD(CRD.Params.model_validate({"bank_size": 16, "negatives": 8, "width": 4, **params}), STUDENT, TEACHER)


def slow_nce(positive: float, negatives: list[float], mean: float, images: int) -> float:
    """As the authors' code has it: probabilities of a bank of `images`, Z = mean * images, noise 1 / images, 1e-7."""
    noise = len(negatives) / images
    p = math.exp(positive) / (mean * images)
    total = -math.log(p / (p + noise + 1e-7))
    for negative in negatives:
        q = math.exp(negative) / (mean * images)
        total -= math.log(noise / (q + noise + 1e-7))
    return total


def test_loss_equals_the_authors_quotients() -> None:
    unit = [F.normalize(normal(*shape, seed=seed), dim=1) for seed, shape in enumerate([(3, 4), (3, 4), (10, 4)])]
    positive, bank = (unit[0] * unit[1]).sum(1) / TAU, unit[0] @ unit[2].T / TAU
    counts = torch.randint(0, 4, (3, 10), generator=torch.Generator().manual_seed(5))
    means = (2.5, 7.0)
    student = Similarities(positive, bank, torch.tensor(means[0]).log())
    teacher = Similarities(positive.flip(0), bank.flip(1), torch.tensor(means[1]).log())
    expected = 0.0
    for side, mean in ((student, means[0]), (teacher, means[1])):
        for i in range(3):
            negatives = [v for v, n in zip(side.bank[i].tolist(), counts[i].tolist(), strict=True) for _ in range(n)]
            expected += slow_nce(side.positive[i].item(), negatives, mean, images=50) / 3
    assert crd_loss(student, teacher, counts.float()).item() == pytest.approx(expected, rel=1e-5)


def test_two_steps_equal_a_slow_recomputation() -> None:
    """Memory, marks, negatives, constants and loss, followed by hand through two batches that share images."""
    method = small(weight=0.5)
    embed = method.contrast.embed_student, method.contrast.embed_teacher
    remembered: dict[int, tuple[list[torch.Tensor], int]] = {}
    constants: list[float] = []
    for step, (labels, index) in enumerate([([0, 1, 2, 1], [3, 7, 9, 10]), ([1, 4, 0, 2], [7, 11, 12, 9])]):
        batch, progress = batch_of(labels, index), step / 2
        given = [normal(4, 6, seed=step).double(), normal(4, 9, seed=step + 100).double()]
        units = []
        for layer, x in zip(embed, given, strict=True):
            y = x @ layer.weight.detach().double().T + layer.bias.detach().double()
            units.append(y / y.norm(dim=1, keepdim=True))
        positives = [remembered[i][0] if i in remembered else [u[b] for u in units] for b, i in enumerate(index)]
        for b, i in enumerate(index):
            mixed = [0.5 * old + 0.5 * u[b] for old, u in zip(positives[b], units, strict=True)]
            remembered[i] = [m / m.norm() for m in mixed], labels[b]
        words = random_words(batch.index, progress, 8)
        # Rows by class, then by number: the order in which draws count them.
        rows = sorted(remembered, key=lambda i: (remembered[i][1], i))
        scores = []
        for b in range(4):
            others = [i for i in rows if remembered[i][1] != labels[b]]
            drawn = [others[word % len(others)] for word in words[b].tolist()]
            pair = []
            for side in (0, 1):  # the student's embedding with the teacher's memory, then the reverse
                e = units[side][b]
                pair.append(
                    [(e @ positives[b][1 - side]).item() / TAU]
                    + [(e @ remembered[i][0][1 - side]).item() / TAU for i in drawn]
                )
            scores.append(pair)
        if not constants:
            constants = [sum(math.exp(v) for pair in scores for v in pair[side]) / 36 for side in (0, 1)]
        expected = 0.0
        for pair in scores:
            for side in (0, 1):
                expected += slow_nce(pair[side][0], pair[side][1:], constants[side], images=16) / 4
        assert run(method, batch, step, progress).item() == pytest.approx(0.5 * expected, rel=1e-4)
    torch.testing.assert_close(method.contrast.memory.log_means.exp().tolist(), constants, rtol=1e-4, atol=0)
    for i, (vectors, label) in remembered.items():
        memory = method.contrast.memory
        assert (memory.owners[i].item(), memory.classes[i].item()) == (i, label)
        torch.testing.assert_close(memory.student[i].double(), vectors[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(memory.teacher[i].double(), vectors[1], rtol=0, atol=1e-6)


def filled(rows: int, classes: list[int]) -> ContrastMemory:
    memory = ContrastMemory(rows, 4)
    x = F.normalize(normal(len(classes), 4, seed=0), dim=1)
    memory.write(x, x, torch.tensor(classes), torch.arange(len(classes)))
    return memory


def test_negatives_are_uniform_over_filled_rows_of_other_classes() -> None:
    memory = filled(12, [2, 0, 1, 1, 2, 0, 3, 1])
    counts = memory.draw(torch.tensor([1, 0, 4]), torch.tensor([2, 1, 99]), 0.3, 30000)
    assert torch.equal(counts.sum(1), torch.full((3,), 30000.0))
    for row, label in enumerate((1, 0, 4)):
        allowed = [i for i, other in enumerate([2, 0, 1, 1, 2, 0, 3, 1]) if other != label]
        found = {i: n for i, n in enumerate(counts[row].tolist()) if n}
        assert sorted(found) == allowed
        assert all(n == pytest.approx(30000 / len(allowed), rel=0.1) for n in found.values())


def test_negatives_depend_on_image_and_progress_alone() -> None:
    index = torch.tensor([5, 0, 7])
    words = random_words(index, 0.25, 50)
    assert torch.equal(random_words(index.flip(0), 0.25, 50), words.flip(0))
    assert not torch.equal(random_words(index, 0.2500001, 50), words)
    assert len(Counter(words.flatten().tolist())) == 150
    assert 0 <= words.min() < words.max() < 2**32


@pytest.mark.parametrize("count", [1, 700, 70000])
def test_draws_are_words_modulo_the_limit(count: int) -> None:
    index, limits = torch.tensor([5, 0, 7, 2**31 + 3]), torch.tensor([[1], [2], [611], [997]])
    drawn = random_words(index, 0.25, count) % limits
    expected = torch.stack([row.bincount(minlength=1000) for row in drawn]).float()
    assert torch.equal(draw_counts(index, 0.25, count, limits, 1000), expected)


def test_rows_beyond_the_last_one_in_use_change_nothing() -> None:
    losses = []
    for rows in (16, 4096):
        method = small(bank_size=rows)
        losses.append([run(method, batch_of([0, 1, 2, 1], [3, 7, 9, 10]), seed, seed / 2).item() for seed in range(2)])
        assert method.contrast.memory.used() == 11
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_images_of_one_class_have_no_negatives_and_fix_no_constant() -> None:
    method = small()
    assert run(method, batch_of([1, 1, 1], [0, 1, 2])).item() == 0.0
    assert method.contrast.memory.log_means.isnan().all()
    assert run(method, batch_of([2], [3])).item() > 0
    assert method.contrast.memory.log_means.isfinite().all()


def test_a_shared_row_belongs_to_the_last_image() -> None:
    memory = ContrastMemory(4, 4)
    x, y = (F.normalize(normal(3, 4, seed=seed), dim=1) for seed in (0, 1))
    memory.write(x, y, torch.tensor([0, 1, 2]), torch.tensor([1, 5, 2]))
    assert memory.owners.tolist() == [-1, 5, 2, -1]
    assert memory.classes.tolist() == [-1, 1, 2, -1]
    torch.testing.assert_close(memory.student[1], x[1])
    student, teacher = memory.recall(y, x, torch.tensor([1, 5, 2]))
    torch.testing.assert_close(student, torch.stack((y[0], x[1], x[2])))
    torch.testing.assert_close(teacher, torch.stack((x[0], y[1], y[2])))


def test_a_checkpoint_resumes_exactly() -> None:
    method, fresh = small(), small()
    batches = [batch_of([0, 1, 2, 1], [3, 7, 9, 10]), batch_of([1, 4, 0, 2], [7, 11, 12, 9])]
    run(method, batches[0])
    fresh.load_state_dict(copy.deepcopy(method.state_dict()))
    assert run(method, batches[1], 1, 0.5).item() == run(fresh, batches[1], 1, 0.5).item()
    assert run(method, batches[1], 1, 0.5).item() != run(small(), batches[1], 1, 0.5).item()


def test_training_aligns_the_embeddings() -> None:
    torch.manual_seed(0)
    method = CRD(CRD.Params(bank_size=64, negatives=32, width=8), STUDENT, TEACHER)
    labels, index = torch.arange(40) % 5, torch.arange(40)
    batch = Batch(torch.zeros(40, 3, 4, 4), labels, index)
    teacher = normal(40, 9, seed=0)
    student = teacher @ normal(9, 6, seed=1)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    losses = []
    for step in range(60):
        loss = method(Outputs(embedding=student), Outputs(embedding=teacher), batch, step / 60)["crd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
