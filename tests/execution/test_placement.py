"""How many trials share a GPU, on clusters that are made up."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
import yaml

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError
from heterokd.execution.autoscaler import addable_by
from heterokd.execution.parallel import Parallelism
from heterokd.execution.placement import Cluster, place_trials, trials_per_gpu
from heterokd.execution.ray_connection import check_address, refusal
from heterokd.execution.ray_settings import ray
from heterokd.execution.searcher import StudySearcher
from heterokd.training.data import open_splits
from heterokd.training.memory import CONTEXT_BYTES, WORKSPACE_BYTES, estimate_memory

Write = Callable[..., Path]
GIB = 2**30


def experiment_of(tiny_file: Write, **search: object) -> Experiment:
    return load_experiment(tiny_file(search={"parallel": None, "trials": 50, **search}))


@pytest.mark.parametrize(
    ("search", "cores", "gpus", "gib", "expected"),
    [
        ({}, 8, 0, None, Cluster(8, 1, 0)),
        ({"parallel": 2}, 8, 0, None, Cluster(2, 4, 0)),
        ({}, 64, 2, 6.5, Cluster(6, 10, 0.3333)),  # memory decides: 2 GiB a trial
        ({}, 4, 2, 80, Cluster(4, 1, 0.5)),  # cores decide
        ({"trials": 3}, 64, 1, 80, Cluster(3, 21, 0.3333)),  # there are no more trials
        ({"parallel": 2}, 64, 2, 80, Cluster(2, 32, 1.0)),
        ({"parallel": 9}, 64, 1, 6.5, Cluster(3, 21, 0.3333)),  # never more than fit
        ({}, 64, 2, None, Cluster(2, 32, 1.0)),  # GPUs of unknown size are not shared
        ({"gpus_per_trial": 0.25}, 64, 2, 1, Cluster(8, 8, 0.25)),
        ({"gpus_per_trial": 0.3}, 64, 2, 1, Cluster(6, 10, 0.3)),
        ({"gpus_per_trial": 2}, 64, 5, 1, Cluster(2, 32, 2.0)),
        ({"gpus_per_trial": 0.5, "parallel": 4}, 0, 0, None, Cluster(4, 1, 0.5)),  # a head alone, which holds no trial
        ({"gpus_per_trial": 0.5, "parallel": 4}, 8, 0, None, Cluster(4, 2, 0)),  # a machine without GPUs
    ],
)
def test_trials_share_gpus_and_cores(
    tiny_file: Write,
    search: dict[str, object],
    cores: int,
    gpus: int,
    gib: float | None,
    expected: Cluster,
) -> None:
    plan = place_trials(
        experiment_of(tiny_file, **search), [(cores, gpus)], lambda: None if gib is None else max(1, int(gib / 2))
    )
    assert plan == expected
    if gpus:
        assert plan.parallel * plan.gpus <= gpus


def test_a_trial_that_fits_into_no_gpu_is_refused(tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"needs about 0\.\d GiB of a GPU that has 0\.5; raise training.accumulate"):
        trials_per_gpu(experiment_of(tiny_file), GIB // 2)


def test_what_listens_and_is_no_ray_is_told() -> None:
    """Ray itself would wait there for minutes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"--address {address}: the server there is not Ray"):
            check_address(address, patience=1.0)


