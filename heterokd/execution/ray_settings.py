"""Import Ray from here: what Ray reads from the environment at its import is set first."""

from __future__ import annotations

import os

# A local Ray stays on the loopback interface (it listens on every one otherwise), sends no usage
# statistics, and Tune writes none of its own result files.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ray Train, for trainings that several workers share: no metrics, a look at the workers four times a second (a training
# begins and ends some seconds sooner), and workers that stay in the folder that relative paths begin in.
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# Nothing reads Tune's snapshots of all its trials: the study and the trial folders are the truth. One a day.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
# The older of its two reporters is the one that `verbose=0` really silences.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Tune would carry the driver's keys to the trials in Ray's runtime environments, which Ray writes into its logs and
# shows on its dashboard. Each node has a role, or keys in its own environment; a local Ray's processes inherit them.
getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set()).difference_update(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)

__all__ = ["Trial", "TuneController", "only_on", "ray", "tune"]


def only_on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that pins a task or an actor to a node."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
