"""The Kubernetes manifests: against Kubernetes' and KubeRay's schemas, KubeRay's own rules, and one another."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay_schema import SCHEMAS
from packaging.version import Version

from heterokd.config.reading import load_experiment

TOP = Path(__file__).parents[1]
KUBERAY_FILES = ("deploy/kuberay_cluster.yaml", "deploy/kuberay_job.yaml")
PLAIN_FILES = ("deploy/kubernetes_mlflow.yaml", "deploy/kubernetes_ray.yaml")
KUBERNETES = "1.30"


def read(name: str) -> Any:
    return yaml.safe_load((TOP / name).read_text(encoding="utf-8"))


def parts(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((TOP / name).read_text(encoding="utf-8")))


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """All pod templates by a name, with the labels that KubeRay gives to Ray's."""
    for name in KUBERAY_FILES:
        manifest = read(name)
        for group in groups_of(manifest):
            kind = "worker" if "groupName" in group else "head"
            template = copy.deepcopy(group["template"])
            labels = template.setdefault("metadata", {}).setdefault("labels", {})
            labels.update({"ray.io/is-ray-node": "yes", "ray.io/node-type": kind})
            yield f"{name} {kind}", template
        if "submitterPodTemplate" in manifest["spec"]:
            yield f"{name} submitter", manifest["spec"]["submitterPodTemplate"]
    for name in PLAIN_FILES:
        for part in parts(name):
            if part["kind"] in ("Deployment", "StatefulSet"):
                yield part["metadata"]["name"], part["spec"]["template"]
            elif part["kind"] == "CronJob":
                yield part["metadata"]["name"], part["spec"]["jobTemplate"]["spec"]["template"]


