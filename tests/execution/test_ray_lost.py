"""A search whose local Ray is lost continues on a new one; otherwise it ends with a sentence. Ray is not started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_ray import FakeRay

from heterokd.config.reading import load_experiment
from heterokd.errors import SearchError
from heterokd.execution import executor
from heterokd.execution.executor import LOCAL_STARTS, SearchJob, run_study
from heterokd.execution.ray_connection import LocalRayError
from heterokd.execution.ray_watch import RayLost
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.search_space import open_space
from heterokd.study.storage import StudyFacts
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary


class Ended:
    """A tracker that records how studies end."""

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def sync(self, trial: TrialFolder) -> bool:
        return True

    def finish(self, summary: StudySummary | None, status: str = "FINISHED") -> bool:
        self.statuses.append(status)
        return True


@pytest.fixture
def job(tiny_file: Callable[..., Path], tmp_path: Path, fake_ray: FakeRay) -> SearchJob:
    experiment, root = load_experiment(tiny_file()), Workspace(tmp_path / "runs")
    space = open_space(experiment, root.study(experiment.name), StudyFacts())
    return SearchJob(experiment, root, space, seconds_before=60.0)


def run(
    job: SearchJob,
    monkeypatch: pytest.MonkeyPatch,
    losses: int,
    *,
    address: str | None = None,
    failure: str | None = None,
    tracker: Ended | None = None,
    loss: BaseException | None = None,
) -> list[float]:
    """Run a study whose Ray is lost some times; return the time before each start."""
    starts: list[float] = []
    study = Study.open(job.experiment, job.folder, StudyOptions(space=job.space))

    def on_ray(job: SearchJob, *_: object) -> executor._Ended:
        starts.append(job.seconds_before)
        if len(starts) <= losses:
            raise loss or RayLost("GCS")
        return executor._Ended(study.summary(), failure)

    monkeypatch.setattr(executor, "_run_on_ray", on_ray)
    run_study(job, tracker or Ended(), address=address)
    return starts


def test_a_local_ray_is_started_again_and_the_time_before_counts_once(
    job: SearchJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts = run(job, monkeypatch, losses=LOCAL_STARTS - 1)
    assert starts == [60.0, *[0.0] * (LOCAL_STARTS - 1)]
    assert caplog.messages.count(
        "Ray's GCS does not answer any more (it was killed, or has crashed); the search continues on a new local Ray"
    ) == (LOCAL_STARTS - 1)
    assert job.folder.summary_file.exists()


def test_a_local_ray_that_is_lost_again_and_again_ends_the_search(
    job: SearchJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Ended()
    with pytest.raises(SearchError) as caught:
        run(job, monkeypatch, losses=LOCAL_STARTS, tracker=tracker)
    assert tracker.statuses == ["KILLED"]
    assert str(caught.value) == (
        f"{job.folder.path}: Ray's GCS does not answer any more (it was killed, or has crashed); all results are kept, "
        f"details are in {job.folder.log_file}, and --resume continues the search"
    )


def test_a_local_ray_that_does_not_start_is_started_again(
    job: SearchJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loss = LocalRayError("a local Ray did not start (Exception: timed out)")
    assert len(run(job, monkeypatch, losses=1, loss=loss)) == 2
    assert f"{loss}; the search continues on a new local Ray" in caplog.messages
    with pytest.raises(
        SearchError, match=r"did not start \(Exception: timed out\); all results are kept, details are in"
    ):
        run(job, monkeypatch, losses=LOCAL_STARTS, loss=loss)


@pytest.mark.thorough
def test_a_cluster_that_is_lost_ends_the_search_at_once(job: SearchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SearchError, match=r"\(--address 10\.0\.0\.1:6379\), so start the cluster again; all results"):
        run(job, monkeypatch, losses=1, address="10.0.0.1:6379")


@pytest.mark.thorough
def test_interrupted_trials_end_the_search_with_their_reason(job: SearchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = executor._interruptions({2: "OSError: x", 1: "OSError: x", 5: "other"}, job.folder)
    assert failure is not None
    assert "trials 1, 2, 5 were interrupted by a fault of the machine or of Ray (OSError: x); all results" in failure
    assert executor._interruptions({}, job.folder) is None
    tracker = Ended()
    with pytest.raises(SearchError, match="trials 1, 2, 5 were interrupted"):
        run(job, monkeypatch, losses=0, failure=failure, tracker=tracker)
    assert tracker.statuses == ["FAILED"]
