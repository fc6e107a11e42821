"""Work of the driver while trials run: sync to trackers, write the summary, call the listener, check the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heterokd.execution.cache_builders import RunningBuild, release
from heterokd.execution.node_watch import NodeWatch
from heterokd.execution.ray_settings import Trial, ray, tune
from heterokd.execution.ray_watch import RayWatch
from heterokd.execution.search_log import search_log
from heterokd.execution.searcher import StudySearcher
from heterokd.execution.study_sync import Arrived, Event, TrialEvents
from heterokd.execution.trial_deaths import Fate, what_failed
from heterokd.storage.disk import obstacle
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.study.summary import StudySummary
from heterokd.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

Listener = Callable[[Event, TrialFolder, StudySummary], None]
"""Called in the driver when a trial starts, reports or finishes, with the study's summary at that time or later."""

WATCH_SECONDS = 5.0
"""Interval of the checks of the disk and of retries while a tracking server does not answer."""


class MlflowSync:
    """Thread that syncs trial folders to MLflow and other trackers, so that a slow or dead server delays no trial.

    It also logs that the study's disk cannot be written; trials then wait on their nodes.
    """

    def __init__(self, tracker: Tracker, folder: StudyFolder, interval: float = WATCH_SECONDS) -> None:
        self.tracker, self.folder, self.interval = tracker, folder, interval
        self.waiting: dict[int, TrialFolder] = {}
        self.changed = threading.Condition()
        self.is_closing = self.is_stuck = self.is_failing = False
        self.checked = time.monotonic()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def put(self, folder: TrialFolder) -> None:
        """Queue a trial for syncing (coalesced)."""
        with self.changed:
            self.waiting[folder.number] = folder
            self.changed.notify()

    def close(self) -> None:
        """Sync what is queued, if the server answers, and end the thread."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        while not (self.is_closing and not self.waiting):
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.is_closing, self.interval)
                batch, self.waiting = self.waiting, {}
            missed = self._copy(batch)
            self._check_disk()
            if missed and self.is_closing:
                return  # `Tracker.finish` syncs every trial again
            if missed:
                with self.changed:
                    self.waiting = missed | self.waiting
                    self.changed.wait_for(lambda: self.is_closing, self.interval)

    def _copy(self, batch: dict[int, TrialFolder]) -> dict[int, TrialFolder]:
        """Sync trials until the server does not answer; return those that are left, the failed trial last."""
        for number, folder in list(batch.items()):
            del batch[number]
            if not self._synced(folder):
                return {**batch, number: folder}
        return batch

    def _synced(self, folder: TrialFolder) -> bool:
        """Sync a trial; an exception, which would end the thread, is logged once until a sync succeeds."""
        try:
            is_synced = self.tracker.sync(folder)
        except Exception as error:  # noqa: BLE001  no fault of a tracker may end the sync of all trials
            if not self.is_failing:
                logger.warning("tracking failed (%s: %s); it is tried again", type(error).__name__, error)
            search_log.info("tracking of trial %d failed", folder.number, exc_info=error)
            self.is_failing = True
            return False
        self.is_failing = False
        return is_synced

    def _check_disk(self) -> None:
        if time.monotonic() - self.checked < self.interval:
            return
        self.checked = time.monotonic()
        reason = obstacle(self.folder.path)
        if reason is not None and not self.is_stuck:
            logger.warning("%s: cannot be written (%s); trials wait for the disk", self.folder.path, reason)
        elif reason is None and self.is_stuck:
            logger.warning("%s: can be written again; trials continue", self.folder.path)
        self.is_stuck = reason is not None


class Forwarding:
    """Forwards events of trials to the trackers, and with the study's summary to summary.json and the listener.

    Ray Tune's loop waits neither for a store nor for the study: what has not answered yet is collected at a later step.
    Events that arrive meanwhile share the next summary.
    """

    def __init__(
        self,
        folder: StudyFolder,
        events: TrialEvents,
        sync: MlflowSync,
        ask: Callable[[], SummaryAnswer],
        listener: Listener | None = None,
        on_summary: Callable[[StudySummary], object] = lambda summary: None,
    ) -> None:
        """Forward the events of a study.

        Args:
            folder: the study's folder.
            events: events whose files are on this disk.
            sync: thread of the trackers.
            ask: asks the study for its summary.
            listener: called with every event.
            on_summary: called with every summary.
        """
        self._folder, self._events, self._sync = folder, events, sync
        self._ask, self._listener, self._on_summary = ask, listener, on_summary
        self._waiting: list[Arrived] = []
        self._asked: list[Arrived] = []
        self._answer: SummaryAnswer | None = None

    def put(self, event: Event, trial: TrialFolder) -> None:
        """Forward an event once its files are on this disk."""
        self._events.put(event, trial)

    def step(self) -> None:
        """Forward what has arrived, without waiting."""
        if self._answer is not None and self._answer.is_ready():
            self._deliver(self._answer)
        for event, trial in self._events.take():
            self._sync.put(trial)
            self._waiting.append((event, trial))
        if self._answer is None and self._waiting:
            self._asked, self._waiting = self._waiting, []
            self._answer = self._ask()

    def close(self) -> None:
        """Forward everything that was put."""
        self._events.close()
        self.step()
        while self._answer is not None:
            self._deliver(self._answer)
            self.step()

    def _deliver(self, answer: SummaryAnswer) -> None:
        summary, self._answer = answer.get(), None
        asked, self._asked = self._asked, []
        self._on_summary(summary)
        if any(event == "finish" for event, _ in asked):
            summary.write(self._folder)
        if self._listener is not None:
            for event, trial in asked:
                self._listener(event, trial, summary)


class SummaryAnswer(Protocol):
    """The study's answer to a request for its summary."""

    def is_ready(self) -> bool:
        """Whether it is there; without waiting."""

    def get(self) -> StudySummary:
        """Wait for it, and return it."""


