"""The files that start clusters: each against its tool's own schema, and against what it refers to."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from heterokd.execution.autoscaler import addable_by

TOP = Path(__file__).parents[1]
LAUNCHER_FILES = ("ray_cluster.yaml", "deploy/on_premise.yaml")
SCRIPTS = tuple(
    f"deploy/{file.name}" for file in sorted((TOP / "deploy").iterdir()) if file.suffix in (".sh", ".sbatch")
)
WORKFLOW = ".github/workflows/image.yml"
EVERY_FILE = (WORKFLOW, "ray_cluster.yaml", *(f"deploy/{file.name}" for file in sorted((TOP / "deploy").glob("*.*"))))


def read(name: str) -> Any:
    return yaml.safe_load((TOP / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=LAUNCHER_FILES)
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"name": request.param, "config": prepare_config(read(request.param))}


def commands(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key.endswith("_commands"):
            yield from value


def test_launcher_files_are_what_ray_takes(launcher: dict[str, Any]) -> None:
    validate_config(copy.deepcopy(launcher["config"]))
    for change in ({"idle_timeout": 5}, {"head_node_type": "nobody"}, {"max_workers": "many"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config({**copy.deepcopy(launcher["config"]), **change})


def test_launchers_carry_the_token_and_open_nothing(launcher: dict[str, Any]) -> None:
    config = launcher["config"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starting = [command for command in starts if "ray start" in command]
    assert len(starting) == 2
    assert all(command.startswith(". ~/.heterokd/environment;") for command in starting)
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in starting[0]
    assert "0.0.0.0" not in " ".join(commands(config))


def test_launchers_run_what_is_there(launcher: dict[str, Any]) -> None:
    config = launcher["config"]
    assert config["file_mounts"]["~/heterokd"] == "."
    types = config.get("available_node_types", {}).values()
    for command in [line for part in (config, *types) for line in commands(part)]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for name in re.findall(r"(?:~/heterokd/|cat )(deploy/\S+|requirements\S+)", command):
            assert (TOP / name).exists(), command
    started = {"ray_cluster.yaml": "deploy/mlflow_containers.sh", "deploy/on_premise.yaml": "deploy/mlflow_server.sh"}
    assert any(started[launcher["name"]] in command for command in commands(config))


def test_aws_nodes_install_nothing_and_run_the_image() -> None:
    config = prepare_config(read("ray_cluster.yaml"))
    every = "\n".join(line for part in (config, *config["available_node_types"].values()) for line in commands(part))
    assert "pip install" not in every
    assert "apt-get" not in every
    docker, image = config["docker"], config["docker"]["image"]
    assert f"docker run --rm {image} cat deploy/mlflow_containers.sh" in every
    # Ray's launcher itself adds --net=host, and `--runtime=nvidia` on machines with a GPU.
    assert "NVIDIA_VISIBLE_DEVICES=all" in " ".join(docker["worker_run_options"])
    place = re.search(r"-v (\S+):/home/ray/.cache", " ".join(docker["worker_run_options"]))
    assert place is not None
    head, *workers = config["available_node_types"].values()
    for kind in workers:
        assert any(place.group(1) in command for command in kind["initialization_commands"]), "root would own it"
        assert not any("mlflow" in command for command in kind["initialization_commands"])
    assert "initialization_commands" not in head, "`ray up` reads those of the whole file for the head"


def test_bash_takes_the_commands_as_ray_wraps_them() -> None:
    """With the head's address, resources and an interactive shell around each, inside of the container."""
    from ray.autoscaler._private.command_runner import _with_environment_variables, _with_interactive
    from ray.autoscaler._private.docker import docker_start_cmds, with_docker_exec
    from ray.autoscaler._private.util import with_head_node_ip

    config = prepare_config(read("ray_cluster.yaml"))
    docker, ran = config["docker"], []
    for command in with_head_node_ip(config["worker_start_ray_commands"], "10.0.0.1"):
        inside = _with_interactive(_with_environment_variables(command, {"RAY_OVERRIDE_RESOURCES": {"GPU": 1}}))
        ran += with_docker_exec([" ".join(inside)], docker["container_name"], "docker")
    options = [*docker["run_options"], *docker["worker_run_options"]]
    mounts = {name: name for name in config["file_mounts"]}
    cluster, home = config["cluster_name"], "/home/ray"
    start = docker_start_cmds(
        "ubuntu", docker["image"], mounts, docker["container_name"], options, cluster, home, "docker"
    )
    for command in [*ran, start]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "--address 10.0.0.1:6379" not in ran[-1], "bash fills it in"
    assert "RAY_HEAD_IP=10.0.0.1" in ran[-1]
    words = shlex.split(start)
    assert words[-2:] == [docker["image"], "bash"]
    assert "--net=host" in words
    volumes = [words[place + 1] for place, word in enumerate(words) if word == "-v"]
    assert {volume.rpartition(":")[2] for volume in volumes} == {
        "/home/ray/.cache",
        "/home/ray/.ray/auth_token",
        "/home/ray/heterokd",
    }


