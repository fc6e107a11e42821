"""Links to MLflow's pages, and the views that they open: columns, filter, order and charts of a study's trials.

Without a view, MLflow's page of runs shows no metric and no parameter until the user picks columns. A view is stored in
a tag of the MLflow experiment, in a format that MLflow may change: a page that does not know the format opens without
the view, and if the tag cannot be written, links carry only the filter and the order.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from heterokd.methods import BASELINE
from heterokd.storage.sqlite_url import sqlite_url
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import answering, current, pages
from heterokd.tracking.trial_runs import CONFIRMED, FINAL, ORDER, RANK, SETTING

logger = logging.getLogger(__name__)

MODE = "workflowType=machine_learning"
"""Opens the pages for trained models; otherwise a new browser opens those for chat agents."""

TAG = "mlflow.sharedViewState."
"""Prefix of the tags in which MLflow's "share" button stores views."""

MOST_AXES = 6
"""Maximum number of parameters in a chart of parallel coordinates: more do not fit its width."""

CARD_HEIGHT = 420
"""Height of a chart in pixels; it is as wide as the page."""

MOST_METHODS = 3
"""Number of leading methods with a chart of their parameters."""

MOST_STUDIES = 5
"""Maximum number of studies whose links are printed together, the newest first."""


def study_links(root: Workspace, uri: str, base: str, name: str | None = None) -> list[tuple[str, str]]:
    """List the pages of studies as (label, address), updating each study's view.

    Args:
        root: workspace with the studies' folders.
        uri: URI that `open_store` returned.
        base: address of MLflow's pages, such as `http://127.0.0.1:5000`.
        name: name of a study; None: the newest studies.

    Raises:
        TrackingError: the store does not answer.
    """
    chosen = "tags.`heterokd.kind` = 'study'" + (f" and tags.`heterokd.study` = '{name}'" if name else "")
    client = MlflowClient(uri)
    links = [("all runs", f"{base}/#/experiments?{MODE}")]
    with answering(uri), current(uri):
        found = pages(lambda token: client.search_experiments(max_results=1000, page_token=token))
        studies = _runs(client, [experiment.experiment_id for experiment in found], chosen)
        for study in studies[:MOST_STUDIES]:
            links += [("", ""), (study.data.tags["heterokd.study"], ""), *_links_of(client, base, study, root)]
    if len(studies) > MOST_STUDIES:
        links += [("", ""), (f"and {len(studies) - MOST_STUDIES} more", "heterokd ui STUDY")]
    return links


def _links_of(client: MlflowClient, base: str, study: Run, root: Workspace) -> Iterator[tuple[str, str]]:
    tags, experiment = study.data.tags, f"{base}/#/experiments/{study.info.experiment_id}"
    key = write_view(client, study)
    view = {"viewStateShareKey": key} if key else _filter(study)
    trials = f"{experiment}/runs?{MODE}&{urlencode(view, quote_via=quote)}"
    yield "  trials", trials
    yield "  compare", f"{trials}&compareRunsMode=CHART"
    yield "  study", f"{experiment}/runs/{study.info.run_id}?{MODE}"
    for model in _models(client, tags["heterokd.study_id"]):
        yield "  model", f"{base}/#/models/{quote(model, safe='')}?{MODE}"
    folder = root.study(tags["heterokd.study"])
    if folder.database.exists():
        yield "  optuna", f"optuna-dashboard {shlex.quote(sqlite_url(folder.database))}"
    if folder.report.exists():
        yield "  page", str(folder.report)


def _models(client: MlflowClient, study_id: str) -> list[str]:
    try:
        found = pages(lambda token: client.search_model_versions(f"tags.study_id = '{study_id}'", page_token=token))
        return sorted({version.name for version in found})
    except MlflowException:  # the server has no model registry
        return []


def _runs(client: MlflowClient, experiments: list[str], chosen: str) -> list[Run]:
    return list(pages(lambda token: client.search_runs(experiments, chosen, max_results=1000, page_token=token)))


def _filter(study: Run) -> dict[str, object]:
    """Return filter and order of a study's trials, for a view or a plain link.

    Finished studies are in the order of the leaders' tables; during a search complete trials come first, by their
    value. Studies of older versions have neither metric and are sorted by that of the epochs.
    """
    tags, metric = study.data.tags, study.data.tags["heterokd.metric"]
    key = {"rank": RANK, "final": f"{FINAL}{metric}"}.get(tags.get(ORDER, ""), metric)
    return {
        "searchFilter": f"tags.`heterokd.study_id` = '{tags['heterokd.study_id']}' and tags.`heterokd.kind` = 'trial'",
        # Ordered by date, MLflow would list trials below their study.
        "orderByKey": f"metrics.`{key}`",
        "orderByAsc": key == RANK or metric == "val/loss",
    }


