"""Prepare an AWS account for ray_cluster.yaml, and write a copy of that file in which nothing is left to fill in.

    python deploy/aws_account.py --bucket MY-BUCKET --ssh-from 203.0.113.7/32      # writes aws_cluster.yaml
    ray up aws_cluster.yaml

Creates what is missing and leaves the rest: the bucket (private), the roles heterokd-head and heterokd-worker with the
policies of this folder, the security group heterokd (SSH only from --ssh-from), the key pair heterokd with its file
~/.ssh/heterokd.pem, and a repository for the container image unless --image names another. The machine image (AMI) is
looked up once and written by its number; a repeated run keeps the number. It may be run repeatedly. It needs boto3 and
rights to do this, in the environment's credentials.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

TOP = Path(__file__).parents[1]
LAUNCHER = TOP / "ray_cluster.yaml"
NAME = "heterokd"
REGION = "us-east-1"
"""Of the shipped files."""

AMI_PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
QUOTAS = {"spot": "L-3819A6DF", "on demand": "L-DB2E81BA"}
"""Codes of AWS' limits on the virtual CPUs of all G and VT instances; they are 0 in new accounts."""

TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


class SetupError(Exception):
    """What stands in the way, as a sentence for the user."""


def unless_exists(create: Callable[..., Any], codes: str, **arguments: Any) -> bool:
    """Call a function of AWS and return True, or False if what it creates is there already.

    Args:
        create: the function.
        codes: the errors' codes that say so, as a regular expression.
        arguments: of the function.
    """
    try:
        create(**arguments)
    except ClientError as error:
        if re.fullmatch(codes, error.response["Error"]["Code"]):
            return False
        raise
    return True


def prepare_bucket(s3: Any, bucket: str, region: str) -> bool:
    """Create a private bucket; returns whether it is new. Parts of aborted uploads are removed after a week."""
    # us-east-1 takes no location.
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    created = unless_exists(s3.create_bucket, "BucketAlreadyOwnedByYou", Bucket=bucket, **place)
    closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))
    if created:
        rule = {
            "ID": "aborted-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        }
        s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})
    return created


def prepare_role(iam: Any, kind: str, bucket: str, region: str) -> None:
    """Create the role and the instance profile of the head or of workers, and set its policy."""
    name, exists = f"{NAME}-{kind}", "EntityAlreadyExists"
    unless_exists(iam.create_role, exists, RoleName=name, AssumeRolePolicyDocument=json.dumps(TRUST))
    policy = (TOP / f"deploy/aws_{kind}_policy.json").read_text(encoding="utf-8")
    policy = policy.replace("CHANGE-ME", bucket).replace(REGION, region)
    iam.put_role_policy(RoleName=name, PolicyName=NAME, PolicyDocument=policy)
    unless_exists(iam.create_instance_profile, exists, InstanceProfileName=name)
    unless_exists(iam.add_role_to_instance_profile, "LimitExceeded", InstanceProfileName=name, RoleName=name)


def prepare_security_group(ec2: Any, ssh_from: str) -> str:
    """Create the group in the default network, or correct its rules; returns its ID.

    Raises:
        SetupError: if the account has no default network.
    """
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        raise SetupError("the account has no default VPC in this region; create one: aws ec2 create-default-vpc")
    network = networks[0]["VpcId"]
    filters = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [network]}]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if found:
        group, present = found[0]["GroupId"], found[0]["IpPermissions"]
    else:
        group = ec2.create_security_group(GroupName=NAME, Description="heterokd's Ray nodes", VpcId=network)["GroupId"]
        present = []
    family = {"Ipv6Ranges": [{"CidrIpv6": ssh_from}]} if ":" in ssh_from else {"IpRanges": [{"CidrIp": ssh_from}]}
    if present:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=present)
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **family}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[inside, ssh])
    return str(group)


def prepare_key(ec2: Any, file: Path) -> None:
    """Create the key pair and its file, which only this user can read.

    Raises:
        SetupError: if either exists without the other.
    """
    known = ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [NAME]}])["KeyPairs"]
    if bool(known) != file.exists():
        there, absent = (f"key pair {NAME}", file) if known else (file, f"key pair {NAME}")
        advice = f"bring the file here, or remove the key pair: aws ec2 delete-key-pair --key-name {NAME}"
        raise SetupError(f"{there} exists, but {absent} does not; {advice if known else 'move the file away'}")
    if known:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    material = ec2.create_key_pair(KeyName=NAME, KeyType="ed25519")["KeyMaterial"]
    with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as output:
        output.write(material)


def prepare_repository(ecr: Any) -> str:
    """Create the repository for container images, with tags that never move, and return its address."""
    unless_exists(
        ecr.create_repository,
        "RepositoryAlreadyExistsException",
        repositoryName=NAME,
        imageTagMutability="IMMUTABLE",
    )
    return str(ecr.describe_repositories(repositoryNames=[NAME])["repositories"][0]["repositoryUri"])


