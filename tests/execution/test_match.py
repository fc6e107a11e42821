"""CKA against slow float64 references, what is proposed from it, and a search that starts there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
import yaml
from command_line import Run
from PIL import Image
from torch import Tensor

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.errors import StudyError
from heterokd.execution.match import match, propose_starts
from heterokd.method import StageSimilarity
from heterokd.methods import METHODS
from heterokd.methods.fbt import FBT
from heterokd.methods.hcd import HCD
from heterokd.methods.ofa import OFA
from heterokd.networks.network import build_network
from heterokd.networks.weights import save_weights
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.plan.counts import count
from heterokd.study.study import Study
from heterokd.training.cka import MinibatchCKA, gram, unbiased_hsic

Write = Callable[..., Path]


def slow_hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Song et al., Eq. 4: the average over all ordered quadruples of different images, HSIC_1 by definition."""
    n = len(K)
    total, count = 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                        count += 1
    return total / count


def random_maps(generator: torch.Generator, images: int, *shape: int) -> Tensor:
    return torch.randn(images, *shape, generator=generator)


def test_hsic_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_maps(generator, 7, 3, 2, 2), random_maps(generator, 7, 5)
    second[:, :3] += first[:, :, 0, 0]
    K, L = (one.flatten(1).double().numpy() for one in (first, second))
    truth = slow_hsic(K @ K.T, L @ L.T)
    assert float(unbiased_hsic(gram(first), gram(second))) == pytest.approx(truth, rel=1e-10)
    with pytest.raises(ValueError, match="at least 4 images"):
        unbiased_hsic(gram(first[:3]), gram(second[:3]))


def test_minibatches_are_summed_as_the_paper_sums_them() -> None:
    generator = torch.Generator().manual_seed(1)
    first = [random_maps(generator, 24, 4, 3, 3), random_maps(generator, 24, 6)]
    second = [first[0].flatten(1) @ random_maps(generator, 36, 8), random_maps(generator, 24, 5, 2, 2)]
    alike = MinibatchCKA(2, 2)
    sums = np.zeros((2, 2, 3))
    for start in range(0, 24, 8):
        rows, columns = ([one[start : start + 8] for one in maps] for maps in (first, second))
        alike.add(rows, columns)
        for i, one in enumerate(rows):
            for j, other in enumerate(columns):
                K, L = (x.flatten(1).double().numpy() for x in (one, other))
                K, L = K @ K.T, L @ L.T
                sums[i, j] += slow_hsic(K, L), slow_hsic(K, K), slow_hsic(L, L)
    alike.add([one[:3] for one in first], [one[:3] for one in second])  # too few images: no change
    expected = sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])
    np.testing.assert_allclose(alike.matrix().numpy(), expected, rtol=1e-9)
    assert expected[0, 0] > 0.3 > abs(expected[1, 1])


def test_rotation_and_scale_change_nothing_and_small_batches_do_not_flatter() -> None:
    generator = torch.Generator().manual_seed(2)
    maps = random_maps(generator, 400, 6).double()
    rotation = torch.linalg.qr(random_maps(generator, 6, 6).double()).Q
    unrelated = random_maps(generator, 400, 300)
    alike = MinibatchCKA(1, 2)
    for start in range(0, 400, 8):
        rows = slice(start, start + 8)
        alike.add([maps[rows]], [3 * maps[rows] @ rotation, unrelated[rows]])
    same, other = alike.matrix()[0].tolist()
    assert same == pytest.approx(1.0, abs=1e-9)
    assert abs(other) < 0.1, "the biased estimator reads about 0.6 for wide maps in batches of 8"
    constant = MinibatchCKA(1, 1)
    constant.add([maps[:8]], [torch.ones(8, 5)])
    assert constant.matrix().item() == pytest.approx(0.0, abs=1e-6)


SIMILARITY = ((0.9, 0.2, 0.1, 0.0), (0.3, 0.6, 0.2, 0.1), (0.1, 0.3, 0.8, 0.3), (0.0, 0.1, 0.2, 0.4))