def write_view(client: MlflowClient, study: Run) -> str | None:
    """Write the view of a study's trials to its MLflow experiment; return its key for links, None if it is refused."""
    tags, experiment_id = study.data.tags, study.info.experiment_id
    key = f"{tags['heterokd.study']}-{tags['heterokd.study_id'][:6]}"
    try:
        chosen = _filter(study)
        trials = _runs(client, [experiment_id], str(chosen["searchFilter"]))
        state = json.dumps({**chosen, **_state(tags["heterokd.metric"], trials)}, separators=(",", ":"))
        value = f"deflate;{base64.b64encode(zlib.compress(state.encode())).decode()}"
        client.set_experiment_tag(experiment_id, f"{TAG}{key}", value)
    except MlflowException as error:
        logger.info("MLflow keeps no view of study %s (%s)", tags["heterokd.study"], error)
        return None
    return key


def _state(metric: str, trials: Sequence[Run]) -> dict[str, object]:
    """Return columns and charts of MLflow's page of runs."""
    shared, by_method = varied(trials)
    known = {key for trial in trials for key in trial.data.metrics}

    def setting(key: str) -> str:
        # As a metric if it is a number, since MLflow sorts parameters as text.
        name = f"{SETTING}{key}"
        return f"metrics.`{name}`" if name in known else f"params.`{key}`"

    columns = [
        *(f"metrics.`{key}`" for key in (RANK, f"{CONFIRMED}/{metric}", f"{FINAL}{metric}") if key in known),
        f"metrics.`{metric}`",
        "params.`method`",
        "tags.`heterokd.state`",
        *map(setting, shared),
        *(f"metrics.`{key}`" for key in sorted(known) if key.startswith("student/")),
        "params.`seed`",
        "attributes.`Models`",
        *(setting(key) for method in _leading(trials, metric)[:MOST_METHODS] for key in by_method.get(method, ())),
    ]
    axes = {f"all settings, to {metric}": ["method", *shared]}
    for method in _leading(trials, metric)[:MOST_METHODS]:
        if by_method.get(method):
            axes[f"{method}, to {metric}"] = [*by_method[method], *shared]
    curves = f"{metric} by epoch"
    parallel = {"selectedMetrics": [metric], "showAllRuns": True}
    charts = [
        {**_chart(section, "PARALLEL"), **parallel, "selectedParams": params[:MOST_AXES]}
        for section, params in axes.items()
    ]
    charts.append({**_chart(curves, "LINE"), "metricKey": metric, "selectedMetricKeys": [metric], "xAxisKey": "step"})
    return {
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        **{key: {} for key in ("runsExpanded", "runsVisibilityMap", "groupsExpanded")},
        **{key: [] for key in ("runsPinned", "runsHidden")},
        "runsHiddenMode": "SHOW_ALL",  # MLflow draws only the first ten otherwise
        **dict.fromkeys(("viewMaximized", "runListHidden"), False),
        "isAccordionReordered": True,  # or MLflow sorts its sections by name
        "groupBy": None,
        **dict.fromkeys(("autoRefreshEnabled", "useGroupedValuesInCharts", "hideEmptyCharts"), True),
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 1, "cardHeight": CARD_HEIGHT}
            for name in (*axes, curves)
        ],
        "compareRunCharts": charts,
    }


def _chart(section: str, kind: str) -> dict[str, object]:
    """Return the only chart of a section, whose name is its title: parallel coordinates have no title in MLflow."""
    return {
        "uuid": f"chart of {section}",
        "type": kind,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def varied(trials: Iterable[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the parameters that differ between trials: those of all methods, and those of single methods by method.

    Method, teacher, seed and recipe are left out.
    """
    values: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in trial.data.params.items():
            values.setdefault(key, set()).add(value)
    shared: list[str] = []
    by_method: dict[str, list[str]] = {}
    for key in sorted(key for key, found in values.items() if len(found) > 1):
        method = key.split(".", 1)[0]
        if method in values.get("method", ()):
            by_method.setdefault(method, []).append(key)
        elif key not in ("method", "seed", "recipe", "teacher"):
            shared.append(key)
    return shared, by_method


def _leading(trials: Iterable[Run], metric: str) -> list[str]:
    """Return the methods by their best value, without the baseline."""
    sign = -1 if metric == "val/loss" else 1
    best: dict[str, float] = {}
    for trial in trials:
        method, value = trial.data.params.get("method", BASELINE), trial.data.metrics.get(metric)
        if method != BASELINE and value is not None:
            best[method] = max(best.get(method, -math.inf), sign * value)
    return sorted(best, key=lambda method: -best[method])
