"""A data set in a store on a cluster: nodes fetch it before their first trial, the head needs no copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import small_disk
from object_store import s3_server
from own_ray import ray_head
from test_bad_nodes import SEARCH, SETTINGS, outcome, searching
from test_doctor import second_node
from tiny_datasets import write_image_folder

from heterokd.config.reading import load_experiment
from heterokd.execution.node_checks import NodeProbe, probe_node
from heterokd.storage.stored_data.node_copy import COMPLETE
from heterokd.storage.stored_data.push import push_data
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits, stored_data

Write = Callable[..., Path]

OPENS = "    open_splits(recipe.data)  # as each training does\n"
SEES = """
    from heterokd.training.data import stored_data
    stored = stored_data(recipe.data)
    with (root.path.parent / "seen").open("a") as file:
        file.write(f"{stored.missing_bytes} {stored.folder}\\n")
"""


def variables(home: Path) -> dict[str, str]:
    """Of a machine with a home and a disk of its own."""
    home.mkdir(exist_ok=True)
    return {"HOME": str(home), "HETEROKD_DATA_CACHE": str(home / "data")}


@pytest.mark.slow
@pytest.mark.ray
def test_nodes_fetch_stored_data_before_their_first_trial(
    tiny_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials run on one node only: the other has too small a disk, which is its fault."""
    images, root = tmp_path / "images", Workspace(tmp_path / "runs")
    images.mkdir()
    write_image_folder(images)
    head_at, node_at = (variables(tmp_path / name) for name in ("head", "node"))
    assert OPENS in SEARCH
    with s3_server(tmp_path / "s3.log") as s3, small_disk(tmp_path / "small", "1m") as small:
        for name, value in s3.items():
            monkeypatch.setenv(name, value)
        url = push_data(images, "s3://state/images").url
        data = {"dataset": "image_folder", "root": url, "labels_per_class": None}
        file = tiny_file(name="stored", data=data, search={**SETTINGS, "trials": 6}, training={"epochs": 2})
        with ray_head(cpus=0, environment={**head_at, **s3}) as head:
            narrow = {**head.environment, **variables(tmp_path / "narrow"), "HETEROKD_DATA_CACHE": str(small)}
            with (
                second_node(head, [], {**head.environment, **node_at}, gpus=0),
                second_node(head, [], narrow, gpus=0),
            ):
                found = outcome(
                    searching(file, root, head.address, head.environment, SEARCH.replace(OPENS, OPENS + SEES)), file
                )
    assert found["states"] == ["complete"] * 6
    (reason,) = found["nodes"].values()
    assert reason.startswith(f"data: data.root: {url} needs ")
    seen = {line.partition(" ")[::2] for line in (tmp_path / "seen").read_text().splitlines()}
    (copy,) = Path(node_at["HETEROKD_DATA_CACHE"]).glob(f"*/{COMPLETE}")
    assert seen == {("0", str(copy.parent / "files"))}
    assert not list(Path(head_at["HETEROKD_DATA_CACHE"]).glob(f"*/{COMPLETE}"))
    assert not list(Path(head_at["HETEROKD_DATA_CACHE"]).rglob("*.png"))


def test_the_check_of_a_node_fetches_and_that_of_doctor_does_not(
    tiny_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_image_folder(images)
    monkeypatch.setenv("HETEROKD_DATA_CACHE", str(tmp_path / "cache"))
    url = push_data(images, (tmp_path / "store").as_uri()).url
    data = {"dataset": "image_folder", "root": url, "labels_per_class": None}
    settings = load_experiment(tiny_file(data=data)).data
    stored = stored_data(settings)
    assert stored is not None
    questions = NodeProbe(Workspace(tmp_path), None, settings.model_dump_json(), {}, "store")
    for fetched in (0, stored.total_bytes):
        answers = probe_node(NodeProbe(**{**vars(questions), "fetched_bytes": fetched}))
        assert not answers.data
        assert answers.fingerprint == open_splits(settings).fingerprint
        assert (stored.missing_bytes == 0) == bool(fetched)
    monkeypatch.setenv("HETEROKD_DATA_CACHE_GB", "0.0001")
    monkeypatch.setenv("HETEROKD_DATA_CACHE", str(tmp_path / "other"))
    stored_data.__globals__["_stored"].cache_clear()
    answers = probe_node(questions)
    assert answers.data.startswith(f"data.root: {url} takes ")