def test_what_is_proposed() -> None:
    methods = ("scratch", "fbt", "hcd", "ofa")
    starts = propose_starts(StageSimilarity(SIMILARITY, "cnn", "attention"), {name: METHODS[name] for name in methods})
    assert starts == (
        {"method": "fbt", "fbt.front_stage": 1, "fbt.back_stage": 2},
        {"method": "fbt", "fbt.front_stage": 3, "fbt.back_stage": 4},
        {"method": "hcd", "hcd.stages": "123"},
        {"method": "ofa", "ofa.stages": "34"},
    )
    lopsided = [[0.0] * 4 for _ in range(4)]
    lopsided[1][2] = 0.7  # the student's stage 2 and the teacher's stage 3
    student_front, teacher_front = (
        propose_starts(StageSimilarity(lopsided, *kinds), {"fbt": FBT})[0]
        for kinds in (("cnn", "attention"), ("mlp", "cnn"))
    )
    assert student_front == {"method": "fbt", "fbt.front_stage": 2, "fbt.back_stage": 4}
    assert teacher_front == {"method": "fbt", "fbt.front_stage": 3, "fbt.back_stage": 3}
    assert propose_starts(StageSimilarity(SIMILARITY, "cnn", "cnn"), {"kd": METHODS["kd"]}) == ()


def matched(tiny_file: Write, tmp_path: Path, **search: object) -> tuple[Experiment, Workspace, Path]:
    """An experiment of methods that pair stages, whose scratch student is there."""
    space = {"methods": ["scratch", "fbt", "hcd", "ofa"]}
    file = tiny_file(search={"space": space, "trials": 9, **search})
    experiment, root = load_experiment(file), fabricated.root_with_store(tmp_path)
    folder = root.study("tiny-distill")
    trial = folder.trial(0)
    snapshot = TrialSnapshot(TrialStatus.COMPLETE, "published", metrics={"val/top1": 0.5})
    trial.start(experiment.recipe(experiment.published("scratch")), snapshot)
    torch.manual_seed(0)
    save_weights(build_network("test_efficientnet", 10, image_size=32), trial.weights)
    return experiment, root, file


@pytest.mark.thorough
def test_a_pair_is_matched_and_its_search_starts_there(tiny_file: Write, tmp_path: Path) -> None:
    experiment, root, file = matched(tiny_file, tmp_path)
    asked = load_experiment(file, ["search.match_starts=true", "search.confirm_leaders=0"])
    found = match(experiment, root)
    assert all(-0.2 < value <= 1.0 + 1e-9 for row in found.similarity for value in row)
    assert [start["method"] for start in found.starts] == ["fbt", "fbt", "hcd", "ofa"]
    with Image.open(found.picture) as picture:
        assert picture.width == 1008
    assert "CKA" in json.loads((found.picture.parent / "captions.json").read_text())["match"]
    # The snippet is a search space as it stands.
    space = {"methods": ["fbt", "hcd", "ofa"], **yaml.safe_load(found.to_yaml())}
    narrowed = load_experiment(tiny_file(search={"space": space}))
    for start in found.starts:
        for key, value in start.items():
            assert key == "method" or value in narrowed.method_domains(str(start["method"]))[key]

    study = Study.open(asked, root.study("tiny"))
    samples = []
    starts = count(asked, {}, root.study("tiny")).starts
    assert 4 < len(starts) <= 8, "what is published already is not tried twice"
    for _ in starts:
        assignment = study.next()
        assert assignment is not None
        assert assignment != "wait"
        assert assignment.origin == "published"
        samples.append(assignment.sample)
        study.finish(assignment.number, "complete", {"val/top1": 0.5})
    published = {f"fbt.{name}": value for name, value in FBT.Params().model_dump().items()}
    published |= {f"hcd.{name}": value for name, value in HCD.Params().model_dump().items()}
    published |= {f"ofa.{name}": value for name, value in OFA.Params().model_dump().items()}
    for start in found.starts:
        assert any(all((published | sample).get(key) == value for key, value in start.items()) for sample in samples)
    last = study.next()
    assert last is not None
    assert last != "wait"
    assert last.origin == "sampled"


def test_a_search_that_was_not_matched_says_so(tiny_file: Write, tmp_path: Path) -> None:
    asked = load_experiment(tiny_file(search={"match_starts": True}))
    with pytest.raises(StudyError, match=r"search\.match_starts: .*heterokd match"):
        Study.open(asked, Workspace(tmp_path).study("tiny"))


@pytest.mark.thorough
def test_the_command(cli: Run, tiny_file: Write, tmp_path: Path) -> None:
    _, root, file = matched(tiny_file, tmp_path)
    for more in ([], ["--json"]):
        code, out, _ = cli("match", file, "--root", root.path, *more)
        assert code == 0
        if more:
            assert len(json.loads(out)["similarity"]) == 4
        else:
            assert "stage 4" in out
            assert "fbt.front_stage" in out
            assert "match.png" in out
