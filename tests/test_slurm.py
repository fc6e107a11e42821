"""deploy/slurm.sbatch with a scheduler of the test's own, whose two nodes are real Ray nodes of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import free_port
from ray.util import get_node_ip_address

TOP = Path(__file__).parents[1]
SCRIPT = TOP / "deploy/slurm.sbatch"
NODES = ("node1", "node2")

SRUN = """#!{python}
import json, os, signal, subprocess, sys
words, options = sys.argv[1:], {{}}
while words[0].startswith("--"):
    key, _, value = words.pop(0)[2:].partition("=")
    options[key] = value
names = options.get("nodelist", "").split(",") if "nodelist" in options else []
names = names or [name for name in {nodes!r} if name not in options.get("exclude", "").split(",")]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([names, words]) + "\\n")
assert len(names) == int(options["ntasks"]) == int(options["nodes"])
tasks = [subprocess.Popen(words, env={{**os.environ, "SLURMD_NODENAME": name}}) for name in names]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
printf '["scontrol", "%s"]\\n' "$*" >> "$CALLS"
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' {nodes}; fi
"""
GETENT = """#!/usr/bin/env bash
echo "{ip} STREAM $2"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a batch script on the first of two nodes with one core each."""
    programs = tmp_path / "programs"
    programs.mkdir()
    texts = {
        "srun": SRUN.format(python=sys.executable, nodes=NODES),
        "scontrol": SCONTROL.format(nodes=" ".join(NODES)),
        "getent": GETENT.format(ip=get_node_ip_address()),
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    binaries = tmp_path / "venv"
    binaries.mkdir()
    for name in ("ray", "heterokd"):
        (binaries / name).symlink_to(Path(sys.executable).parent / name)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(TOP),
        "HETEROKD_BIN": str(binaries),
        "HETEROKD_ROOT": f"file://{tmp_path}/shared",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # `ray start` takes no second node on loopback
    }


def calls(environment: dict[str, str]) -> list[Any]:
    file = Path(environment["CALLS"])
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


FAKE_RAY = """#!/usr/bin/env bash
printf '["%s", "%s"]\\n' "${SLURMD_NODENAME:-batch}" "ray $*" >> "$CALLS"
[ "$1" = start ] || exit 0
trap 'echo "[\\"$SLURMD_NODENAME\\", \\"ended\\"]" >> "$CALLS"; exit 0' TERM
while true; do sleep 0.05; done
"""
FAKE_HETEROKD = """#!/usr/bin/env bash
[ "$RAY_AUTH_MODE" = token ] && [ ${#RAY_AUTH_TOKEN} = 64 ] || exit 9
printf '["driver", "heterokd %s"]\\n' "$*" >> "$CALLS"
trap 'exit 130' TERM
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
while true; do sleep 0.05; done
"""


def test_the_order_of_a_job_and_of_its_end(environment: dict[str, str], tmp_path: Path) -> None:
    """With commands that do nothing: what is started where, and that a time limit requeues and leaves no process."""
    for name, text in {"ray": FAKE_RAY, "heterokd": FAKE_HETEROKD}.items():
        (tmp_path / "venv" / name).unlink()
        (tmp_path / "venv" / name).write_text(text)
        (tmp_path / "venv" / name).chmod(0o755)
    command = ["bash", str(SCRIPT), "birds.yaml", "--set", "search.trials=3"]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    expected = {"driver", *NODES}
    while not expected <= {str(call[0]) for call in calls(environment)}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "back to the queue" in told
    found = calls(environment)
    assert ["scontrol", f"requeue {environment['SLURM_JOB_ID']}"] in found
    started = {node: words for node, words in found if isinstance(words, str) and words.startswith("ray start")}
    assert started.keys() == set(NODES)
    assert "--head" in started["node1"]
    address = f"{get_node_ip_address()}:{20000 + int(environment['SLURM_JOB_ID']) % 10000}"
    assert f"--address={address}" in started["node2"]
    assert ["driver", f"heterokd search birds.yaml --set search.trials=3 --address {address} --resume"] in found
    assert sorted(node for node, words in found if words == "ended") == list(NODES), "no Ray is left behind"

    again = {**environment, "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(command, env=again, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    requeued = [call for call in calls(environment) if call[0] == "scontrol" and "requeue" in call[1]]
    assert len(requeued) == 1, "a search that ended does not go back"


def test_a_node_without_ray_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "venv/ray").unlink()
    (tmp_path / "venv/ray").write_text("#!/usr/bin/env bash\necho 'no such library' >&2\nexit 1\n")
    (tmp_path / "venv/ray").chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "birds.yaml"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Ray does not start on node1; its messages are above" in done.stderr
    assert "no such library" in done.stderr


def test_rays_commands_know_the_scripts_options() -> None:
    from ray.scripts.scripts import cli

    text = SCRIPT.read_text()
    for name, options in {
        "start": set(re.findall(r"(--[a-z-]+)", text.split("node=(")[1].split("step=(")[0])) | {"--head", "--port"},
        "health-check": {"--address"},
    }.items():
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert len(options) > 6 or name != "start"
        assert options <= known


@pytest.mark.slow
@pytest.mark.ray
def test_a_requeued_job_continues_its_study(
    tiny_file: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    file = tiny_file(training={"epochs": 6}, search={"trials": 3, "confirm_leaders": 0})
    assert yaml.safe_load(file.read_text())["name"] == "tiny"
    trials = tmp_path / "shared/studies/tiny/trials"

    with (tmp_path / "log").open("wb") as output:
        job = subprocess.Popen(["bash", str(SCRIPT), str(file)], env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 180
    while not list(trials.glob("*/metrics.jsonl")):
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    status = job.wait(120)
    told = (tmp_path / "log").read_text()
    assert status != 0, told
    assert "back to the queue" in told
    first = calls(environment)
    assert first[-1] == ["scontrol", f"requeue {environment['SLURM_JOB_ID']}"]
    starts = [(names, words[:3]) for names, words in first if words[:2] == ["ray", "start"]]
    assert starts == [(["node1"], ["ray", "start", "--head"]), (["node2"], starts[1][1])]
    assert starts[1][1][2].startswith(f"--address={get_node_ip_address()}:")
    assert "RAY_AUTH_TOKEN" not in json.dumps(first)

    done = subprocess.run(
        ["bash", str(SCRIPT), str(file)],
        env={**environment, "SLURM_RESTART_COUNT": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((trials.parent / "summary.json").read_text())
    states = [json.loads(file.read_text())["state"] for file in sorted(trials.glob("*/trial.json"))]
    assert len(states) == 3, summary
    assert set(states) <= {"complete", "pruned"}


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("HETEROKD_ROOT", ["x.yaml"], "usage: HETEROKD_ROOT=file:///MOUNT/heterokd sbatch"),
        ("", [], "usage: HETEROKD_ROOT=file:///MOUNT/heterokd sbatch"),
        ("SLURM_JOB_ID", ["x.yaml"], "start it with sbatch"),
    ],
)
def test_a_wrong_call_is_refused_before_work(
    environment: dict[str, str], missing: str, arguments: list[str], message: str
) -> None:
    environment = {key: value for key, value in environment.items() if key != missing}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path(environment["CALLS"]).exists()


def test_the_script_asks_slurm_for_what_it_relies_on() -> None:
    lines = SCRIPT.read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert {"requeue", "exclusive", "gpus-per-node", "nodes"} <= options.keys()
    assert options["open-mode"] == "append", "a requeued job keeps the output of its earlier run"
    assert options["signal"].startswith("B:USR1@"), "to this script, before the time limit"
    assert options["ntasks-per-node"] == "1", "one Ray node a machine"
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < next(number for number, line in enumerate(lines) if line and line[0] != "#"), (
        "sbatch stops reading"
    )