@pytest.mark.usefixtures("local_ray")
def test_a_ray_answers() -> None:
    check_address(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("share", [1.5, 3.0])
def test_gpus_that_cannot_be_had_are_refused(tiny_file: Write, share: float) -> None:
    with pytest.raises(ConfigError, match="gpus_per_trial"):
        place_trials(experiment_of(tiny_file, gpus_per_trial=share), [(8, 2)], lambda: 40)


def test_the_greediest_method_and_batch_decide(tiny_file: Write) -> None:
    asked: list[tuple[str, int]] = []

    def estimate(recipe: Recipe, splits: Splits, memory: int) -> int:
        asked.append((recipe.method, recipe.training.batch_size))
        return 3 * GIB if recipe.method == "dkd" else GIB

    space = {"methods": ["kd", "dkd"], "shared": {"training.batch_size": {"options": [16, 256, 32]}}}
    assert trials_per_gpu(experiment_of(tiny_file, space=space), 7 * GIB, estimate) == 2
    assert asked == [("kd", 256), ("dkd", 256)]


def test_the_estimate_grows_with_what_a_training_holds(tiny_file: Write) -> None:
    experiment = experiment_of(tiny_file, space={"methods": "all"})
    splits = open_splits(experiment.data)

    def bytes_of(method: str = "kd", **training: object) -> int:
        settings = experiment.training.model_copy(update=training)
        recipe = experiment.model_copy(update={"training": settings}).recipe({"method": method})
        return estimate_memory(recipe, splits, 80 * GIB) - CONTEXT_BYTES

    plain = bytes_of(batch_size=2048)
    large, larger = (bytes_of(batch_size=size) - WORKSPACE_BYTES for size in (8192, 16384))
    assert 1.8 < larger / large < 2.1
    assert bytes_of(batch_size=4096, accumulate=8) < bytes_of(batch_size=4096)
    assert bytes_of(optimizer="adamw") > bytes_of(optimizer="sgd") > bytes_of(optimizer="sgd", trainable="head")
    assert bytes_of(ema=0.9) > bytes_of()
    assert bytes_of("fbt", batch_size=2048) > plain


def test_the_estimate_leaves_nothing_behind(tiny_file: Write) -> None:
    import gc
    import weakref

    experiment = experiment_of(tiny_file)
    splits, recipe = open_splits(experiment.data), experiment.recipe({"method": "kd"})
    tensors: list[weakref.ref[torch.Tensor]] = []
    original = torch.Tensor.detach

    def detach(tensor: torch.Tensor) -> torch.Tensor:
        alias = original(tensor)
        tensors.append(weakref.ref(alias))
        return alias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", detach)
        estimate_memory(recipe, splits, GIB)
    gc.collect()
    assert tensors
    assert not [one for one in tensors if one() is not None]


@pytest.mark.parametrize(
    ("training", "search", "nodes", "expected"),
    [
        ({"workers": 2}, {}, [(2, 0)], Cluster(1, 1, 0, (2, 2))),
        ({"workers": 2}, {}, [(8, 0)], Cluster(4, 1, 0, (2, 2))),
        ({"workers": 2}, {"parallel": 1}, [(8, 0)], Cluster(1, 4, 0, (2, 2))),
        ({"workers": 2}, {"parallel": 9}, [(4, 0), (4, 0)], Cluster(4, 1, 0, (2, 2))),
        ({"workers": 3}, {"parallel": 1}, [(5, 0), (5, 0)], Cluster(1, 2, 0, (3, 3))),  # 3 cores each do not fit thrice
        ({"workers": 2}, {}, [(8, 0), (32, 4), (32, 4)], Cluster(4, 8, 1.0, (2, 2))),
        ({"workers": 2, "gpus_per_worker": 0.5}, {}, [(32, 2)], Cluster(2, 8, 0.5, (2, 2))),
        ({"workers": 2, "gpus_per_worker": 2}, {}, [(64, 3), (64, 3)], Cluster(1, 64, 2.0, (2, 2))),
        ({"workers": 2}, {"gpus_per_trial": 1}, [(64, 2)], Cluster(2, 16, 0.5, (2, 2))),
        ({"workers": 2, "gpus_per_worker": 0}, {"parallel": 1}, [(64, 2)], Cluster(1, 32, 0, (2, 2))),
        ({"workers": (2, 4)}, {}, [(3, 0)], Cluster(1, 1, 0, (2, 4))),
        ({"workers": (2, 4)}, {"trials": 1}, [(16, 0)], Cluster(1, 1, 0, (2, 4))),
    ],
)
def test_workers_have_room_side_by_side(
    tiny_file: Write,
    training: dict[str, object],
    search: dict[str, object],
    nodes: list[tuple[int, int]],
    expected: Cluster,
) -> None:
    experiment = experiment_of(tiny_file, **search)
    shared = TrainingSettings.model_validate({**experiment.training.model_dump(), **training})
    plan = place_trials(experiment.model_copy(update={"training": shared}), nodes, lambda: None)
    assert plan == expected
    # Trials hold nothing that workers need, and the workers of all of them fit at once.
    assert set(plan.trial) == {"memory"}
    places = [
        min(cores // plan.cpus, gpus * int(1 / plan.gpus) if 0 < plan.gpus < 1 else gpus // plan.gpus)
        if plan.gpus
        else cores // plan.cpus
        for cores, gpus in nodes
    ]
    assert plan.parallel * plan.workers[0] <= sum(places)


@pytest.mark.parametrize("nodes", [[(2, 0)], [(1, 0), (1, 0)], [(64, 2)]])
def test_workers_without_room_are_refused(tiny_file: Write, nodes: list[tuple[int, int]]) -> None:
    shared = load_experiment(tiny_file(training={"workers": 3}))
    with pytest.raises(ConfigError, match=r"training\.workers: 3 workers with .* do not fit .* room for 2"):
        place_trials(shared, nodes, lambda: None)


def test_a_launcher_file_says_which_nodes_may_be_added(tmp_path: Path) -> None:
    types = {
        "head": {"resources": {"CPU": 1}},
        "cpu": {"resources": {"CPU": 8}, "min_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2, "priority": 1},
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 3, "head_node_type": "head", "available_node_types": types}))
    assert addable_by(file) == [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}]
    for text in ("max_workers: several", "- a list", "{"):
        file.write_text(text)
        assert addable_by(file) == []


RAYS = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.12.4
This process on Ray Client was started with:
    Ray: 2.61.0
    Python: 3.11.7
