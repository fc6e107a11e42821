"""ray_cluster.yaml on AWS: an account prepared by deploy/aws_account.py, in which Ray's own provider then starts nodes.

moto answers in place of AWS. It does not check rights, so what Ray calls is compared with the policies.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP / "deploy"))

import aws_account  # noqa: E402

SSH_FROM = "203.0.113.7/32"
POLICIES = ("deploy/aws_head_policy.json", "deploy/aws_worker_policy.json")


def read(name: str) -> Any:
    return yaml.safe_load((TOP / name).read_text(encoding="utf-8"))


def allowed(policy: str) -> dict[str, list[dict[str, Any]]]:
    """Statements of a policy by the actions that they allow."""
    found: dict[str, list[dict[str, Any]]] = {}
    for statement in json.loads((TOP / policy).read_text(encoding="utf-8"))["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            found.setdefault(action, []).append(statement)
    return found


@dataclass
class Account:
    """An AWS account of moto's.

    Attributes:
        out: the file that the script writes.
        ami: a machine image that exists.
        calls: `service:Operation` of all requests.
    """

    out: Path
    ami: str
    calls: list[str] = field(default_factory=list)

    def prepare(self, *more: str) -> int:
        given = ["--bucket", "my-bucket", "--ssh-from", SSH_FROM, "--ami", self.ami, "--out", str(self.out)]
        return aws_account.main([*given, *more])

    def launcher(self) -> dict[str, Any]:
        return prepare_config(yaml.safe_load(self.out.read_text()))  # type: ignore[no-any-return]

    def record(self, operation_name: str, **_: Any) -> None:
        self.calls.append(operation_name)


def new_ami(region: str) -> str:
    return str(boto3.client("ec2", region_name=region).register_image(Name="gpu")["ImageId"])


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # thousands, a second each time
    with mock_aws():
        yield Account(tmp_path / "cluster.yaml", new_ami("us-east-1"))
    for cache in (resource_cache, client_cache):
        cache.cache_clear()


def test_a_prepared_account_is_what_ray_launches_in(account: Account) -> None:
    assert account.prepare() == 0
    assert "CHANGE-ME" not in account.out.read_text()
    config = account.launcher()
    validate_config(copy.deepcopy(config))
    prepared = boto3.client("ec2", region_name="us-east-1")
    groups_before = prepared.describe_security_groups()["SecurityGroups"]

    config = bootstrap_aws(config)

    # Ray found everything that it needs and created nothing: no open group, no role with all rights.
    assert prepared.describe_security_groups()["SecurityGroups"] == groups_before
    roles = {role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]}
    assert roles == {"heterokd-head", "heterokd-worker", "AWSServiceRoleForspot"}
    provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "head" if name == "head" else "worker", TAG_RAY_NODE_NAME: name}
        (started,) = provider.create_node(kind["node_config"], {**tags, TAG_RAY_LAUNCH_CONFIG: "x"}, 1)
        (instance,) = prepared.describe_instances(InstanceIds=[started])["Reservations"][0]["Instances"]
        assert instance["ImageId"] == account.ami
        assert instance["KeyName"] == "heterokd"
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["IamInstanceProfile"]["Arn"].endswith("heterokd-head" if name == "head" else "heterokd-worker")
        assert instance.get("InstanceLifecycle") == ("spot" if name == "gpu_spot" else None)
        assert {"Key": "project", "Value": "heterokd"} in instance["Tags"]
    everything = provider.non_terminated_nodes({})
    assert len(everything) == 3
    provider.terminate_nodes(everything)
    assert provider.non_terminated_nodes({}) == []
    states = [
        each["State"]["Name"] for found in prepared.describe_instances()["Reservations"] for each in found["Instances"]
    ]
    assert set(states) == {"terminated"}, "stopped instances cost as long as they exist"


def test_the_head_calls_nothing_that_its_role_may_not(account: Account) -> None:
    account.prepare()
    config = bootstrap_aws(account.launcher())
    provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
    for ec2 in (provider.ec2, provider.ec2_fail_fast):
        ec2.meta.client.meta.events.register(
            "provide-client-params.ec2.*", lambda model, **_: account.record(model.name)
        )
    node = config["available_node_types"]["gpu_spot"]["node_config"]
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_NODE_NAME: "x", TAG_RAY_LAUNCH_CONFIG: "x"}
    started = list(provider.create_node(node, tags, 2))
    assert set(provider.non_terminated_nodes({})) == set(started)
    assert all(provider.is_running(each) and provider.internal_ip(each) for each in started)
    provider.set_node_tags(started[0], {TAG_RAY_NODE_STATUS: "up-to-date"})
    provider.terminate_node(started[0])
    provider.terminate_nodes(started[1:])
    assert {"RunInstances", "CreateTags", "DescribeInstances", "TerminateInstances"} <= set(account.calls)
    assert {f"ec2:{call}" for call in account.calls} <= allowed("deploy/aws_head_policy.json").keys()


def test_rays_provider_tags_instances_and_disks_for_the_bill() -> None:
    """Merged with Ray's tags of an instance by Ray's provider, as at a launch."""
    for name, kind in read("ray_cluster.yaml")["available_node_types"].items():
        specs = [{"ResourceType": "instance", "Tags": [{"Key": "ray-node-type", "Value": name}]}]
        node_provider.AWSNodeProvider._merge_tag_specs(specs, kind["node_config"]["TagSpecifications"])
        tags = {spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]} for spec in specs}
        project = {"project": "heterokd"}
        assert tags == {"instance": {"ray-node-type": name, **project}, "volume": project}


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
        if name != "head":
            role = f"arn:aws:iam::123456789012:role/{kind['node_config']['IamInstanceProfile']['Name']}"
            assert fnmatch(role, policy["iam:PassRole"][0]["Resource"])
    parameter = f"arn:aws:ssm:us-east-1::parameter{aws_account.AMI_PARAMETER}"
    assert fnmatch(parameter, policy["ssm:GetParameters"][0]["Resource"])
    assert policy["ec2:RunInstances"][0]["Condition"]["StringEquals"] == {
        "aws:RequestedRegion": config["provider"]["region"]
    }
    cluster = {"ec2:ResourceTag/ray-cluster-name": config["cluster_name"]}
    for action in ("ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances"):
        assert [each["Condition"]["StringEquals"] for each in policy[action]] == [cluster]
    conditions = [each["Condition"]["StringEquals"] for each in policy["ec2:CreateTags"]]
    assert conditions == [{"ec2:CreateAction": "RunInstances"}, cluster]


@pytest.mark.parametrize("policy", POLICIES)
def test_roles_reach_one_bucket_and_one_image(policy: str) -> None:
    reached: dict[str, set[str]] = {}
    for action, statements in allowed(policy).items():
        reached.setdefault(action.split(":")[0], set()).update(each["Resource"] for each in statements)
    assert reached["s3"] == {"arn:aws:s3:::CHANGE-ME", "arn:aws:s3:::CHANGE-ME/*"}
    assert reached["ecr"] == {"*", "arn:aws:ecr:us-east-1:*:repository/heterokd"}
    assert [each["Action"] for each in allowed(policy)["ecr:GetAuthorizationToken"]] == [["ecr:GetAuthorizationToken"]]
    assert ("ec2" in reached) == ("head" in policy)


def test_what_the_script_creates_is_narrow(account: Account, tmp_path: Path) -> None:
    assert account.prepare() == 0
    (group,) = boto3.client("ec2", region_name="us-east-1").describe_security_groups(GroupNames=["heterokd"])[
        "SecurityGroups"
    ]
    rules = {(rule["IpProtocol"], rule.get("FromPort")): rule for rule in group["IpPermissions"]}
    assert rules.keys() == {("-1", None), ("tcp", 22)}
    assert [each["CidrIp"] for each in rules["tcp", 22]["IpRanges"]] == [SSH_FROM]
    assert rules["-1", None]["IpRanges"] == []
    assert [each["GroupId"] for each in rules["-1", None]["UserIdGroupPairs"]] == [group["GroupId"]]
    assert (tmp_path / ".ssh/heterokd.pem").stat().st_mode & 0o777 == 0o600
    closed = boto3.client("s3").get_public_access_block(Bucket="my-bucket")["PublicAccessBlockConfiguration"]
    assert all(closed.values())
    for kind in ("head", "worker"):
        policy = boto3.client("iam").get_role_policy(RoleName=f"heterokd-{kind}", PolicyName="heterokd")[
            "PolicyDocument"
        ]
        assert "arn:aws:s3:::my-bucket/*" in json.dumps(policy)


def test_a_repeated_run_changes_only_who_may_connect(account: Account) -> None:
    assert account.prepare() == 0
    before = yaml.safe_load(account.out.read_text())
    given = ["--bucket", "my-bucket", "--ssh-from", "2001:db8::/64", "--out", str(account.out)]
    assert aws_account.main(given) == 0, "the machine image is that of the first run"
    assert yaml.safe_load(account.out.read_text()) == before
    (group,) = boto3.client("ec2", region_name="us-east-1").describe_security_groups(GroupNames=["heterokd"])[
        "SecurityGroups"
    ]
    (ssh,) = [rule for rule in group["IpPermissions"] if rule.get("FromPort") == 22]
    assert ssh["IpRanges"] == []
    assert [each["CidrIpv6"] for each in ssh["Ipv6Ranges"]] == ["2001:db8::/64"]


def test_another_region_is_written_everywhere(account: Account) -> None:
    image = "registry.example.org/team/heterokd:1"
    assert account.prepare("--region", "eu-west-1", "--ami", new_ami("eu-west-1"), "--image", image) == 0
    text = account.out.read_text()
    policy = boto3.client("iam").get_role_policy(RoleName="heterokd-head", PolicyName="heterokd")["PolicyDocument"]
    assert "us-east-1" not in text + json.dumps(policy)
    assert yaml.safe_load(text)["docker"]["image"] == image


def test_a_lost_key_file_is_named(account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account.prepare()
    (tmp_path / ".ssh/heterokd.pem").unlink()
    assert account.prepare() == 2
    assert "key pair heterokd exists, but" in capsys.readouterr().err


def test_a_new_accounts_limits_are_named() -> None:
    class Quotas:
        def get_service_quota(self, **of: str) -> dict[str, Any]:
            if of["QuotaCode"] == "L-DB2E81BA":
                raise ClientError({"Error": {"Code": "AccessDenied"}}, "GetServiceQuota")
            return {"Quota": {"Value": 0.0}}

    spot, on_demand = aws_account.quota_warnings(Quotas(), read("ray_cluster.yaml"))
    assert "may run 0 virtual CPUs of spot GPU instances, and 64 are needed" in spot
    assert "could not be read" in on_demand


def test_the_machine_image_is_looked_up_once(tmp_path: Path) -> None:
    class Parameters:
        def get_parameter(self, **of: str) -> dict[str, Any]:
            assert of == {"Name": aws_account.AMI_PARAMETER}
            return {"Parameter": {"Value": "ami-0123"}}

    assert aws_account.pinned_image(Parameters(), tmp_path / "absent.yaml") == "ami-0123"
    assert aws_account.pinned_image(Parameters(), TOP / "ray_cluster.yaml") == "ami-CHANGE-ME"


@pytest.mark.parametrize("ssh_from", ["0.0.0.0/0", "::/0", "my-laptop"])
def test_ssh_from_everywhere_is_refused(ssh_from: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        aws_account.main(["--bucket", "b", "--ssh-from", ssh_from])
    assert ended.value.code == 2
    assert "203.0.113.7/32" in capsys.readouterr().err