def test_aws_nodes_are_pinned_and_terminated_and_closed() -> None:
    config = read("ray_cluster.yaml")
    assert config["provider"]["cache_stopped_nodes"] is False
    assert "security_group" not in config["provider"], "a group that Ray creates is open to SSH from everywhere"
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["ImageId"] == "ami-CHANGE-ME"
        assert node["SecurityGroupIds"] == ["sg-CHANGE-ME"]
        assert node["KeyName"] in config["auth"]["ssh_private_key"]
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert disk["Ebs"]["Encrypted"]


def test_spot_notices_are_watched_on_every_gpu_node() -> None:
    from heterokd.execution import spot_notice

    (command,) = [each for each in read("ray_cluster.yaml")["worker_start_ray_commands"] if "spot_notice" in each]
    assert f"python -m {spot_notice.__name__} --address $RAY_HEAD_IP:6379" in command
    assert command.startswith(". ~/.heterokd/environment; setsid nohup"), "the token's mode; it outlives the shell"
    assert command.endswith("&")


def test_aws_workers_are_spot_first_and_hold_all_trials() -> None:
    types = prepare_config(read("ray_cluster.yaml"))["available_node_types"]
    head, spot, on_demand = types["head"], types["gpu_spot"], types["gpu_on_demand"]
    assert head["resources"]["CPU"] == 0
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    without_market = {key: value for key, value in spot["node_config"].items() if key != "InstanceMarketOptions"}
    assert without_market == on_demand["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_the_nodes_that_may_come_are_known_from_the_launcher_file() -> None:
    """The head holds no trial; spot comes first, and the whole may not grow beyond `max_workers`."""
    assert list(addable_by(TOP / "ray_cluster.yaml")) == 8 * [{"CPU": 8, "GPU": 1}]
    assert list(addable_by(TOP / "no_such_file.yaml")) == []


def test_the_autoscaler_takes_spot_and_falls_back_on_demand(tmp_path: Path) -> None:
    """Ray's own scheduler, on this file: which machines it would ask the cloud for."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    launcher = read("ray_cluster.yaml")
    launcher["auth"]["ssh_private_key"] = str(tmp_path / "key")
    (tmp_path / "key").touch()
    config = AutoscalingConfig(prepare_config(launcher), skip_content_hash=True)

    def asked(trials: int, **lacking: float) -> dict[str, int]:
        trial = ResourceRequestUtil.make({"CPU": 2, "GPU": 1})
        request = SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=[ResourceRequestByCount(request=trial, count=trials)],
            recoverable_resource_availabilities=lacking,
            disable_launch_config_check=True,
        )
        launched = ResourceDemandScheduler(None).schedule(request).to_launch
        return {one.instance_type: one.count for one in launched if one.instance_type != "head"}

    assert asked(3) == {"gpu_spot": 3}
    assert asked(3, gpu_spot=0.0) == {"gpu_on_demand": 3}
    # The head's place is among the nine that there may be at most, and no head runs here.
    assert asked(50) == {"gpu_spot": 8, "gpu_on_demand": 1}


def instructions() -> list[tuple[str, list[str]]]:
    """A Dockerfile's instructions with their words; continued lines are joined, comments left out."""
    text = (TOP / "deploy/Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    parts = [line.split(None, 1) for line in lines.splitlines() if line.strip()]
    return [(word, shlex.split(rest)) for word, rest in parts]


def copied() -> set[str]:
    return {source for word, words in instructions() if word == "COPY" for source in words[:-1]}


def test_the_container_file_refers_to_what_is_there() -> None:
    found = instructions()
    assert found[0][0] == "FROM"
    assert [words for word, words in found if word == "ENV" and "HOME=/home/ray" in words], "Ray's launcher reads it"
    assert {word for word, _ in found} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    tag = found[0][1][0].rpartition(":")[2]
    minor = re.match(r"(\d+)\.(\d+)", tag).groups()  # type: ignore[union-attr]
    assert (3, 11) <= tuple(map(int, minor)) < (3, 14), "what pyproject.toml asks for"
    for source in copied():
        assert (TOP / source).exists(), source
        assert source not in (TOP / ".dockerignore").read_text(encoding="utf-8").splitlines()
    project = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r'(?:readme = "|license-files = \[")([^"]+)"', project):
        assert name in copied(), f"pyproject.toml reads {name}"
    assert [words for word, words in found if word == "USER"][-1:] == [["ray"]]
    locked = (TOP / "requirements-runtime.lock").read_text(encoding="utf-8")
    assert re.search(r"^setuptools==", locked, re.MULTILINE), "installing without build isolation needs it"
    assert any("requirements-runtime.lock" in words for word, words in found if word == "RUN")
    assert {"rsync", "openssh-client", "wget", "postgresql-client"} <= {part for _, words in found for part in words}


@pytest.mark.parametrize("name", EVERY_FILE)
def test_no_file_holds_a_secret(name: str) -> None:
    text = (TOP / name).read_text(encoding="utf-8")
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|(password|token|secret)['\"]?\s*[:=]\s*['\"]?[0-9a-f]{16}", text, re.I
    )
    for user, password in re.findall(r"://([^/\s:@]+):([^@\s]+)@", text):
        assert password.startswith(("$", "\\(", "%s", "PASSWORD")), f"{user}'s password is written out"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_what_bash_takes(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(TOP / name)], check=False).returncode == 0
    assert "set -euo pipefail" in (TOP / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["mlflow_server.sh"], ["mlflow_containers.sh", "image"]])