"""


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (RAYS, "the cluster runs Ray 2.60.0 and Python 3.12.4, this process Ray 2.61.0 and Python 3.11.7; install"),
        ("Token authentication is enabled but no authentication token was found", "set RAY_AUTH_MODE=token"),
        ("No node info found matching attributes: '' when trying", "no node of this cluster runs on this machine"),
        ("Could not find any running Ray instance. Please\nspecify", "no Ray cluster answers (Could not find any"),
    ],
    ids=["versions", "token", "elsewhere", "none"],
)
def test_a_cluster_that_refuses_this_process_is_told_in_a_sentence(reason: str, told: str) -> None:
    sentence = refusal("10.0.0.1:6379", reason)
    assert sentence.startswith("--address 10.0.0.1:6379: ")
    assert told in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "ray://head"])
def test_ray_client_is_refused_before_anything_is_asked(address: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--address {address}: a search cannot run through Ray Client.*ray job submit"
    ):
        check_address(address)


HEAD, GPU_NODE = (0, 0), (8, 1)


@pytest.mark.parametrize(
    ("search", "before", "nodes", "after"),
    [
        ({}, Cluster(4, 1, 0), [(4, 0), (4, 0)], Cluster(8, 1, 0)),  # a node joins
        ({}, Cluster(8, 1, 0), [(4, 0)], Cluster(4, 1, 0)),  # and goes
        ({}, Cluster(8, 1, 0), [], Cluster(8, 1, 0)),  # nobody knows for how long
        ({"trials": 5}, Cluster(4, 1, 0), [(4, 0), (4, 0)], Cluster(5, 1, 0)),
        ({"parallel": 3}, Cluster(3, 1, 0), [(4, 0), (4, 0)], Cluster(3, 1, 0)),
        ({}, Cluster(3, 2, 0.3333), [(8, 1), (8, 1)], Cluster(6, 2, 0.3333)),
        ({}, Cluster(1, 8, 2.0), [(8, 2), (16, 4)], Cluster(3, 8, 2.0)),
        ({"parallel": 8}, Cluster(8, 1, 0), [HEAD, GPU_NODE], Cluster(8, 8, 1.0)),  # never eight on one GPU
        ({}, Cluster(2, 1, 0), [(2, 0), GPU_NODE], Cluster(1, 8, 1.0)),
        ({"gpus_per_trial": 0.5}, Cluster(2, 1, 0), [GPU_NODE], Cluster(2, 4, 0.5)),
        ({}, Cluster(2, 2, 1.0, (2, 2)), [(8, 4), (8, 4)], Cluster(4, 2, 1.0, (2, 2))),
    ],
)
def test_trials_follow_the_nodes(
    tiny_file: Write, search: dict[str, object], before: Cluster, nodes: list[tuple[int, int]], after: Cluster
) -> None:
    plan = Parallelism(experiment_of(tiny_file, **search), before)
    plan.follow(nodes)
    assert plan.cluster == after


def test_gpus_of_unknown_memory_are_not_shared(tiny_file: Write) -> None:
    plan = place_trials(experiment_of(tiny_file, parallel=8), [GPU_NODE], lambda: None)
    assert plan == Cluster(1, 8, 1.0)


def test_trials_do_not_wait_for_nodes_that_nobody_knows(tiny_file: Write) -> None:
    """Eight trials that ask for no GPU would share the GPU of the node that comes."""
    with pytest.raises(ConfigError, match=r"search\.gpus_per_trial: no node has a core.*cluster\.nodes\.NAME"):
        place_trials(experiment_of(tiny_file, parallel=8), [HEAD], lambda: None)


def test_an_experiment_says_which_nodes_may_come(tiny_file: Write) -> None:
    cluster = {"nodes": {"gpu": {"count": 2, "cpus": 8, "gpus": 1}, "head": {"price_per_hour": 0.4}}}
    experiment = load_experiment(tiny_file(cluster=cluster, search={"parallel": None, "trials": 50}))
    assert experiment.cluster.resources == [GPU_NODE, GPU_NODE]
    assert place_trials(experiment, [HEAD, *experiment.cluster.resources], lambda: None) == Cluster(2, 8, 1.0)


def test_the_searcher_suggests_as_many_trials_as_the_plan_has(tiny_file: Write) -> None:
    plan = Parallelism(experiment_of(tiny_file), Cluster(1, 1, 0))
    searcher = StudySearcher(None, None, None, plan)
    searcher.numbers = {"a": 0}
    assert searcher.suggest("b") is None


def ray_that_refuses(code: grpc.StatusCode) -> tuple[grpc.Server, str]:
    """A server that ends each call with a status, as Ray's head does where a token is missing."""

    class Refusing(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, "no"))

    server = grpc.server(ThreadPoolExecutor(1), handlers=(Refusing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            grpc.StatusCode.UNAUTHENTICATED,
            r"refuses this process, which has no token or another one; set RAY_AUTH",
        ),
        (grpc.StatusCode.UNIMPLEMENTED, r"no node of this cluster runs on this machine.*ray job submit"),
    ],
    ids=["token", "elsewhere"],
)
def test_a_cluster_that_cannot_be_used_is_told_at_once(
    code: grpc.StatusCode, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heterokd.execution.ray_connection.services.find_node_ids", set)
    server, address = ray_that_refuses(code)
    began = time.monotonic()
    try:
        with pytest.raises(ConfigError, match=rf"--address {address}: .*{told}"):
            check_address(address)
    finally:
        server.stop(None)
    assert time.monotonic() - began < 10
