"""Experiment, a question in YAML; Recipe, an answer: one training with no freedom left.

load_experiment(path, overrides) -> Experiment          methods: all is resolved to a list here
experiment.recipe(sample)        -> Recipe              pure
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterokd.config.data import DataSettings
    from heterokd.config.experiment import TEACHER, Experiment, ends
    from heterokd.config.methods import method_params, methods_of, pairing
    from heterokd.config.networks import NetworkSettings, StudentSettings, TeacherSettings, TeachersSettings
    from heterokd.config.reading import (
        at_schema,
        dump_experiment,
        load_experiment,
        load_recipe,
        load_study_experiment,
        read_experiment,
    )
    from heterokd.config.recipe import Recipe
    from heterokd.config.search import MOST_TRIALS, BudgetSettings, SearchSettings, SpaceSettings, score_of
    from heterokd.config.services import (
        CachingSettings,
        ClusterSettings,
        NodeSettings,
        PromotionSettings,
        TrackingSettings,
    )
    from heterokd.config.settings import Sample, Settings
    from heterokd.config.training import TeacherTraining, TrainingSettings
    from heterokd.config.yaml_files import read_yaml

__all__ = [
    "MOST_TRIALS",
    "TEACHER",
    "BudgetSettings",
    "CachingSettings",
    "ClusterSettings",
    "DataSettings",
    "Experiment",
    "NetworkSettings",
    "NodeSettings",
    "PromotionSettings",
    "Recipe",
    "Sample",
    "SearchSettings",
    "Settings",
    "SpaceSettings",
    "StudentSettings",
    "TeacherSettings",
    "TeacherTraining",
    "TeachersSettings",
    "TrackingSettings",
    "TrainingSettings",
    "at_schema",
    "dump_experiment",
    "ends",
    "load_experiment",
    "load_recipe",
    "load_study_experiment",
    "method_params",
    "methods_of",
    "pairing",
    "read_experiment",
    "read_yaml",
    "score_of",
]

_MODULES = {
    "data": ("DataSettings",),
    "experiment": ("Experiment", "TEACHER", "ends"),
    "methods": ("method_params", "methods_of", "pairing"),
    "networks": ("NetworkSettings", "StudentSettings", "TeacherSettings", "TeachersSettings"),
    "reading": (
        "at_schema",
        "dump_experiment",
        "load_experiment",
        "load_recipe",
        "load_study_experiment",
        "read_experiment",
    ),
    "recipe": ("Recipe",),
    "search": ("BudgetSettings", "MOST_TRIALS", "SearchSettings", "SpaceSettings", "score_of"),
    "services": ("CachingSettings", "ClusterSettings", "NodeSettings", "PromotionSettings", "TrackingSettings"),
    "settings": ("Sample", "Settings"),
    "training": ("TeacherTraining", "TrainingSettings"),
    "yaml_files": ("read_yaml",),
}


def __getattr__(name: str) -> Any:
    """Import the module that defines a name when the name is first asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
