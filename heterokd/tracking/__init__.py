"""MLflow as a copy of the study's folders: a run for the study, below it a run for each trial and confirmation.

The folders are the truth (see `heterokd.storage`). Only the driver logs; what is missing in MLflow is filled in at the
next call, nothing is logged twice, and an unreachable tracking server never stops a search.

    uri = open_store(root, None)
    runs = StudyRuns(experiment, folder, uri, root.artifacts)
    runs.sync(trial)                             after every report
    model = log_student(runs, trial, splits)     the trained student as a model without pickle: models:/m-...
    register(runs, trial, model, splits)         a version of the registered model, alias `challenger`
    runs.finish(summary)

`tracker` is the interface of this and other trackers, `csv` an example. `store` opens the store, `runs` and
`trial_runs` copy folders, `labels` names and describes runs, `ui_views` links to MLflow's pages, `ui_server` serves
them on this machine. Import from these modules.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