@dataclass(frozen=True)
class RaySummary:
    """A summary that the study's actor computes."""

    reference: ray.ObjectRef

    def is_ready(self) -> bool:
        """See `SummaryAnswer`."""
        return bool(ray.wait([self.reference], timeout=0)[0])

    def get(self) -> StudySummary:
        """See `SummaryAnswer`."""
        summary: StudySummary = ray.get(self.reference)
        return summary


class TuneCallback(tune.Callback):  # type: ignore[misc]  # Ray is not fully typed
    """Forwards Tune's events to the trackers and the listener, and releases what is finished."""

    # One parameter for each part of the driver that an event reaches.
    def __init__(
        self,
        folder: StudyFolder,
        searcher: StudySearcher,
        forwarding: Forwarding,
        watch: RayWatch,
        builders: list[RunningBuild],
        nodes: NodeWatch,
        on_failure: Callable[[str], object] = lambda node: None,
    ) -> None:
        self.folder, self.on_failure = folder, on_failure
        self.searcher, self.actor = searcher, searcher.actor
        self.forwarding, self.watch = forwarding, watch
        self.builders = builders
        self.nodes = nodes
        self.failures: dict[str, int] = {}
        self.ended: list[Trial] = []
        self.checked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Trial], **_: object) -> None:
        """On each Tune step, release what has finished; at times, end trials that exceed their limit, check nodes.

        Raises:
            RayLost: a process of Ray died, without which nothing goes on.
        """
        self.watch.raise_if_lost()
        self.forwarding.step()
        self.builders = release(self.builders)
        self.ended = [trial for trial in self.ended if not _free(trial)]
        if time.monotonic() - self.checked > WATCH_SECONDS:
            self.checked = time.monotonic()
            self._expire(trials)
            self.nodes.look()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, int], **_: object
    ) -> None:
        """Handle a trial that started, reached a rung, or finished."""
        number = int(result["number"])
        event: Event = "finish" if result.get("finished") else "report" if result["epoch"] else "start"
        self.forwarding.put(event, self.folder.trial(number))
        if result.get("moved") or result.get("failed"):
            self.on_failure(_address(result))
        if result.get("moved"):
            self.searcher.forget(number)
            self.nodes.look()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        """Count a process that died and is restarted; Tune does not count announced preemptions."""
        number, error = int(trial.config["number"]), _last_error(trial)
        _record(number, "is restarted", error)
        if trial.num_failures > self.failures.get(trial.trial_id, 0):
            if not self.searcher.failures.is_excused(number):
                self.searcher.deaths.restarted(number)
                logger.warning("trial %d: %s; %s", number, what_failed(error), Fate.RESUMED.sentence)
            self.failures[trial.trial_id] = trial.num_failures
            self.searcher.failures.add(number)
            self.on_failure(_address(trial.run_metadata.last_result))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        """Decide what becomes of a trial whose process died more often than Tune restarts it."""
        number, error = int(trial.config["number"]), _last_error(trial)
        if self.searcher.failures.is_reached:
            return  # No trial can run here, so none is at fault: they are kept for the next start of the search.
        self.on_failure(_address(trial.run_metadata.last_result))
        ending = self.searcher.deaths.judge(number, error)
        _record(number, f"is {ending.kind}", error)
        if not self.searcher.failures.is_excused(number):
            logger.warning("trial %d: %s; %s", number, ending.reason, ending.kind.sentence)
        if ending.kind == Fate.FAILED:
            ray.get(self.actor.died.remote(number, ending.reason))
        else:
            ray.get(self.actor.interrupt.remote(number, ending.reason, ending.kind == Fate.RESUMED))

    def _expire(self, trials: list[Trial]) -> None:
        """End the processes of trials that exceed their limit; Tune's next process of such a trial ends at once."""
        expired = set(ray.get(self.actor.expire.remote(self.searcher.running)))
        for trial in trials if expired else ():
            number, process = trial.config.get("number"), trial.temporary_state.ray_actor
            if number in expired:
                self.searcher.failures.excuse(number)
                if process is not None:
                    ray.kill(process)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        """Remember a finished trial, to free the memory of the object that Tune keeps to the end of the search."""
        self.ended.append(trial)

    def __getstate__(self) -> dict[str, object]:
        # Tune pickles callbacks into its snapshots, which nothing here reads back.
        return {}


def _address(result: Mapping[str, object]) -> str:
    """Return the address of the node that Tune adds to a trial's results; "unknown" before the first."""
    return str(result.get("node_ip", "unknown"))


def _last_error(trial: Trial) -> Exception | None:
    """Return Ray's exception for the last death of a trial's process, as Tune keeps it; None if it cannot be read."""
    try:
        error: Exception = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # noqa: BLE001  an exception's class may raise anything while it is read
        return None
    return error


def _record(number: int, outcome: str, error: BaseException | None) -> None:
    search_log.info("trial %d %s: its process ended", number, outcome, exc_info=error)


def _free(trial: Trial) -> bool:
    """Drop what an ended trial's object holds; False while Tune still needs it."""
    if not trial.is_finished():
        return False
    trial.config, trial.evaluated_params = {}, {}
    kept = trial.run_metadata.checkpoint_manager
    trial.run_metadata = type(trial.run_metadata)()
    trial.run_metadata.checkpoint_manager = kept  # Tune's result reads it; it is empty
    return True
