"""A driver on a cluster that somebody else started: where its trials stand, and GPUs that others hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_ray import Head, ray_head

import heterokd

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

PACKAGE = Path(heterokd.__file__).parents[1]
IMPORTS = """
import json, os, time
from heterokd.execution.placement import gpu_bytes
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=2, gpus=1) as started:
        yield started


def driver(head: Head, folder: Path, script: str) -> dict[str, object]:
    """What a script says last, run in a folder, once it is connected."""
    script = f"{IMPORTS}\nwith connected({head.address!r}):\n{script}"
    environment = {**head.environment, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return said | {"stderr": done.stderr}


def test_relative_paths_begin_in_the_drivers_folder_on_every_node(head: Head, tmp_path: Path) -> None:
    script = "    print(json.dumps({'folder': ray.get(ray.remote(lambda: os.getcwd()).remote())}))"
    assert driver(head, tmp_path, script)["folder"] == str(tmp_path.resolve())


def test_a_gpu_that_another_search_holds_is_not_waited_for(head: Head, tmp_path: Path) -> None:
    script = """
    holder = ray.remote(lambda: time.sleep(100)).options(num_gpus=1).remote()
    while ray.available_resources().get("GPU"):
        time.sleep(0.1)
    print(json.dumps({"bytes": gpu_bytes(patience=2.0)}))
    """
    said = driver(head, tmp_path, script)
    assert said["bytes"] is None
    assert "1 of 1 nodes with GPUs did not report their memory: others use the GPUs" in str(said["stderr"])


def test_a_token_file_does_not_make_this_process_demand_tokens(tmp_path: Path) -> None:
    """A cluster without tokens could not call it; a machine has such a file after its first local Ray."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef" * 4)
    script = "import os; from heterokd.execution.ray_settings import token_headers as found; "
    script += "print(found(), os.environ.get('RAY_AUTH_MODE'))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    for more, said in ({}, "() None"), ({"RAY_AUTH_MODE": "token"}, "(('authorization', "):
        environment |= {"HOME": str(tmp_path), **more}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.startswith(said), done.stderr
