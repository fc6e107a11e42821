"""CIRKD against loops over pixels in float64, its queues against lists, its workers against one process."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_group
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from heterokd.methods._class_queues import ClassQueues
from heterokd.methods.cirkd import CIRKD, PIXELS_PER_CLASS, Memory, memory_loss, minibatch_loss
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec
from heterokd.training.distiller import Distiller
from heterokd.training.task_modules import SegmentationTask

STUDENT = OutputSpec(num_classes=3, embedding_dim=5, stages=(), image_size=24)
TEACHER = OutputSpec(num_classes=3, embedding_dim=7, stages=(), image_size=24)
TAU = 0.1


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_labels(*shape: int, num_classes: int = 3, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(*shape, generator=generator) < 0.25, IGNORE)


def slow_divergence(student: Tensor, teacher: Tensor, others: list[tuple[Tensor, Tensor]]) -> float:
    """KL of one pixel's resemblances to others (their student's and their teacher's vectors)."""

    def unit(x: Tensor) -> Tensor:
        return x.double() / x.double().norm()

    sides = []
    for own, side in ((student, 0), (teacher, 1)):
        exponents = [torch.exp(unit(own) @ unit(other[side]) / TAU) for other in others]
        sides.append([(e / sum(exponents)).item() for e in exponents])
    return sum(t * math.log(t / s) for s, t in zip(*sides, strict=True))


