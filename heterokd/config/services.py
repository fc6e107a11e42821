"""The sections `cache`, `tracking`, `cluster` and `promotion`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from heterokd.config.costs import CostLimits
from heterokd.config.names import model_name_fault, text_fault
from heterokd.config.sentences import given
from heterokd.config.settings import Names, Settings
from heterokd.config.test_time import TestTimeSettings
from heterokd.errors import without_password


class CachingSettings(Settings):
    """The cache of teacher outputs: trainings that show the same view share its outputs."""

    enabled: bool = Field(
        True,
        description="store teacher outputs; methods that read more than logits and embedding run the teacher instead",
    )
    views: int = Field(50, ge=1, description="maximum number of views of each image; longer trainings repeat them")
    dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="type of stored outputs; fp16 halves the space and rounds"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="number format in which the teacher computes stored outputs; bf16 is faster on GPUs"
    )
    top_k: int | None = Field(None, ge=1, description="store this many logits, and the mass of the others")
    max_gb: float = Field(50.0, gt=0, description="a larger cache is not built; the teacher then runs in each training")


class TrackingSettings(Settings):
    """Trackers that log a search, and the model registry."""

    experiment: str | None = Field(None, description="MLflow experiment; default: the experiment's name")
    registered_model: str | None = Field(None, description="name of the registered model; default: NAME-student")
    uri: str | None = Field(None, description="MLflow tracking URI; default: runs/mlflow.db")
    also: Names = Field((), description="trackers in addition to MLflow: csv, package.module:Name or ./file.py:Name")

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        """Refuse credentials, because experiments are stored, logged and shown."""
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                f"{without_password(uri)}: an experiment is stored and logged, so it must not contain credentials; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or MLFLOW_TRACKING_URI for a "
                "database"
            )
        return uri

    @field_validator("experiment")
    @classmethod
    def _fits_the_store(cls, name: str | None) -> str | None:
        fault = None if name is None else text_fault(name)
        if fault is not None:
            raise ValueError(f"{fault}, got {given(name)}")
        return name

    @field_validator("registered_model")
    @classmethod
    def _fits_the_registry(cls, name: str | None) -> str | None:
        fault = None if name is None else model_name_fault(name)
        if fault is not None:
            raise ValueError(f"{fault}, got {given(name)}")
        return name


class NodeSettings(Settings):
    """Nodes of the same type."""

    count: int = Field(1, ge=1, description="number of these nodes")
    price_per_hour: float = Field(0.0, ge=0, description="of a node, in cluster.currency")
    cpus: int | None = Field(None, ge=0, description="cores of a node, as Ray counts them, where nodes come later")
    gpus: int | None = Field(None, ge=0, description="GPUs of a node, as Ray counts them, where nodes come later")


class ClusterSettings(Settings):
    """Prices of a cluster's nodes, and resources of nodes that come later, where Ray does not know them."""

    nodes: dict[str, NodeSettings] = Field(default_factory=dict, description="types of nodes, by any name")
    currency: str = Field("USD", description="currency of all prices")
    store_gbit: float = Field(
        5.0, gt=0, description="gigabits per second that a node reads from the store of data.root, for plans"
    )

    @property
    def resources(self) -> list[tuple[int, int]]:
        """Cores and GPUs of each node whose resources are given."""
        given = [node for node in self.nodes.values() if node.cpus or node.gpus]
        return [(node.cpus or 1, node.gpus or 0) for node in given for _ in range(node.count)]

    @property
    def price_per_hour(self) -> float | None:
        """Price of all nodes together; None if no node is listed."""
        return sum(node.count * node.price_per_hour for node in self.nodes.values()) if self.nodes else None


class PromotionSettings(CostLimits):
    """Gates that a student must pass to become champion."""

    min_gain: float = Field(
        0.0, ge=-1, le=1, description="gain in top-1 or mIoU on test over the champion (or scratch)"
    )
    min_recall: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="CLASS: share of its test images (or pixels) that must be found"
    )
    min_iou: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="segmentation: CLASS: intersection over union on test that is required"
    )
    test_time: TestTimeSettings | None = Field(
        None, description="segmentation: views that the evaluation on test averages; default: those of data.test_time"
    )
    max_size_mb: float | None = Field(None, gt=0, description="size of the weights, in megabytes")
    export_parity: bool = Field(False, description="require an ONNX export whose outputs equal the student's")
    max_int8_drop: float | None = Field(
        None, ge=-1, le=1, description="loss of top-1 or mIoU on val by quantization to 8 bits (ONNX)"
    )
