"""MLflow's PyTorch flavor, whose import would change what heterokd's warnings look like on the terminal.

It calls `logging.basicConfig`: the root logger then prints every warning with its level and the name of its logger in
front. A program that imports heterokd decides itself about its root logger.
"""

from __future__ import annotations

import logging

_root = logging.getLogger()
_before = _root.level, list(_root.handlers)

import mlflow.pytorch as mlflow_pytorch  # noqa: E402

_root.setLevel(_before[0])
for _handler in [handler for handler in _root.handlers if handler not in _before[1]]:
    _root.removeHandler(_handler)

__all__ = ["mlflow_pytorch"]
