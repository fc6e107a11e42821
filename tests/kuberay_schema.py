"""What of KubeRay's RayCluster and RayJob (ray.io/v1) the manifests are checked against, as a JSON schema.

The fields are those of the CRDs of KubeRay 1.7.0 (helm-chart/kuberay-operator/crds, a megabyte each, in no package);
pod templates are checked against Kubernetes' own schema instead.
"""

from __future__ import annotations

from typing import Any

QUANTITY = {"type": "string", "pattern": r"^[0-9.]+(m|[kMGTPE]|[KMGTPE]i)?$"}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"type": "object", "additionalProperties": QUANTITY} for name in ("requests", "limits")},
}
TEMPLATE = {"type": "object", "required": ["spec"]}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


CREDENTIAL = closed(
    [],
    value={"type": "string"},
    valueFrom=closed(
        [],
        secretKeyRef=closed(["key"], name={"type": "string"}, key={"type": "string"}, optional={"type": "boolean"}),
        configMapKeyRef={"type": "object"},
        fieldRef={"type": "object"},
        fileKeyRef={"type": "object"},
        resourceFieldRef={"type": "object"},
    ),
)
HEAD = closed(
    ["rayStartParams", "template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService={"type": "object"},
    enableIngress={"type": "boolean"},
    ingressOptions={"type": "object"},
    resources={"type": "object", "additionalProperties": QUANTITY},
    labels=WORDS,
    rayStartParams=WORDS,
    template=TEMPLATE,
)
WORKERS = closed(
    ["groupName", "minReplicas", "maxReplicas", "template"],
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=COUNT,
    priority={"type": "integer"},
    suspend={"type": "boolean"},
    resources={"type": "object", "additionalProperties": QUANTITY},
    labels=WORDS,
    rayStartParams=WORDS,
    template=TEMPLATE,
    scaleStrategy={"type": "object"},
)
CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    authOptions=closed(
        ["mode"],
        mode={"enum": ["disabled", "token"]},
        secretName={"type": "string"},
        enableK8sTokenAuth={"type": "boolean"},
    ),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=closed(
        [],
        resources=RESOURCES,
        args={"type": "array"},
        command={"type": "array"},
        image={"type": "string"},
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
        securityContext={"type": "object"},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    gcsFaultToleranceOptions=closed(
        [],
        backend={"enum": ["redis", "rocksdb"]},
        externalStorageNamespace={"type": "string"},
        redisAddress={"type": "string"},
        redisPassword=CREDENTIAL,
        redisUsername=CREDENTIAL,
        storage={"type": "object"},
    ),
    historyServerOptions={"type": "object"},
    networkPolicy={"type": "object"},
    tlsOptions={"type": "object"},
    upgradeStrategy=closed([], type={"enum": ["Recreate", "None"]}),
    headServiceAnnotations=WORDS,
    suspend={"type": "boolean"},
    managedBy={"type": "string"},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = closed(
    ["entrypoint"],
    entrypoint={"type": "string"},
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=TEMPLATE,
    metadata=WORDS,
    clusterSelector=WORDS,
    submitterConfig=closed([], backoffLimit=COUNT),
    managedBy={"type": "string"},
    deletionStrategy={"type": "object"},
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    runtimeEnvYAML={"type": "string"},
    jobId={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources={"type": "string"},
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    suspend={"type": "boolean"},
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"type": "object", "required": ["name"]},
        spec=spec,
    )


SCHEMAS = {"RayCluster": resource("RayCluster", CLUSTER), "RayJob": resource("RayJob", JOB)}
