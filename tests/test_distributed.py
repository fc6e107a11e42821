"""Several data-parallel workers with `gather` train as one process with the whole batch does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import start_group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heterokd.distributed import gathered
from heterokd.methods import METHODS
from heterokd.methods.conformance.random_pairs import STUDENTS, TEACHERS, FakeTail
from heterokd.outputs import Batch, Outputs

BATCH_SIZE, STEPS = 12, 2
GROUPS = (2, 3)
STUDENT, TEACHER = STUDENTS["cnn"], TEACHERS["isotropic"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cc": ("cc", {"weight": 1.0}),
    "cc kernel": ("cc", {"weight": 1.0, "kind": "kernel"}),
    "crd": ("crd", {"bank_size": 8, "negatives": 7}),
    "dist": ("dist", {}),
    "fbt": ("fbt", {}),
    "rkd": ("rkd", {}),
    "rsd": ("rsd", {"hidden_dim": 32}),
    "tekap_feature": ("tekap_feature", {"bank_size": 32, "negatives": 16}),
}


class Student(nn.Module):
    """Linear maps of the image to every signal that a method may read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, STUDENT.embedding_dim)
        self.classify = nn.Linear(STUDENT.embedding_dim, STUDENT.num_classes)
        self.shapes = [(spec.channels, STUDENT.side(i), STUDENT.side(i)) for i, spec in enumerate(STUDENT.stages, 1)]
        self.maps = nn.ModuleList(nn.Linear(48, C * H * W) for C, H, W in self.shapes)

    def forward(self, images: Tensor) -> Outputs:
        x = images.flatten(1)
        embedding = self.embed(x).tanh()
        stages = tuple(layer(x).unflatten(1, shape) for layer, shape in zip(self.maps, self.shapes, strict=True))
        return Outputs(self.classify(embedding), embedding, stages)


class Distilled(nn.Module):
    def __init__(self, case: str, gather: bool) -> None:
        super().__init__()
        name, params = CASES[case]
        self.student = Student()
        self.method = METHODS[name](METHODS[name].Params(**params, gather=gather), STUDENT, TEACHER)

    def forward(self, batch: Batch, teacher: Outputs, progress: float) -> Tensor:
        student = self.student(batch.images).only(self.method.student_needs)
        terms = self.method(student, teacher.only(self.method.teacher_needs), batch, progress)
        return torch.stack(list(terms.values())).sum()


def train(case: str, rank: int, world_size: int, gather: bool) -> dict[str, Any]:
    """Two steps of this worker's share; its losses, its first gradients and its last weights and buffers."""
    torch.manual_seed(0)
    distilled = Distilled(case, gather)
    tail = FakeTail(TEACHER).requires_grad_(False)
    wrapped = DistributedDataParallel(distilled, find_unused_parameters=True) if world_size > 1 else distilled
    optimizer = torch.optim.SGD(distilled.parameters(), lr=0.01)
    share = slice(rank * BATCH_SIZE // world_size, (rank + 1) * BATCH_SIZE // world_size)
    losses, gradients = [], {}
    for step in range(STEPS):
        images, logits = torch.randn(BATCH_SIZE, 3, 4, 4), torch.randn(BATCH_SIZE, TEACHER.num_classes)
        embedding, labels = torch.randn(BATCH_SIZE, TEACHER.embedding_dim), torch.randint(0, 4, (BATCH_SIZE,))
        batch = Batch(images[share], labels[share], torch.randperm(BATCH_SIZE)[share])
        teacher = Outputs(logits[share], embedding[share], tail=tail)
        optimizer.zero_grad()
        loss = wrapped(batch, teacher, step / STEPS)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {key: x.grad.clone() for key, x in distilled.named_parameters() if x.grad is not None}
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "state": distilled.state_dict()}


def uneven_parts(rank: int) -> tuple[Tensor, Tensor]:
    """Rank r gives r + 1 numbers; every worker's loss is sum_i (i + 1) x_i^2 over all of them."""
    part = (torch.arange(rank + 1) + 10.0 * rank).requires_grad_()
    whole = gathered(part)
    (torch.arange(1, len(whole) + 1) * whole.square()).sum().backward()
    assert part.grad is not None
    return whole.detach(), part.grad


def worker(rank: int, folder: str) -> None:
    """One process of each group: starting processes is what takes time."""
    torch.set_num_threads(1)
    for world_size in GROUPS:
        if rank >= world_size:
            continue
        meet = f"file://{folder}/meet{world_size}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
        results: dict[str, Any] = {case: train(case, rank, world_size, gather=True) for case in CASES}
        results["without"] = train("rkd", rank, world_size, gather=False)
        results["uneven"] = uneven_parts(rank)
        torch.save(results, f"{folder}/{rank}of{world_size}.pt")
        dist.destroy_process_group()


@functools.cache
def alone(case: str) -> dict[str, Any]:
    return train(case, 0, 1, gather=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of all groups left what they found."""
    folder: Path = tmp_path_factory.mktemp("workers")
    start_group(worker, max(GROUPS), str(folder))
    return folder


@pytest.fixture(params=GROUPS, ids="{0} workers".format)
def workers(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each worker of a group found."""
    return [torch.load(folder / f"{rank}of{request.param}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_workers_equal_one_process(case: str, workers: list[dict[str, Any]]) -> None:
    expected = alone(case)
    for step in range(STEPS):
        mean = sum(found[case]["losses"][step] for found in workers) / len(workers)
        assert mean == pytest.approx(expected["losses"][step], rel=1e-5)
    for found in workers:
        assert found[case]["gradients"].keys() == expected["gradients"].keys()
        for part in ("gradients", "state"):
            for key, value in expected[part].items():
                torch.testing.assert_close(found[case][part][key], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=key)


def test_without_gathering_workers_find_something_else(workers: list[dict[str, Any]]) -> None:
    mean = sum(found["without"]["losses"][0] for found in workers) / len(workers)
    assert mean != pytest.approx(alone("rkd")["losses"][0], rel=1e-2)


def test_parts_of_unlike_length(workers: list[dict[str, Any]]) -> None:
    parts = [torch.arange(rank + 1) + 10.0 * rank for rank in range(len(workers))]
    whole, start = torch.cat(parts), 0
    gradient = 2 * torch.arange(1, len(whole) + 1) * whole
    for part, found in zip(parts, workers, strict=True):
        assert torch.equal(found["uneven"][0], whole)
        # A training weighs this worker's loss by its share of the images, times the number of workers.
        weight = len(part) * len(workers) / len(whole)
        torch.testing.assert_close(weight * found["uneven"][1], len(workers) * gradient[start : start + len(part)])
        start += len(part)


def test_one_process_keeps_its_tensor() -> None:
    tensor = torch.ones(3)
    assert gathered(tensor) is tensor
