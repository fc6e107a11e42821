"""The sections `cache`, `tracking`, `cluster` and `promotion`: what serves a search."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from heterokd.config.costs import CostLimits
from heterokd.config.settings import Names, Settings
from heterokd.errors import without_password


class CachingSettings(Settings):
    """What the teacher says of a view is stored once and read by every training that shows the same view."""

    enabled: bool = Field(True, description="store it; methods that read more than logits and embedding run it live")
    views: int = Field(50, ge=1, description="views of each image, at most; longer trainings show them again")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of a record; fp16 takes half the space and rounds")
    top_k: int | None = Field(None, ge=1, description="keep this many logits of a view and the mass of the rest")
    max_gb: float = Field(50.0, gt=0, description="a larger cache is not built; the teacher then runs live")


class TrackingSettings(Settings):
    """Where it is logged."""

    experiment: str | None = Field(None, description="MLflow experiment; the experiment's name when left out")
    registered_model: str | None = Field(None, description="name in the registry; NAME-student when left out")
    uri: str | None = Field(None, description="MLflow tracking URI; runs/mlflow.db when left out")
    also: Names = Field((), description="trackers beside MLflow: csv, package.module:Name or ./file.py:Name")

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        """An experiment is kept with its study, logged and shown."""
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                f"{without_password(uri)}: a user and a password do not belong into an experiment, which is kept and "
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
    price_per_hour: float = Field(0.0, ge=0, description="of one of them, in cluster.currency")


class ClusterSettings(Settings):
    """What the search runs on, as far as its price goes: Ray itself knows what a cluster has."""

    nodes: dict[str, NodeSettings] = Field(default_factory=dict, description="by type, whatever you call them")
    currency: str = Field("USD", description="of all prices")

    @property
    def price_per_hour(self) -> float | None:
        """Of all nodes together; None where none is named."""
        return sum(node.count * node.price_per_hour for node in self.nodes.values()) if self.nodes else None


class PromotionSettings(CostLimits):
    """What a student must reach to become champion."""

    min_gain: float = Field(0.0, ge=-1, le=1, description="top-1 or mIoU on test above the champion (or scratch)")
    max_size_mb: float | None = Field(None, gt=0, description="size of the weights, in megabytes")
    export_parity: bool = Field(False, description="the student must export to ONNX, and the file agree with it")
