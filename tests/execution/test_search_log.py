"""The log of a search keeps warnings, failures and their tracebacks; the terminal gets sentences."""

from __future__ import annotations

import errno
import inspect
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from heterokd.errors import SearchError, StudyError
from heterokd.execution import ray_settings
from heterokd.execution.ray_messages import handlers_kept, logging_messages
from heterokd.execution.search_log import faults_explained, logged_to, search_log
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialSnapshot


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "runs" / "studies" / "tiny")


def fail(folder: StudyFolder, error: BaseException) -> None:
    with logged_to(folder), faults_explained(folder):
        raise error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RaySystemError("gone"), "Ray failed (RaySystemError: System error: gone)"),
        (OSError(errno.EIO, "Input/output error"), "the machine failed (OSError: [Errno 5] Input/output error)"),
        (MemoryError("8 GiB"), "the machine failed (MemoryError: 8 GiB)"),
    ],
    ids=["Ray", "disk", "memory"],
)
def test_a_fault_becomes_a_sentence_that_names_the_log_and_how_to_continue(
    folder: StudyFolder, error: Exception, sentence: str
) -> None:
    with pytest.raises(SearchError) as caught:
        fail(folder, error)
    assert str(caught.value) == (
        f"{folder.path}: {sentence}; all results are kept, details are in {folder.log_file}, and --resume continues "
        "the search"
    )
    text = folder.log_file.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert str(error) in text


def test_errors_of_the_user_before_the_study_leave_nothing(folder: StudyFolder) -> None:
    with pytest.raises(StudyError, match="no such network"):
        fail(folder, StudyError("no such network"))
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt())
    assert not folder.path.exists()


def test_errors_of_the_user_pass_and_bugs_name_the_log(folder: StudyFolder) -> None:
    write_text(folder.experiment_file, "name: tiny\n")
    with pytest.raises(StudyError, match="it runs already"):
        fail(folder, StudyError("it runs already"))
    with pytest.raises(KeyError) as caught:
        fail(folder, KeyError("a bug"))
    assert caught.value.__notes__ == [f"This traceback is also in {folder.log_file}"]
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt())
    text = folder.log_file.read_text(encoding="utf-8")
    assert "it runs already" in text
    assert "KeyError: 'a bug'" in text
    assert "interrupted" in text.splitlines()[-1]


def test_searches_append_to_a_log_of_bounded_size(folder: StudyFolder) -> None:
    for number in range(100):
        with logged_to(folder, max_bytes=2000):
            search_log.info("search %d", number)
    older = folder.log_file.with_name("search.log.1")
    kept = older.read_text(encoding="utf-8") + folder.log_file.read_text(encoding="utf-8")
    assert kept.endswith("search 99\n")
    assert len(kept.splitlines()) > 20
    assert sum(file.stat().st_size for file in folder.path.iterdir()) <= 4000
    assert {file.name for file in folder.path.iterdir()} == {"search.log", "search.log.1"}


def test_a_log_that_cannot_be_written_ends_no_search(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    with logged_to(StudyFolder(place / "study")):
        search_log.info("started")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("configured", "shown"),
    [
        ("", "the disk is slow\nafter\n"),
        ("logging.basicConfig()", "WARNING:heterokd.x:the disk is slow\nWARNING:heterokd.x:after\n"),
        ("logging.getLogger('ray').addHandler(logging.StreamHandler())", "the disk is slow\nafter\n"),
    ],
    ids=["no handler", "MLflow's handler", "Ray's handler"],
)
def test_the_terminal_still_shows_warnings_but_no_tracebacks(folder: StudyFolder, configured: str, shown: str) -> None:
    code = (
        f"import logging\n{configured}\n"
        "from pathlib import Path\n"
        "from heterokd.execution.search_log import logged_to, search_log\n"
        "from heterokd.storage.study_dir import StudyFolder\n"
        f"with logged_to(StudyFolder(Path({str(folder.path)!r}))):\n"
        "    logging.getLogger('heterokd.x').warning('the disk is slow')\n"
        "    search_log.info('trial 3 ended')\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: logging.getLogger('ray.tune').exception('a trial failed')\n"
        "logging.getLogger('heterokd.x').warning('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == shown
    text = folder.log_file.read_text(encoding="utf-8")
    for kept in ("the disk is slow", "trial 3 ended", "a trial failed", "ZeroDivisionError"):
        assert kept in text
    assert "after" not in text


def test_nothing_is_left_of_the_handlers(folder: StudyFolder) -> None:
    before = [list(logging.getLogger(name).handlers) for name in ("heterokd", "ray", "heterokd.search_log")]
    with logged_to(folder):
        pass
    assert [list(logging.getLogger(name).handlers) for name in ("heterokd", "ray", "heterokd.search_log")] == before


WORKER_DIED = (
    "A worker died or was killed while executing a task by an unexpected system error. Node ID: 1ac4 Worker IP "
    "address: 127.0.0.1 Worker port: 36879 Worker PID: {pid} Worker exit type: SYSTEM_ERROR"
)


def test_a_process_that_died_is_a_sentence_and_rays_message_is_in_the_file(
    folder: StudyFolder, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.trial(0).save(TrialSnapshot(pid=11))
    (folder.path / "trials" / "0001").mkdir()
    (folder.path / "trials" / "0001" / "trial.json").write_text("{")  # damaged
    printed: list[Mapping[str, Any]] = []
    log = logging_messages(lambda data, _: printed.append(data))
    with logged_to(folder):
        for pid in (11, 12):  # the sentence about a trial is that of `TuneCallback`
            log({"lines": [WORKER_DIED.format(pid=pid)], "pid": "raylet", "is_err": False}, False)
        log({"lines": ["The node with node id: 1ac4 has been marked dead"], "pid": "raylet"}, False)
        log({"lines": ["of a worker"], "pid": 12, "is_err": False}, False)
    assert [each["lines"] for each in printed] == [["of a worker"]]
    assert caplog.messages == [
        "a process of the search (12) died (killed, a crash, or out of memory); it is started again, details are in "
        f"{folder.log_file}"
    ]
    text = folder.log_file.read_text(encoding="utf-8")
    for kept in ("Worker PID: 11", "Worker PID: 12", "marked dead"):
        assert kept in text
    assert "Worker PID" not in "".join(capfd.readouterr())


def test_rays_driver_prints_no_messages_itself() -> None:
    assert inspect.getsource(ray._private.worker.listen_error_messages).count("print_to_stdstream(") == 1
    printing = ray_settings.ray._private.worker.print_to_stdstream
    assert printing.__module__ == logging_messages.__module__


def test_rays_start_keeps_the_handlers_of_the_log(folder: StudyFolder) -> None:
    with logged_to(folder):
        with handlers_kept():
            logging.getLogger("ray").handlers.clear()  # as `ray.init` does
        logging.getLogger("ray.tune").error("a trial failed")
    assert "a trial failed" in folder.log_file.read_text(encoding="utf-8")


def test_debug_prints_the_tracebacks_too(folder: StudyFolder, capfd: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("heterokd")
    for level in (logging.DEBUG, package.level):
        package.setLevel(level)
        with logged_to(folder):
            search_log.info("trial 3 ended", exc_info=RaySystemError("gone"))
        printed = capfd.readouterr().err
        assert ("RaySystemError" in printed) == (level == logging.DEBUG)