def pinned_image(ssm: Any, written: Path) -> str:
    """Return the number of the machine image: that of a file of an earlier run, else today's."""
    if written.exists():
        types = yaml.safe_load(written.read_text(encoding="utf-8"))["available_node_types"]
        return str(types["head"]["node_config"]["ImageId"])
    return str(ssm.get_parameter(Name=AMI_PARAMETER)["Parameter"]["Value"])


def quota_warnings(quotas: Any, launcher: dict[str, Any]) -> list[str]:
    """Return a sentence for each of AWS' limits that is too small for all GPU nodes of the launcher file."""
    wanted = max(each["max_workers"] * each["resources"]["CPU"] for each in gpu_types(launcher))
    found = []
    for kind, code in QUOTAS.items():
        try:
            value = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        except (ClientError, KeyError):
            found.append(f"the limit on {kind} GPU instances ({code}) could not be read; check it in Service Quotas")
            continue
        if value < wanted:
            found.append(
                f"the account may run {value:.0f} virtual CPUs of {kind} GPU instances, and {wanted} are needed for all"
                f" nodes; ask for more, which may take days: aws service-quotas request-service-quota-increase"
                f" --service-code ec2 --quota-code {code} --desired-value {wanted}"
            )
    return found


def gpu_types(launcher: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the node types with GPUs."""
    return [each for each in launcher["available_node_types"].values() if each["resources"].get("GPU")]


def filled(text: str, region: str, values: dict[str, str]) -> str:
    """Return the launcher file with every CHANGE-ME replaced.

    Args:
        text: of ray_cluster.yaml.
        region: in place of its region.
        values: `image`, `ami`, `group` and `bucket`.
    """
    registry = values["image"].split("/")[0] if "/" in values["image"] else ""
    for place, value in (
        ("CHANGE-ME/heterokd:0.1.0", values["image"]),
        ("ami-CHANGE-ME", values["ami"]),
        ("sg-CHANGE-ME", values["group"]),
        ("s3://CHANGE-ME", f"s3://{values['bucket']}"),
        ("CHANGE-ME", registry),
        (REGION, region),
    ):
        text = text.replace(place, value)
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "# Written by deploy/aws_account.py from ray_cluster.yaml; docs/cluster.md explains it.\n" + "".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Prepare an AWS account for ray_cluster.yaml.")
    parser.add_argument("--bucket", required=True, help="name of the bucket for all state; created if it is missing")
    parser.add_argument("--ssh-from", required=True, help="who may connect by SSH: your address, as 203.0.113.7/32")
    parser.add_argument("--region", default=REGION, help=f"default {REGION}")
    parser.add_argument("--image", help="container image, with its tag; default: a repository of the account")
    parser.add_argument("--ami", help="number of the machine image; default: today's Deep Learning Base image")
    parser.add_argument("--out", type=Path, default=Path("aws_cluster.yaml"), help="default aws_cluster.yaml")
    given = parser.parse_args(arguments)
    try:
        allowed = ip_network(given.ssh_from)
    except ValueError:
        parser.error(f"--ssh-from: {given.ssh_from!r} is no network; write your address as 203.0.113.7/32")
    if allowed.prefixlen == 0:
        parser.error("--ssh-from: this is the whole internet; give your address as 203.0.113.7/32")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    given = parsed(arguments)
    session = boto3.Session(region_name=given.region)
    try:
        prepare_bucket(session.client("s3"), given.bucket, given.region)
        for kind in ("head", "worker"):
            prepare_role(session.client("iam"), kind, given.bucket, given.region)
        spot = session.client("iam").create_service_linked_role
        unless_exists(spot, "InvalidInput|EntityAlreadyExists", AWSServiceName="spot.amazonaws.com")
        ec2 = session.client("ec2")
        image = given.image or f"{prepare_repository(session.client('ecr'))}:0.1.0"
        values = {
            "bucket": given.bucket,
            "image": image,
            "group": prepare_security_group(ec2, given.ssh_from),
            "ami": given.ami or pinned_image(session.client("ssm"), given.out),
        }
        prepare_key(ec2, Path("~/.ssh/heterokd.pem").expanduser())
        text = filled(LAUNCHER.read_text(encoding="utf-8"), given.region, values)
        given.out.write_text(text, encoding="utf-8")
        for line in quota_warnings(session.client("service-quotas"), yaml.safe_load(text)):
            print(f"warning: {line}")
    except (SetupError, ClientError, BotoCoreError) as error:
        print(f"aws_account.py: {error}", file=sys.stderr)
        return 2
    print(f"bucket {given.bucket}, roles, security group {values['group']}, key pair, machine image {values['ami']}")
    if given.image is None:
        print(f"push the container image: docker build -f deploy/Dockerfile -t {image} . && docker push {image}")
    print(f"then: ray up {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
