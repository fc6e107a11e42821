"""The sections `cache`, `tracking`, `cluster` and `promotion`: services of a search."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from heterokd.config.costs import CostLimits
from heterokd.config.settings import Names, Settings
from heterokd.errors import without_password


class CachingSettings(Settings):
    """The teacher's outputs of a view, stored once for all trainings that show the same view."""

    enabled: bool = Field(
        True, description="store outputs; methods that read more than logits and embedding run the teacher live"
    )
    views: int = Field(50, ge=1, description="maximum number of views of each image; longer trainings repeat them")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of a record; fp16 takes half the space and rounds")
    top_k: int | None = Field(None, ge=1, description="keep this many logits of a view and the mass of the rest")
    max_gb: float = Field(50.0, gt=0, description="a larger cache is not built; the teacher then runs live")


class TrackingSettings(Settings):
    """Where a search is logged."""

    experiment: str | None = Field(None, description="MLflow experiment; default: the experiment's name")
    registered_model: str | None = Field(None, description="name in the registry; default: NAME-student")
    uri: str | None = Field(None, description="MLflow tracking URI; default: runs/mlflow.db")
    also: Names = Field((), description="trackers beside MLflow: csv, package.module:Name or ./file.py:Name")

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        """Refuse credentials: an experiment is stored with its study, logged and shown."""
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                f"{without_password(uri)}: a user and a password do not belong into an experiment, which is stored and "
                "logged; leave them out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, "
                "or MLFLOW_TRACKING_URI for a database"
            )
        return uri

    @field_validator("registered_model")
    @classmethod
    def _fits_the_registry(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or set(name) & {"/", ":"}):
            raise ValueError(f"MLflow takes no '/' and no ':' in the name of a model, and no empty one; got {name!r}")
        return name


class NodeSettings(Settings):
    """Nodes of one type."""

    count: int = Field(1, ge=1, description="how many the search uses")
    price_per_hour: float = Field(0.0, ge=0, description="of a node, in cluster.currency")


class ClusterSettings(Settings):
    """Prices of the nodes that a search runs on; Ray knows the resources."""

    nodes: dict[str, NodeSettings] = Field(default_factory=dict, description="by a name of your choice")
    currency: str = Field("USD", description="of all prices")

    @property
    def price_per_hour(self) -> float | None:
        """Price of all nodes together; None if no node is listed."""
        return sum(node.count * node.price_per_hour for node in self.nodes.values()) if self.nodes else None


class PromotionSettings(CostLimits):
    """What a student must reach to become champion."""

    min_gain: float = Field(0.0, ge=-1, le=1, description="top-1 or mIoU on test above the champion (or scratch)")
    max_size_mb: float | None = Field(None, gt=0, description="size of the weights, in megabytes")
    export_parity: bool = Field(False, description="the student must export to ONNX, with equal outputs")