TEMPLATES = dict(templates())
CONTAINERS = {name: container for name, template in TEMPLATES.items() for container in template["spec"]["containers"]}


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_manifests_are_what_the_operator_takes(name: str) -> None:
    manifest = read(name)
    schema = SCHEMAS[manifest["kind"]]
    jsonschema.validate(manifest, schema)
    cluster, groups = cluster_of(manifest), groups_of(manifest)
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


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_manifests_follow_the_operators_rules(name: str) -> None:
    """What KubeRay 1.7.0 refuses although its schema allows it (ray-operator/controllers/ray/utils/validation.go)."""
    cluster = cluster_of(read(name))
    assert Version(cluster["rayVersion"]) >= Version("2.52"), "token authentication"
    assert cluster["autoscalerOptions"]["version"] == "v2"
    head = cluster["headGroupSpec"]
    names = {each["name"] for each in head["template"]["spec"]["containers"][0]["env"]}
    assert "RAY_enable_autoscaler_v2" not in names, "set by the operator, for autoscalerOptions.version"
    assert not names & {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"}
    for group in [head, *cluster["workerGroupSpecs"]]:
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        assert not {"redis-password", "num-gpus", "labels"} & group["rayStartParams"].keys()


def test_the_permanent_cluster_survives_its_head() -> None:
    options = read("deploy/kuberay_cluster.yaml")["spec"]["gcsFaultToleranceOptions"]
    host, port = options["redisAddress"].split(":")
    found = {(part["kind"], part["metadata"]["name"]): part for part in parts("deploy/kubernetes_ray.yaml")}
    assert [each["port"] for each in found["Service", host]["spec"]["ports"]] == [int(port)]
    redis = found["StatefulSet", host]["spec"]
    (container,) = redis["template"]["spec"]["containers"]
    assert options["redisPassword"] == {"valueFrom": container["env"][0]["valueFrom"]}
    assert "--appendonly yes" in container["command"][-1], "Redis itself must keep what it was given"
    claims = {claim["metadata"]["name"]: claim for claim in redis["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims.keys()


def test_the_job_searches_an_experiment_that_the_image_holds() -> None:
    entrypoint = shlex.split(read("deploy/kuberay_job.yaml")["spec"]["entrypoint"])
    assert entrypoint[:2] == ["heterokd", "search"]
    inside = entrypoint[2].removeprefix("/home/ray/heterokd/")
    assert (TOP / inside).exists()
    assert f"COPY {inside.split('/')[0]} " in (TOP / "deploy/Dockerfile").read_text(encoding="utf-8")
    from typer.main import get_command

    from heterokd.cli.app import app

    known = {option for parameter in get_command(app).commands["search"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in entrypoint if word.startswith("--")} <= known


def test_the_job_asks_for_the_gpus_of_its_nodes() -> None:
    """Ray's autoscaler for Kubernetes does not tell a search which nodes may come, so the command does."""
    manifest = read("deploy/kuberay_job.yaml")
    entrypoint = shlex.split(manifest["spec"]["entrypoint"])
    asked = load_experiment(TOP / "experiments/quickstart.yaml", [entrypoint[entrypoint.index("--set") + 1]])
    nodes = []
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
        nodes += [(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))] * group["maxReplicas"]
    assert asked.cluster.resources == nodes
    assert all(gpus > 0 for _, gpus in nodes)


@pytest.mark.parametrize("name", PLAIN_FILES)
def test_kubernetes_manifests_are_what_kubernetes_takes(name: str) -> None:
    for part in parts(name):
        kubernetes_validate.validate(part, KUBERNETES, strict=True)


def test_services_are_where_others_look_for_them() -> None:
    services = {
        part["metadata"]["name"]: part for name in PLAIN_FILES for part in parts(name) if part["kind"] == "Service"
    }
    for name in KUBERAY_FILES:
        text = (TOP / name).read_text(encoding="utf-8")
        host, port = re.search(r"MLFLOW_TRACKING_URI, value: \"http://([\w-]+):(\d+)\"", text).groups()  # type: ignore[union-attr]
        assert int(port) in [one["port"] for one in services[host]["spec"]["ports"]]
    for service in services.values():
        selected = [name for name, template in TEMPLATES.items() if selects(service["spec"]["selector"], template)]
        assert len(selected) == 1


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_have_requests_limits_and_few_rights(name: str) -> None:
    container, pod = CONTAINERS[name], TEMPLATES[name]["spec"]
    resources = container["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", [name for name in CONTAINERS if "submitter" not in name and "backup" not in name])
def test_services_and_ray_nodes_have_probes(name: str) -> None:
    container = CONTAINERS[name]
    assert {"readinessProbe", "livenessProbe"} <= container.keys()
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert ("httpGet" in probe) != ("exec" in probe)


def test_rays_probe_asks_a_page_that_ray_serves_without_a_token() -> None:
    from ray.dashboard import http_server_agent
    from ray.dashboard.modules.reporter import healthz_agent

    assert CONTAINERS["deploy/kuberay_cluster.yaml head"]["livenessProbe"]["httpGet"]["path"] == "/api/healthz"
    for module in (http_server_agent, healthz_agent):
        assert '"/api/healthz"' in Path(module.__file__).read_text(encoding="utf-8")
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    assert CONTAINERS["deploy/kuberay_job.yaml worker"]["readinessProbe"]["httpGet"]["port"] == (
        DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    )


def selects(labels: dict[str, str], template: dict[str, Any]) -> bool:
    found = template.get("metadata", {}).get("labels", {})
    return all(found.get(key) == value for key, value in labels.items())


def reach(target: str) -> set[tuple[str, int | None]]:
    """Which pods reach a pod by the network policies, and by which port; None is every port."""
    policies = [part for name in PLAIN_FILES for part in parts(name) if part["kind"] == "NetworkPolicy"]
    of_target = [
        each["spec"] for each in policies if selects(each["spec"]["podSelector"]["matchLabels"], TEMPLATES[target])
    ]
    assert of_target, f"{target} is open to every pod"
    found: set[tuple[str, int | None]] = set()
    for rule in (rule for policy in of_target for rule in policy["ingress"]):
        ports = [each["port"] for each in rule.get("ports", [])] or [None]
        for peer in rule["from"]:
            # Every peer is named by its labels: an empty selector would let all pods in.
            assert peer["podSelector"]["matchLabels"]
            names = [
                name for name, template in TEMPLATES.items() if selects(peer["podSelector"]["matchLabels"], template)
            ]
            found |= {(name, port) for name in names for port in ports}
    return found


def test_pods_reach_only_what_they_need() -> None:
    ray = {name for name in TEMPLATES if name.endswith(("head", "worker"))}
    heads = {name for name in ray if name.endswith("head")}
    submitter = "deploy/kuberay_job.yaml submitter"
    for name in ray:
        assert reach(name) == {(each, None) for each in ray} | ({(submitter, 8265)} if name in heads else set())
    assert reach("heterokd-redis") == {(name, 6379) for name in heads}
    assert reach("heterokd-mlflow") == {(name, 5000) for name in ray}
    assert reach("heterokd-postgres") == {("heterokd-mlflow", 5432), ("heterokd-backup", 5432)}


def test_the_backup_runs_a_script_of_the_image() -> None:
    container = CONTAINERS["heterokd-backup"]
    inside = container["command"][1].removeprefix("/home/ray/heterokd/")
    assert (TOP / inside).exists()
    assert container["command"][2] == "dump"
    assert container["image"] == CONTAINERS["heterokd-mlflow"]["image"]
    uri = [
        {each["name"]: each.get("value") for each in CONTAINERS[name]["env"]}["MLFLOW_BACKEND_STORE_URI"]
        for name in ("heterokd-backup", "heterokd-mlflow")
    ]
    assert uri[0] == uri[1]


def test_versions_agree() -> None:
    locked = re.search(r"^ray==(\S+)$", (TOP / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert locked is not None
    for name in KUBERAY_FILES:
        assert cluster_of(read(name))["rayVersion"] == locked.group(1)
    version = re.search(r'^version = "(\S+)"$', (TOP / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    ours = {container["image"] for container in CONTAINERS.values() if "CHANGE-ME" in container["image"]}
    assert ours == {read("ray_cluster.yaml")["docker"]["image"]} == {f"CHANGE-ME/heterokd:{version.group(1)}"}
