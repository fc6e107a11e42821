"""Which nodes a search avoids, which trials run again elsewhere, and when a search stops; no Ray is started."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_ray import FakeRay

from heterokd.errors import CheckpointError, DataError, MissingSignal
from heterokd.execution.node_checks import Check
from heterokd.execution.node_faults import FEWEST_NODES, MOST_MOVES, NodeFault, NodeFaults
from heterokd.execution.parallel import request
from heterokd.execution.placement import Cluster
from heterokd.execution.this_node import NodeCheck, NodeError, fault_reason, suspicion

NO_DATA = NodeFault("a", "10.0.0.1", "data: there is no folder /data (put the data there)")
RAISED = NodeFault("a", "10.0.0.1", "DataError: /data/1.png is damaged", is_certain=False)


def on(node: str, fault: NodeFault = RAISED) -> NodeFault:
    return replace(fault, node=node, address=f"address of {node}")


def test_a_node_that_lacks_something_is_avoided_and_its_trial_runs_elsewhere() -> None:
    nodes = NodeFaults()
    assert nodes.moves(3, NO_DATA, ["a", "b"])
    assert nodes.avoided == ["a"]
    assert nodes.reasons == {"10.0.0.1": NO_DATA.reason}
    assert nodes.limit(["a", "b"], may_grow=False) is None


def test_the_same_exception_on_two_nodes_is_the_trials_fault_and_both_are_used_again() -> None:
    nodes = NodeFaults()
    assert nodes.moves(3, on("a"), ["a", "b", "c"])
    assert nodes.avoided == ["a"]
    assert not nodes.moves(3, replace(on("b"), reason="DataError: /data/2.png is damaged"), ["a", "b", "c"])
    assert nodes.avoided == []
    assert nodes.reasons == {}


def test_an_exception_that_does_not_come_again_elsewhere_stays_the_nodes_fault() -> None:
    nodes = NodeFaults()
    assert nodes.moves(3, on("a"), ["a", "b", "c"])
    assert nodes.moves(3, replace(on("b"), reason="ModuleNotFoundError: No module named 'x'"), ["a", "b", "c"])
    assert nodes.avoided == ["a", "b"]


def test_an_exception_with_no_other_node_to_try_is_the_trials() -> None:
    nodes = NodeFaults()
    assert not nodes.moves(3, on("a"), ["a"])
    nodes.add(on("b", NO_DATA))
    assert not nodes.moves(4, on("a"), ["a", "b"])
    assert nodes.avoided == ["b"]


def test_what_a_check_found_is_not_forgiven() -> None:
    nodes = NodeFaults()
    assert nodes.moves(3, on("a"), ["a", "b"])
    nodes.add(NO_DATA)
    assert not nodes.moves(3, on("b"), ["a", "b", "c"])
    assert nodes.avoided == ["a"]
    assert nodes.reasons == {"10.0.0.1": NO_DATA.reason}


@pytest.mark.parametrize(
    ("faulty", "usable", "may_grow", "stops"),
    [
        (0, 0, False, False),
        (1, 1, False, False),
        (1, 0, False, True),  # no node is left
        (1, 0, True, False),  # another one may come
        (FEWEST_NODES, 0, True, True),  # the nodes that come are at fault, too
        (FEWEST_NODES, FEWEST_NODES - 1, False, True),
        (FEWEST_NODES, FEWEST_NODES, False, False),
    ],
)
def test_the_search_stops_where_most_nodes_are_at_fault(faulty: int, usable: int, may_grow: bool, stops: bool) -> None:
    nodes = NodeFaults()
    for number in range(faulty):
        nodes.add(on(f"bad{number}", NO_DATA))
    candidates = [*(f"bad{number}" for number in range(faulty)), *(f"good{number}" for number in range(usable))]
    sentence = nodes.limit(candidates, may_grow=may_grow)
    assert (sentence is not None) == stops
    if sentence is not None:
        assert sentence.startswith(f"{faulty} of {faulty + usable} nodes cannot train")
        assert "address of bad0: data: there is no folder /data" in sentence
        assert sentence.endswith("continue with --resume")


def test_nodes_that_trained_and_are_gone_speak_for_the_cluster() -> None:
    """Spot nodes come and go: three bad ones in a long search do not end it."""
    nodes = NodeFaults()
    for number in range(FEWEST_NODES):
        nodes.proved(f"gone{number}")
        nodes.add(on(f"bad{number}", NO_DATA))
    assert nodes.limit(["now"], may_grow=True) is None


def test_a_trial_whose_process_never_begins_is_tried_on_a_few_nodes() -> None:
    nodes = NodeFaults()
    assert [nodes.starts_again(3) for _ in range(MOST_MOVES + 1)] == [*[True] * MOST_MOVES, False]
    assert nodes.starts_again(4)


def test_nodes_are_checked_once() -> None:
    nodes = NodeFaults()
    assert not nodes.is_checked("a")
    nodes.passed("a")
    assert nodes.is_checked("a")
    nodes.add(NO_DATA)
    assert not nodes.is_checked("a")


def test_failed_checks_are_a_nodes_fault_unless_trainings_run_in_spite_of_them() -> None:
    def failed(name: str) -> Check:
        return Check("10.0.0.2", name, passed=False, finding="wrong", advice="mend it")

    assert fault_reason([failed("clock"), failed("disk")], has_own_disk=False) is None
    assert fault_reason([failed("disk")], has_own_disk=True) == "disk: wrong (mend it)"
    assert fault_reason([failed("data"), failed("versions")], has_own_disk=False) == (
        "data: wrong (mend it); versions: wrong (mend it)"
    )


@pytest.mark.parametrize(
    ("error", "elsewhere", "suspected"),
    [
        (DataError("no folder"), True, True),
        (DataError("no folder"), False, False),  # the driver's node has it: this is about the trial
        (CheckpointError("missing"), True, True),
        (ModuleNotFoundError("No module named 'x'"), True, True),
        (FileNotFoundError(2, "No such file", "/data/x"), True, True),
        (OSError(28, "No space left on device"), True, True),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), False, True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True, True),
        (RuntimeError("CUDA error: device-side assert triggered"), True, False),
        (RuntimeError("shapes (3x4 and 5x6) cannot be multiplied"), True, False),
        (MissingSignal("add Signal.STAGES"), True, False),
        (NodeError(NO_DATA), False, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exceptions_that_may_be_a_nodes_fault(
    error: Exception, elsewhere: bool, suspected: bool, fake_ray: FakeRay
) -> None:
    check = NodeCheck(driver="there" if elsewhere else "here", questions=None, mine=None)  # type: ignore[arg-type]
    fault = suspicion(error, check)
    assert (fault is not None) == suspected
    if fault is not None and not isinstance(error, NodeError):
        assert fault == NodeFault("here", "address of here", f"{type(error).__name__}: {error}", is_certain=False)


def test_a_trial_asks_for_other_nodes_than_those_it_avoids() -> None:
    cluster = Cluster(2, cpus=1, gpus=0.5)
    plain = request({"number": 1, "cluster": cluster})
    assert plain.bundles == [{"CPU": 1.0, "GPU": 0.5}]
    avoiding = request({"number": 1, "cluster": cluster, "avoid": ["a" * 56, "b" * 56]})
    assert avoiding != plain  # a process on a node that is avoided is not used again
    assert avoiding._kwargs == {"bundle_label_selector": [{"ray.io/node-id": f"!in({'a' * 56},{'b' * 56})"}]}
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector(avoiding._kwargs["bundle_label_selector"][0]) is None