def test_the_mlflow_scripts_refuse_every_interface(arguments: list[str]) -> None:
    command = ["bash", str(TOP / "deploy" / arguments[0]), *arguments[1:], "0.0.0.0", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "private address" in done.stderr


def test_the_workflow_publishes_what_the_cluster_files_run() -> None:
    workflow = read(WORKFLOW)
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML 1.1 reads `on` so
    assert triggers["push"] == {"tags": ["v*"]}
    assert all((TOP / path).exists() for path in triggers["pull_request"]["paths"])
    steps = workflow["jobs"]["image"]["steps"]
    (build,) = [step for step in steps if str(step.get("uses", "")).startswith("docker/build-push-action@")]
    assert (TOP / build["with"]["file"]).exists()
    # A pull request builds and checks the image, and has no credentials.
    pushing = [
        step for step in steps if "login" in str(step.get("uses", "")) or "docker push" in str(step.get("run", ""))
    ]
    assert len(pushing) == 2
    assert all(step["if"] == "github.event_name == 'push'" for step in pushing)
    for step in steps:
        done = subprocess.run(["bash", "-n", "-c", step.get("run", "")], capture_output=True, check=False)
        assert done.returncode == 0
    checked = " ".join(str(step.get("run", "")) for step in steps)
    assert "heterokd search experiments/quickstart.yaml --help" in checked
    assert (TOP / "experiments/quickstart.yaml").exists()


OPENS = (
    (r"--port[=\s,\"]+(\$?\w+)", "port"),
    (r"(?:containerPort|nodePort|hostPort|\bport): (\d+)", "port"),
    (r"--host[=\s,\"]+(\$?[\w.:]+)", "host"),
    (r"dashboard-host[=:\s]+([\w.:]+)", "dashboard-host"),
    (r"(?:serviceType|^\s*type): (ClusterIP|NodePort|LoadBalancer)", "service"),
    (r"GroupName: (\S+)", "security group"),
    (r"psycopg2://\S+@([\w.]+):", "postgresql"),
    (r"^EXPOSE (\d+)", "port"),
    (r"(hostNetwork): true", "pod"),
    (r"(IpPermissions|CidrIp): ", "rule"),
)
"""What opens a port, or decides who reaches it."""


def opened(name: str) -> set[str]:
    text = "\n".join(line for line in (TOP / name).read_text(encoding="utf-8").splitlines() if line.lstrip()[:1] != "#")
    # psql and pg_ctlcluster are clients of the database on the same machine.
    lines = "\n".join(line for line in text.splitlines() if "psql" not in line)
    return {f"{kind} {value}" for pattern, kind in OPENS for value in re.findall(pattern, lines, re.M)}


def test_what_the_files_open_stands_in_the_documentation() -> None:
    page = (TOP / "docs/cluster.md").read_text(encoding="utf-8")
    table = page.split("What the files open")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    told = {file.strip("`"): set(re.findall(r"`([^`]+)`", opens)) for file, opens, _ in rows}
    files = {f"deploy/{file.name}" for file in (TOP / "deploy").iterdir() if file.is_file()} | {"ray_cluster.yaml"}
    assert {name: opened(name) for name in files} == told


@pytest.mark.parametrize(
    ("line", "opens"),
    [
        ("  - {hostPort: 8080, containerPort: 80}", {"port 8080", "port 80"}),
        ("  type: LoadBalancer", {"service LoadBalancer"}),
        ("  hostNetwork: true", {"pod hostNetwork"}),
        ("EXPOSE 5000", {"port 5000"}),
        ("mlflow server --host 0.0.0.0 --port=5001", {"host 0.0.0.0", "port 5001"}),
        ("# EXPOSE 5000", set()),
    ],
)
def test_another_open_port_would_be_seen(tmp_path: Path, line: str, opens: set[str]) -> None:
    (tmp_path / "file").write_text(f"{line}\n")
    assert opened(str(tmp_path / "file")) == opens
