"""Experiment, a question in YAML; Recipe, an answer: one training with no freedom left.

load_experiment(path, overrides) -> Experiment          methods: all is resolved to a list here
experiment.recipe(sample)        -> Recipe              pure
"""

from heterokd.config.experiment import (
    TEACHER,
    Experiment,
    Recipe,
    ends,
    method_params,
    methods_of,
    pairing,
    reads_teacher,
    score_of,
)
from heterokd.config.reading import load_experiment, load_recipe, read_yaml
from heterokd.config.settings import (
    MOST_TRIALS,
    BudgetSettings,
    CachingSettings,
    ClusterSettings,
    DataSettings,
    NetworkSettings,
    NodeSettings,
    PromotionSettings,
    Sample,
    SearchSettings,
    Settings,
    SpaceSettings,
    StudentSettings,
    TeacherSettings,
    TeachersSettings,
    TeacherTraining,
    TrackingSettings,
    TrainingSettings,
)

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
    "ends",
    "load_experiment",
    "load_recipe",
    "method_params",
    "methods_of",
    "pairing",
    "read_yaml",
    "reads_teacher",
    "score_of",
]
