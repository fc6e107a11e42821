"""A method and a data set in files of a user's own, as text."""

from __future__ import annotations

from pathlib import Path

METHOD = '''
"""Match logits."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from heterokd.domains import Float
from heterokd.method import Method, MethodParams
from heterokd.outputs import Batch, Losses, Outputs


def mykd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of logits [B, K]."""
    return F.mse_loss(student.float(), teacher.detach().float())


class MyKD(Method):
    """Logit matching."""

    class Params(MethodParams):
        """Its settings."""

        weight: Annotated[float, Float(0.1, 10, log=True)] = Field(1.0, gt=0, description="multiplies the loss")

    params: Params

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        """One term."""
        return {"logit": self.params.weight * mykd_loss(student.logits, teacher.logits)}
'''

DATA = '''
"""Zeros and ones of the digits."""

from dataclasses import replace

import numpy as np

from heterokd.datasets.digits import Digits


class MyData(Digits):
    """Two classes of the digits."""

    def load(self, root, image_size, seed):
        """Those that show a zero or a one."""
        splits = super().load(root, image_size, seed)
        parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
        two = {name: part.chosen(np.flatnonzero(part.labels < 2)) for name, part in parts.items()}
        return replace(splits, **two, class_names=("0", "1"), fingerprint=f"two {splits.fingerprint}")
'''


def write(folder: Path) -> None:
    """my_method.py and my_data.py."""
    (folder / "my_method.py").write_text(METHOD)
    (folder / "my_data.py").write_text(DATA)