def pixels_of(student: Tensor, teacher: Tensor, valid: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """The valid pixels of every image, both networks' vectors."""
    B, _, H, W = student.shape
    return [
        [(student[b, :, y, x], teacher[b, :, y, x]) for y in range(H) for x in range(W) if valid[b, y, x]]
        for b in range(B)
    ]


def slow_minibatch(student: Tensor, teacher: Tensor, valid: Tensor) -> float:
    images = [image for image in pixels_of(student, teacher, valid) if image]
    means = [sum(slow_divergence(s, t, others) for s, t in image) / len(image) for image in images for others in images]
    return sum(means) / len(means)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_minibatch_equals_loops(batch_size: int) -> None:
    student, teacher = normal(batch_size, 5, 3, 4, seed=0), normal(batch_size, 7, 3, 4, seed=1)
    valid = random_labels(batch_size, 3, 4) != IGNORE
    everybody = torch.ones_like(valid)
    assert not valid.all()
    found = minibatch_loss(student, teacher).item()
    assert found == pytest.approx(slow_minibatch(student, teacher, everybody), rel=1e-4)
    found = minibatch_loss(student, teacher, valid).item()
    assert found == pytest.approx(slow_minibatch(student, teacher, valid), rel=1e-4)


def test_an_image_without_valid_pixels_is_as_if_absent() -> None:
    student, teacher = normal(3, 5, 3, 4, seed=0), normal(3, 7, 3, 4, seed=1)
    valid = torch.ones(3, 3, 4, dtype=torch.bool)
    valid[1] = False
    expected = minibatch_loss(student[[0, 2]], teacher[[0, 2]])
    torch.testing.assert_close(minibatch_loss(student, teacher, valid), expected)


def test_pooling_averages_valid_pixels() -> None:
    student, teacher = normal(2, 5, 3, 5, seed=0), normal(2, 7, 3, 5, seed=1)
    valid = random_labels(2, 3, 5) != IGNORE
    valid[0, :2, :2] = False

    def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of two with a rest, and which hold a valid pixel."""
        out, some = torch.ones(2, x.shape[1], 2, 3), torch.zeros(2, 2, 3, dtype=torch.bool)
        for b in range(2):
            for y in range(2):
                for z in range(3):
                    rows, columns = slice(2 * y, 2 * y + 2), slice(2 * z, 2 * z + 2)
                    if valid[b, rows, columns].any():
                        out[b, :, y, z] = x[b, :, rows, columns][:, valid[b, rows, columns]].mean(dim=1)
                        some[b, y, z] = True
        return out, some

    expected = slow_minibatch(pooled(student)[0], pooled(teacher)[0], pooled(student)[1])
    assert minibatch_loss(student, teacher, valid, pooling=2).item() == pytest.approx(expected, rel=1e-4)


def test_memory_equals_loops() -> None:
    student, teacher, remembered = normal(2, 7, 3, 4, seed=0), normal(2, 7, 3, 4, seed=1), normal(10, 7, seed=2)
    remembered = torch.nn.functional.normalize(remembered, dim=1)
    valid = random_labels(2, 3, 4) != IGNORE
    others = [(row, row) for row in remembered]
    for mask, given in ((valid, valid), (torch.ones_like(valid), None)):
        pixels = [pixel for image in pixels_of(student, teacher, mask) for pixel in image]
        expected = sum(slow_divergence(s, t, others) for s, t in pixels) / len(pixels)
        assert memory_loss(student, teacher, remembered, given).item() == pytest.approx(expected, rel=1e-4)


def test_gradients_equal_finite_differences() -> None:
    """The recomputation in the backward pass included; single precision, so differences are wide."""
    teacher, remembered = normal(2, 7, 2, 3, seed=1), torch.nn.functional.normalize(normal(10, 7, seed=2), dim=1)
    direction, step = normal(2, 7, 2, 3, seed=3), 1e-2
    for loss in (lambda x: minibatch_loss(x, teacher), lambda x: memory_loss(x, teacher, remembered)):
        student = normal(2, 7, 2, 3, seed=0).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(student), student)
        with torch.no_grad():
            difference = (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_the_teacher_itself_has_no_loss() -> None:
    teacher = normal(2, 7, 3, 4, seed=1)
    assert minibatch_loss(teacher * 3, teacher).item() == pytest.approx(0, abs=1e-6)
    assert memory_loss(teacher * 3, teacher, normal(10, 7, seed=2)).item() == pytest.approx(0, abs=1e-6)


# --- queues --------------------------------------------------------------------------------------------------------


def test_a_queue_is_a_ring_of_its_class() -> None:
    torch.manual_seed(0)
    queues, size = ClassQueues(3, 5, 4), 5
    begin = queues.vectors.clone()
    torch.testing.assert_close(begin.float().norm(dim=2), torch.ones(3, 5), rtol=0, atol=1e-3)
    expected: list[deque[Tensor]] = [deque(maxlen=size) for _ in range(3)]
    written = [0, 0, 0]
    for step, length in enumerate((4, 1, 9, 20, 0, 3)):  # 20: more of a class than its ring holds
        vectors = normal(length, 4, seed=step)
        classes = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(step))
        classes[classes == 1] = 3  # no vector of class 1 ever comes, and 3 is no class
        queues.push(vectors, classes)
        for vector, label in zip(vectors, classes.tolist(), strict=True):
            if label < 3:
                expected[label].append(vector.half())
                written[label] += 1
        for label in (0, 2):
            start = max(written[label] - size, 0)
            for k, vector in enumerate(expected[label]):
                assert torch.equal(queues.vectors[label, (start + k) % size], vector)
        assert torch.equal(queues.vectors[1], begin[1])
        assert queues.pointers.tolist() == [n % size for n in written]
    assert max(written) > 2 * size


def test_samples_are_the_same_places_of_all_classes_and_others_every_step() -> None:
    torch.manual_seed(0)
    queues = ClassQueues(2, 50, 4)
    found = queues.sample(10, 0.3, -1)
    places = [
        [row.equal(other) for other in queues.vectors[k].float()].index(True)
        for k in (0, 1)
        for row in found[10 * k : 10 * k + 10]
    ]
    assert places[:10] == places[10:]
    assert len(set(places)) == 10
    assert torch.equal(queues.sample(10, 0.3, -1), found)
    assert not torch.equal(queues.sample(10, 0.3, -2), found)
    assert not torch.equal(queues.sample(10, 0.31, -1), found)
    assert queues.sample(99, 0.3, -1).shape == (100, 4)


def test_a_batch_is_remembered_by_class() -> None:
    """Region means and the chosen pixels, followed with loops; class 2 is in no image, the last image is ignored."""
    torch.manual_seed(0)
    memory, maps = Memory(3, 7, 100, 10), normal(4, 7, 6, 8, seed=0)
    labels = random_labels(4, 6, 8, num_classes=2)
    labels[1][labels[1] == 0] = 1  # one image of one class
    labels[3] = IGNORE
    begin = copy.deepcopy(memory)
    memory.write(maps, labels, torch.tensor([4, 9, 2, 7]), 0.5)
    unit = maps.double() / maps.double().norm(dim=1, keepdim=True)
    numbers = {0: 0, 1: 0, 2: 0}
    regions = {0: 0, 1: 0, 2: 0}
    for b in range(4):
        for label in range(3):
            members = unit[b][:, labels[b] == label].T
            if not len(members):
                continue
            mean = members.mean(dim=0) / members.mean(dim=0).norm()
            found = memory.regions.vectors[label, regions[label]].double()
            torch.testing.assert_close(found, mean, rtol=0, atol=1e-3)
            regions[label] += 1
            count = min(len(members), PIXELS_PER_CLASS)
            chosen = memory.pixels.vectors[label, numbers[label] : numbers[label] + count].double()
            distance = torch.cdist(chosen, members)
            assert (distance.min(dim=1).values < 1e-2).all(), "a pixel of another class or image"
            assert len(set(distance.argmin(dim=1).tolist())) == count, "a pixel twice"
            numbers[label] += count
    assert (labels[0] == 0).sum() > PIXELS_PER_CLASS
    assert memory.regions.pointers.tolist() == list(regions.values()) == [2, 3, 0]
    assert memory.pixels.pointers.tolist() == list(numbers.values())
    for label in range(3):
        assert torch.equal(
            memory.pixels.vectors[label, numbers[label] :], begin.pixels.vectors[label, numbers[label] :]
        )


def test_pixels_are_chosen_at_random_by_image_and_progress() -> None:
    maps, labels = normal(2, 7, 8, 8, seed=0), torch.zeros(2, 8, 8, dtype=torch.long)

    def remembered(index: list[int], progress: float) -> Tensor:
        torch.manual_seed(0)
        memory = Memory(2, 7, 2 * PIXELS_PER_CLASS, 4)
        memory.write(maps, labels, torch.tensor(index), progress)
        return memory.pixels.vectors[0]

    first = remembered([3, 4], 0.1)
    assert torch.equal(remembered([3, 4], 0.1), first)
    assert not torch.equal(remembered([3, 5], 0.1), first)
    assert not torch.equal(remembered([3, 4], 0.2), first)
    leading = torch.nn.functional.normalize(maps[0].flatten(1).T[:PIXELS_PER_CLASS], dim=1).half()
    assert not torch.equal(first[:PIXELS_PER_CLASS], leading)


# --- the method ----------------------------------------------------------------------------------------------------


def small(num_classes: int = 3, **params: object) -> CIRKD:
    """Unlike widths; student's stride 4, teacher's 8."""
    torch.manual_seed(0)
    sizes = {"pixel_memory": 40, "region_memory": 10, "pixel_contrast": 60, "region_contrast": 9}
    specs = [OutputSpec(num_classes, dim, (), 24) for dim in (STUDENT.embedding_dim, TEACHER.embedding_dim)]
    return CIRKD(CIRKD.Params.model_validate({**sizes, **params}), *specs)


def inputs(
    batch_size: int = 2, seed: int = 0, num_classes: int = 3, scale: float = 1
) -> tuple[Outputs, Outputs, Batch]:
    student = normal(batch_size, num_classes, 6, 6, seed=seed), normal(batch_size, 5, 6, 6, seed=seed + 1)
    teacher = normal(batch_size, num_classes, 3, 3, seed=seed + 2), normal(batch_size, 7, 3, 3, seed=seed + 3)
    labels = random_labels(batch_size, 24, 24, num_classes=num_classes, seed=seed)
    batch = Batch(torch.zeros(batch_size, 3, 24, 24), labels, torch.arange(batch_size) + 10 * seed)
    sides = [Outputs(each[0] * scale, (each[1] * scale).requires_grad_()) for each in (student, teacher)]
    return sides[0], sides[1], batch


def test_terms_are_weighted_and_reach_student_and_projector() -> None:
    weights = {"kd_weight": 2.0, "minibatch_weight": 3.0, "pixel_weight": 5.0, "region_weight": 7.0}
    student, teacher, batch = inputs()
    terms = small(**weights)(student, teacher, batch, 0.0)
    single = small(**dict.fromkeys(weights, 1.0))(student, teacher, batch, 0.0)
    assert list(terms) == ["kd", "minibatch", "pixel", "region"]
    for (name, term), weight in zip(terms.items(), weights.values(), strict=True):
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(weight * single[name].item(), rel=1e-6)
    assert single["kd"].item() == pixel_kd_loss(student.logits, teacher.logits, batch.labels).item()
    method = small()
    torch.stack(list(method(student, teacher, batch, 0.0).values())).sum().backward()
    assert student.embedding.grad is not None
    assert teacher.embedding.grad is None
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in method.parameters())


def test_a_checkpoint_resumes_exactly() -> None:
    method, fresh = small(), small()
    first, second = inputs(seed=0), inputs(seed=1)
    for one in (first, second):
        method(*one, 0.25)
    fresh.load_state_dict(copy.deepcopy(method.state_dict()))
    torch.manual_seed(77)
    expected = method(*first, 0.5)
    torch.manual_seed(78)
    assert fresh(*first, 0.5) == expected
    assert small()(*first, 0.5)["pixel"] != expected["pixel"]


@pytest.mark.parametrize("case", ["one image", "two classes", "nothing valid", "large", "one class in the batch"])
def test_edge_cases_are_finite(case: str) -> None:
    num_classes = 2 if case == "two classes" else 3
    student, teacher, batch = inputs(
        1 if case == "one image" else 2, num_classes=num_classes, scale=6e4 if case == "large" else 1
    )
    if case == "nothing valid":
        batch.labels.fill_(IGNORE)
    if case == "one class in the batch":
        batch.labels.fill_(1)
    method = small(num_classes)
    before = method.memory.pixels.vectors.clone()
    terms = method(student, teacher, batch, 1.0)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.embedding.grad is not None
    assert student.embedding.grad.isfinite().all()
    assert method.memory.pixels.vectors.isfinite().all()
    if case == "nothing valid":
        assert all(term == 0 for term in terms.values())
        assert torch.equal(method.memory.pixels.vectors, before)
        assert method.memory.pixels.pointers.tolist() == [0] * num_classes


def test_bfloat16_maps_give_nearly_the_same() -> None:
    student, teacher, batch = inputs()
    expected = small()(student, teacher, batch, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = small()(student.map(torch.Tensor.bfloat16), teacher.map(torch.Tensor.bfloat16), batch, 0.0)
    for name, term in found.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(expected[name].item(), rel=0.05)


def test_training_aligns_the_resemblances() -> None:
    torch.manual_seed(0)
    method, (_, teacher, batch) = small(), inputs()
    student = (0.1 * torch.randn(2, 5, 6, 6)).requires_grad_()
    logits = torch.zeros(2, 3, 6, 6)
    optimizer = torch.optim.Adam([student, *method.parameters()], lr=0.02)
    losses = []
    for step in range(40):
        terms = method(Outputs(logits, student), teacher, batch, step / 40)
        loss = torch.stack([terms[name] for name in ("minibatch", "pixel", "region")]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# --- workers -------------------------------------------------------------------------------------------------------


class Distilled(torch.nn.Module):
    """A student of one convolution, and the method: what data-parallel training wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.method = small(gather=True, kd_weight=0)
        self.student = torch.nn.Conv2d(3, STUDENT.embedding_dim, 1)

    def forward(self, batch: Batch, teacher: Outputs, progress: float) -> Tensor:
        student = Outputs(teacher.logits, self.student(batch.images[:, :, ::4, ::4]))
        return torch.stack(list(self.method(student, teacher, batch, progress).values())).sum()


def train(rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps of this worker's share of four images: losses and last state."""
    distilled = Distilled()
    wrapped = DistributedDataParallel(distilled) if world_size > 1 else distilled
    optimizer, losses = torch.optim.SGD(distilled.parameters(), lr=0.1), []
    share = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    for step in range(2):
        _, teacher, batch = inputs(4, seed=step)
        images = normal(4, 3, 24, 24, seed=step + 20)
        loss = wrapped(
            Batch(images[share], batch.labels[share], batch.index[share]),
            Outputs(teacher.logits[share], teacher.embedding[share].detach()),
            step / 2,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, distilled.state_dict()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(train(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gathering_workers_equal_one_process(tmp_path: Path) -> None:
    start_group(worker, 2, str(tmp_path))
    expected_losses, expected = train(0, 1)
    for rank in range(2):
        losses, state = torch.load(tmp_path / f"{rank}.pt")
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one worker."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_workers_copy_the_queues_under_autocast(alone: None) -> None:
    wrapped = DistributedDataParallel(Distilled())
    _, teacher, batch = inputs(4)
    batch = Batch(normal(4, 3, 24, 24, seed=0), batch.labels, batch.index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(2):  # buffers are copied before the second
            assert wrapped(batch, teacher, step / 2).isfinite()


def test_a_distiller_keeps_its_queues_from_being_copied(alone: None) -> None:
    method = small()
    distiller = Distiller(torch.nn.BatchNorm2d(3), method, SegmentationTask(3))
    copied = {buffer.data_ptr() for buffer in DistributedDataParallel(distiller).modules_buffers}
    kept = {buffer.data_ptr() for buffer in method.memory.buffers()}
    assert len(kept) == 4
    assert not kept & copied
    assert distiller.student.running_mean.data_ptr() in copied
    assert "method.memory.pixels.bits" in distiller.state_dict()
