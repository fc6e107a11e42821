"""Links to MLflow's pages, and ready-made views behind them.

MLflow shows no metric and no parameter until its user picks columns, lists trials below their study, and draws parallel
coordinates over whatever parameters come first. Its pages can share a view, though: columns, order, filter and charts,
kept in a tag of the experiment whose key a link gives. That format is MLflow's own and may change: a page that does not
know it opens without it, and where the tag cannot be written the links carry the filter and the order alone.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from heterokd.methods import BASELINE
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import answering, current, pages

logger = logging.getLogger(__name__)

MODE = "workflowType=machine_learning"
"""Opens the pages of trained models; without it a new browser opens those of chat agents."""

TAG = "mlflow.sharedViewState."
"""Where MLflow's own "share" button keeps a view."""

MOST_AXES = 6
"""Of a chart of parallel coordinates: more do not fit its width."""

CARD_HEIGHT = 420
"""Of a chart, in pixels; it is as wide as the page."""

MOST_METHODS = 3
"""Leading methods with a chart of their parameters."""

MOST_STUDIES = 5
"""Whose links are printed together, the newest first."""


def study_links(root: Workspace, uri: str, base: str, name: str | None = None) -> list[tuple[str, str]]:
    """List the pages of studies with their addresses; each study's view is written again.

    Args:
        root: holds the studies' folders.
        uri: of the store, what `open_store` returned.
        base: address of its pages: `http://127.0.0.1:5000`.
        name: of a study; None: the newest studies.

    Raises:
        TrackingError: the store does not answer.
    """
    chosen = "tags.`heterokd.kind` = 'study'" + (f" and tags.`heterokd.study` = '{name}'" if name else "")
    client = MlflowClient(uri)
    links = [("all runs", f"{base}/#/experiments?{MODE}")]
    with answering(uri), current(uri):
        found = pages(lambda token: client.search_experiments(max_results=1000, page_token=token))
        experiments = [experiment.experiment_id for experiment in found]
        studies = list(pages(lambda token: client.search_runs(experiments, chosen, max_results=1000, page_token=token)))
        for study in studies[:MOST_STUDIES]:
            links += [("", ""), (study.data.tags["heterokd.study"], ""), *_links_of(client, base, study, root)]
    if len(studies) > MOST_STUDIES:
        links += [("", ""), (f"and {len(studies) - MOST_STUDIES} more", "heterokd ui STUDY")]
    return links


def _links_of(client: MlflowClient, base: str, study: Run, root: Workspace) -> Iterator[tuple[str, str]]:
    tags, experiment = study.data.tags, f"{base}/#/experiments/{study.info.experiment_id}"
    key = write_view(client, study)
    view = {"viewStateShareKey": key} if key else _order(_trials_of(study), tags["heterokd.metric"])
    trials = f"{experiment}/runs?{MODE}&{urlencode(view, quote_via=quote)}"
    yield "  trials", trials
    yield "  compare", f"{trials}&compareRunsMode=CHART"
    yield "  study", f"{experiment}/runs/{study.info.run_id}?{MODE}"
    for model in _models(client, tags["heterokd.study_id"]):
        yield "  model", f"{base}/#/models/{quote(model, safe='')}?{MODE}"
    folder = root.study(tags["heterokd.study"])
    if folder.database.exists():
        yield "  optuna", f"optuna-dashboard sqlite:///{folder.database}"
    if folder.report.exists():
        yield "  page", str(folder.report)


def _models(client: MlflowClient, study_id: str) -> list[str]:
    try:
        found = pages(lambda token: client.search_model_versions(f"tags.study_id = '{study_id}'", page_token=token))
        return sorted({version.name for version in found})
    except MlflowException:  # a server without a registry still has runs to show
        return []


def _trials_of(study: Run) -> str:
    return f"tags.`heterokd.study_id` = '{study.data.tags['heterokd.study_id']}' and tags.`heterokd.kind` = 'trial'"


def _order(chosen: str, metric: str) -> dict[str, object]:
    """Filter and order of the runs, which a shared view and a plain link have in common."""
    return {
        "searchFilter": chosen,
        "orderByKey": f"metrics.`{metric}`",  # by any key but the date, trials are not listed below their study
        "orderByAsc": metric == "val/loss",
    }


def write_view(client: MlflowClient, study: Run) -> str | None:
    """Write the view of a study's trials into its experiment; the key for a link, or None if the store refuses it.

    Args:
        client: of the store.
        study: its run.
    """
    tags, experiment_id, chosen = study.data.tags, study.info.experiment_id, _trials_of(study)
    key = f"{tags['heterokd.study']}-{tags['heterokd.study_id'][:6]}"
    try:
        trials = list(
            pages(lambda token: client.search_runs([experiment_id], chosen, max_results=1000, page_token=token))
        )
        state = json.dumps(_state(chosen, tags["heterokd.metric"], trials), separators=(",", ":"))
        value = f"deflate;{base64.b64encode(zlib.compress(state.encode())).decode()}"
        client.set_experiment_tag(experiment_id, f"{TAG}{key}", value)
    except MlflowException as error:
        logger.info("MLflow keeps no view of study %s (%s)", tags["heterokd.study"], error)
        return None
    return key


def _state(chosen: str, metric: str, trials: Sequence[Run]) -> dict[str, object]:
    """The state of MLflow's page of runs: filter and order, columns, charts."""
    shared, by_method = varied(trials)
    costs = sorted({key for trial in trials for key in trial.data.metrics if key.startswith("student/")})
    columns = [
        f"metrics.`{metric}`",
        *(f"params.`{key}`" for key in ("method", *shared)),
        "tags.`heterokd.state`",
        *(f"metrics.`{key}`" for key in costs),
        "params.`seed`",
        "attributes.`Models`",
    ]
    axes = {f"all settings, to {metric}": ["method", *shared]}
    for method in _leading(trials, metric)[:MOST_METHODS]:
        if by_method.get(method):
            axes[f"{method}, to {metric}"] = [*by_method[method], *shared]
    charts = [_axes(section, params, metric) for section, params in axes.items()]
    curves = f"{metric} by epoch"
    charts.append({**_chart(curves, "LINE"), "metricKey": metric, "selectedMetricKeys": [metric], "xAxisKey": "step"})
    return {
        **_order(chosen, metric),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",  # MLflow draws the first ten otherwise
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,  # or MLflow sorts its sections by name
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 1, "cardHeight": CARD_HEIGHT}
            for name in (*axes, curves)
        ],
        "compareRunCharts": charts,
    }


def _chart(section: str, kind: str) -> dict[str, object]:
    """A chart alone in a section, whose title serves it: MLflow gives parallel coordinates no other."""
    return {
        "uuid": f"chart of {section}",
        "type": kind,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def _axes(section: str, params: Sequence[str], metric: str) -> dict[str, object]:
    """Parallel coordinates that end at the study's metric."""
    return {
        **_chart(section, "PARALLEL"),
        "selectedParams": list(params)[:MOST_AXES],
        "selectedMetrics": [metric],
        "showAllRuns": True,
    }


def varied(trials: Iterable[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Parameters that differ between trials: those of all methods, and by method those of this method alone.

    Constant ones make no axis, and neither do the seed, the recipe's hash and the method.
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
    """Methods by their best value, without the baseline."""
    sign = -1 if metric == "val/loss" else 1
    best: dict[str, float] = {}
    for trial in trials:
        method, value = trial.data.params.get("method", BASELINE), trial.data.metrics.get(metric)
        if method != BASELINE and value is not None:
            best[method] = max(best.get(method, -math.inf), sign * value)
    return sorted(best, key=lambda method: -best[method])
