"""The files that start clusters: each against its tool's own schema, and against what it refers to."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay_schema import SCHEMAS
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from heterokd.config.reading import load_experiment
from heterokd.execution.autoscaler import addable_by

TOP = Path(__file__).parents[1]
LAUNCHER_FILES = ("ray_cluster.yaml", "deploy/on_premise.yaml")
KUBERAY_FILES = ("deploy/kuberay_cluster.yaml", "deploy/kuberay_job.yaml")
EVERY_FILE = (*LAUNCHER_FILES, *KUBERAY_FILES, "deploy/kubernetes_mlflow.yaml", "deploy/mlflow_server.sh")
KUBERNETES = "1.30"


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
    for command in commands(config):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for name in re.findall(r"~/heterokd/(\S+)", command):
            assert (TOP / name).exists(), command
    assert any("deploy/mlflow_server.sh" in command for command in config["head_setup_commands"])


def test_aws_workers_are_spot_first_and_hold_all_trials() -> None:
    types = prepare_config(read("ray_cluster.yaml"))["available_node_types"]
    head, spot, on_demand = types["head"], types["gpu_spot"], types["gpu_on_demand"]
    assert head["resources"]["CPU"] == 0
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    without_market = {key: value for key, value in spot["node_config"].items() if key != "InstanceMarketOptions"}
    assert without_market == on_demand["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_rays_provider_tags_instances_and_disks_for_the_bill() -> None:
    """Merged with Ray's tags of an instance by Ray's provider, as at a launch."""
    for name, kind in read("ray_cluster.yaml")["available_node_types"].items():
        specs = [{"ResourceType": "instance", "Tags": [{"Key": "ray-node-type", "Value": name}]}]
        node_provider.AWSNodeProvider._merge_tag_specs(specs, kind["node_config"]["TagSpecifications"])
        tags = {spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]} for spec in specs}
        project = {"project": "heterokd"}
        assert tags == {"instance": {"ray-node-type": name, **project}, "volume": project}


def test_the_nodes_that_may_come_are_known_from_the_launcher_file() -> None:
    """The head holds no trial; spot comes first, and the whole may not grow beyond `max_workers`."""
    assert list(addable_by(TOP / "ray_cluster.yaml")) == 8 * [{"CPU": 8, "GPU": 1}]
    assert list(addable_by(TOP / "no_such_file.yaml")) == []


def test_the_autoscaler_takes_spot_and_falls_back_on_demand() -> None:
    """Ray's own scheduler, on this file: which machines it would ask the cloud for."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    config = AutoscalingConfig(prepare_config(read("ray_cluster.yaml")), skip_content_hash=True)

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


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_manifests_are_what_the_operator_takes(name: str) -> None:
    manifest = read(name)
    schema = SCHEMAS[manifest["kind"]]
    jsonschema.validate(manifest, schema)
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1, "python, ray and heterokd are equal on all nodes only when they come from one image"
    broken = copy.deepcopy(manifest)
    broken["spec"]["rayClusterSpecs" if manifest["kind"] == "RayJob" else "autoscaling"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_the_job_searches_an_experiment_that_the_image_holds() -> None:
    entrypoint = shlex.split(read("deploy/kuberay_job.yaml")["spec"]["entrypoint"])
    assert entrypoint[:2] == ["heterokd", "search"]
    inside = entrypoint[2].removeprefix("/home/ray/heterokd/")
    assert (TOP / inside).exists()
    assert inside.split("/")[0] in copied()
    from typer.main import get_command

    from heterokd.cli.app import app

    known = {option for parameter in get_command(app).commands["search"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in entrypoint if word.startswith("--")} <= known


def allowed(policy: str) -> dict[str, list[dict[str, Any]]]:
    """Statements of a policy by the actions that they allow."""
    found: dict[str, list[dict[str, Any]]] = {}
    for statement in json.loads((TOP / policy).read_text(encoding="utf-8"))["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            found.setdefault(action, []).append(statement)
    return found


def test_the_heads_role_may_what_rays_provider_calls() -> None:
    """The calls are read from Ray's source, their names from boto3's models of the service."""
    source = inspect.getsource(node_provider)
    client = boto3.client("ec2", region_name="us-east-1")
    names = set(
        re.findall(r"(?:client|ec2\w*)\.((?:create|start|stop|terminate|describe|delete|run|modify)_\w+)", source)
    )
    names |= {"describe_instances"} if "ec2.instances.filter" in source else set()
    assert {"create_tags", "terminate_instances", "describe_instances"} <= names
    operations = client.meta.method_to_api_mapping
    calls = {f"ec2:{operations[{'create_instances': 'run_instances'}.get(name, name)]}" for name in names}
    policy = allowed("deploy/aws_head_policy.json")
    assert calls == {action for action in policy if action.startswith("ec2:")}


def test_the_heads_role_may_start_the_launchers_nodes_and_nothing_else() -> None:
    config, policy = read("ray_cluster.yaml"), allowed("deploy/aws_head_policy.json")
    types = config["available_node_types"]
    assert types["head"]["node_config"]["IamInstanceProfile"] == {"Name": "heterokd-head"}
    for name, kind in types.items():
        node = kind["node_config"]
        parameter = node["ImageId"].removeprefix("resolve:ssm:")
        assert fnmatch(f"arn:aws:ssm:us-east-1::parameter{parameter}", policy["ssm:GetParameters"][0]["Resource"])
        if name != "head":
            role = f"arn:aws:iam::123456789012:role/{node['IamInstanceProfile']['Name']}"
            assert fnmatch(role, policy["iam:PassRole"][0]["Resource"])
    assert policy["ec2:RunInstances"][0]["Condition"]["StringEquals"] == {
        "aws:RequestedRegion": config["provider"]["region"]
    }


@pytest.mark.parametrize("policy", ["deploy/aws_head_policy.json", "deploy/aws_worker_policy.json"])
def test_roles_reach_one_bucket(policy: str) -> None:
    reached = {each["Resource"] for action, of in allowed(policy).items() if action.startswith("s3:") for each in of}
    assert reached == {"arn:aws:s3:::CHANGE-ME", "arn:aws:s3:::CHANGE-ME/*"}


def test_the_job_lists_the_nodes_that_may_come() -> None:
    """Ray's autoscaler for Kubernetes does not tell a search, which would ask for no GPU."""
    spec = read("deploy/kuberay_job.yaml")["spec"]
    entrypoint = shlex.split(spec["entrypoint"])
    asked = load_experiment(TOP / "experiments/quickstart.yaml", [entrypoint[entrypoint.index("--set") + 1]])
    nodes = []
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        nodes += [(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))] * group["maxReplicas"]
    assert asked.cluster.resources == nodes


def test_kubernetes_manifests_are_what_kubernetes_takes() -> None:
    parts = list(yaml.safe_load_all((TOP / "deploy/kubernetes_mlflow.yaml").read_text(encoding="utf-8")))
    for part in parts:
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
    services = {part["metadata"]["name"]: part for part in parts if part["kind"] == "Service"}
    for name in KUBERAY_FILES:
        text = (TOP / name).read_text(encoding="utf-8")
        host, port = re.search(r"MLFLOW_TRACKING_URI, value: \"http://([\w-]+):(\d+)\"", text).groups()  # type: ignore[union-attr]
        assert int(port) in [one["port"] for one in services[host]["spec"]["ports"]]
    guarded = {part["spec"]["podSelector"]["matchLabels"]["app"] for part in parts if part["kind"] == "NetworkPolicy"}
    assert guarded == {service["spec"]["selector"]["app"] for service in services.values()}


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
    locked = (TOP / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r"^setuptools==", locked, re.MULTILINE), "installing without build isolation needs it"


def test_versions_agree() -> None:
    locked = re.search(r"^ray==(\S+)$", (TOP / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert locked is not None
    for name in KUBERAY_FILES:
        spec = read(name)["spec"]
        assert spec.get("rayClusterSpec", spec)["rayVersion"] == locked.group(1)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_no_file_holds_a_secret(name: str) -> None:
    text = (TOP / name).read_text(encoding="utf-8")
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|(password|token|secret)['\"]?\s*[:=]\s*['\"]?[0-9a-f]{16}", text, re.I
    )
    for user, password in re.findall(r"://([^/\s:@]+):([^@\s]+)@", text):
        assert password.startswith(("$", "\\(")), f"{user}'s password is written out"


def test_the_mlflow_script_refuses_every_interface() -> None:
    script = TOP / "deploy/mlflow_server.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    done = subprocess.run(["bash", str(script), "0.0.0.0", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "private address" in done.stderr


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
    files = {f"deploy/{file.name}" for file in (TOP / "deploy").iterdir()} | {"ray_cluster.yaml"}
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
