"""Import Ray with its environment variables set, which it reads at its import."""

from __future__ import annotations

import logging
import os

# A local Ray listens only on the loopback interface and sends no usage statistics; Tune writes no result files.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ray Train: no metrics, workers are polled four times a second (a training begins and ends some seconds sooner), and
# they stay in the working directory, to which paths are relative.
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# Nothing reads Tune's snapshots of its trials, so one a day.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
# The searcher decides how many trials wait for resources, by which the autoscaler adds nodes; Tune would start one.
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")
# Only the older of Tune's two reporters is silenced by `verbose=0`.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
import ray._private.worker
from ray import tune
from ray._private import services
from ray._private.authentication import authentication_token_setup as token_setup
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heterokd.execution.ray_messages import logging_messages

# Tune would copy the driver's keys into Ray's runtime environments, which Ray logs and shows on its dashboard. Nodes
# have a role or keys in their environment; the processes of a local Ray inherit the driver's environment.
getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set()).difference_update(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)

# The driver's thread that receives messages of Ray's processes would print them past `logging`.
ray._private.worker.print_to_stdstream = logging_messages(ray._private.worker.print_to_stdstream)

# A new local Ray creates a token, and logs a needless warning about it.
logging.getLogger(token_setup.__name__).setLevel(logging.ERROR)

__all__ = ["Trial", "TuneController", "metrics", "only_on", "ray", "services", "token_headers", "tune"]


def only_on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that pins a task or an actor to a node."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def token_headers() -> tuple[tuple[str, str], ...]:
    """Return the headers with Ray's token if RAY_AUTH_MODE asks for one, as `ray.init` does with an explicit address.

    The mode is not changed: a machine has a token file after its first local Ray, and a cluster without tokens could
    not call a process that demands them.
    """
    loader = token_setup.AuthenticationTokenLoader.instance()
    return tuple(loader.get_token_for_http_header().items()) if loader.has_token() else ()
