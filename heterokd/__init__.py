"""heterokd: search for the best way to distil a big vision model into a small one of another architecture.

    from heterokd import load_experiment, search, distill, load_student

    found = search(load_experiment("experiments/quickstart.yaml"), root="runs")
    student = load_student("studies/quickstart", root="runs")

The names come from `heterokd.api`, which is imported when one of them is first asked for.
"""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"
__all__ = ["Experiment", "distill", "load_experiment", "load_student", "search"]

# MLflow's flavour for PyTorch sets the root logger to ERROR when it is imported: what heterokd warns of would be lost.
logging.getLogger(__name__).setLevel(logging.WARNING)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
