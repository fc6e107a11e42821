"""heterokd: search for the best way to distil a large vision model into a small model of another architecture.

    from heterokd import load_experiment, search, load_student

    result = search(load_experiment("experiments/quickstart.yaml"), root="runs")
    student = load_student("studies/quickstart", root="runs")

All names except the errors are imported from `heterokd.api` on first use, so `import heterokd` loads neither torch nor
Ray.
"""

import logging
from typing import TYPE_CHECKING

from heterokd.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    HeterokdError,
    MissingSignal,
    NetworkError,
    PairError,
    PromotionError,
    SearchError,
    StudyError,
    TrackingError,
    TrainingDiverged,
    UserError,
)

if TYPE_CHECKING:
    from heterokd.api import (
        DATASETS,
        METHODS,
        DistillResult,
        Experiment,
        Method,
        Recipe,
        SearchResult,
        distill,
        export,
        load_experiment,
        load_student,
        plan,
        promote,
        search,
    )

__version__ = "0.1.0"
__all__ = [
    "DATASETS",
    "METHODS",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistillResult",
    "Experiment",
    "ExportError",
    "HeterokdError",
    "Method",
    "MissingSignal",
    "NetworkError",
    "PairError",
    "PromotionError",
    "Recipe",
    "SearchError",
    "SearchResult",
    "StudyError",
    "TrackingError",
    "TrainingDiverged",
    "UserError",
    "distill",
    "export",
    "load_experiment",
    "load_student",
    "plan",
    "promote",
    "search",
]

# MLflow's flavour for PyTorch sets the root logger to ERROR when it is imported, which would hide our warnings.
logging.getLogger(__name__).setLevel(logging.WARNING)


def __getattr__(name: str) -> object:
    if name in __all__:
        from heterokd import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
