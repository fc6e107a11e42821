"""What commands show: nothing wraps and everything fits a small screen; an interrupted search says how to go on."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import fabricated
import pyte
import pytest
from rich.console import Console, RenderableType

from heterokd.cli.terminal.console import Terminal
from heterokd.cli.terminal.live_search import SearchTerminal
from heterokd.cli.terminal.search_summary import print_summary
from heterokd.cli.terminal.tables import leader_table
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.progress import StudyProgress
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.search_result import SearchResult
from heterokd.study.summary import HarmfulTrial, StudySummary

COLUMNS, LINES = 80, 24
PATIENCE = 900.0
"""Seconds for a search of a minute; machines are busy."""
LONG = "efficientformerv2_s0.snap_dist_in1k"


def leader(number: int, method: str = "hcd", **more: Any) -> RankedConfig:
    """What a summary says of a configuration."""
    content: dict[str, Any] = {
        "sample": {"method": method, f"{method}.sub_kl_weight": 1.39612345, "training.learning_rate": 0.05},
        "mean": 0.9696,
        "low": 0.9565,
        "high": 0.9827,
        "expected": 0.9683,
        "seeds": (1000, 2000, 3000),
        "student": LONG,
        "search_value": 0.97,
    }
    return fabricated.ranked(number, method, **content | more)


PROGRESS = StudyProgress(48, 2, 21, 9, 1, 0, 1, 2, 5, 12)


def summary(**more: Any) -> StudySummary:
    content: dict[str, Any] = {
        "name": "quickstart",
        "progress": PROGRESS,
        "budget": {"trials": 60, "trainings": None, "hours": 2.0, "gpu_hours": None, "money": 12.5, "price": 2.0},
        "spent": {"trials": 37, "trainings": 22.5, "hours": 0.75, "gpu_hours": 1.4, "money": 2.8},
        "scratch": leader(0, "scratch", mean=0.9282, low=0.9121, high=0.9442),
    }
    return fabricated.summary(*(leader(number) for number in range(21, 41)), **content | more)


@pytest.fixture
def running(tmp_path: Path) -> Callable[[int], TrialFolder]:
    root = Workspace(tmp_path)
    question = fabricated.experiment(training={"epochs": 60})
    folder = fabricated.study(root, question)
    return lambda number: fabricated.trial(folder, question, number, status="running", epochs=number % 9)


def drawn(what: RenderableType) -> list[str]:
    """Lines of a screen of 80 columns that never breaks one."""
    console = Console(file=StringIO(), width=COLUMNS, height=LINES, force_terminal=True, color_system=None)
    console.print(what)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def watching(trials: Callable[[int], TrialFolder], count: int, told: StudySummary) -> SearchTerminal:
    """A terminal that has heard of `count` trials in a minute, and of one that ended."""
    now = [0.0]
    question = fabricated.experiment(training={"epochs": 60})
    terminal = SearchTerminal(question, seconds=lambda: now[0])
    terminal.console = Console(file=StringIO(), width=COLUMNS, height=LINES)
    before = replace(told, progress=replace(told.progress, complete=told.progress.complete - 1))
    for number in range(count):
        terminal("start", trials(number), before)
    now[0] = 60.0
    ended = trials(count)
    fabricated.change(ended, status="complete", metrics={"val/top1": 0.91, "epoch": 60})
    terminal("start", ended, before)
    terminal("finish", ended, told)
    now[0] = 90.0
    return terminal


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_the_live_view_fits_a_small_screen(running: Callable[[int], TrialFolder], count: int) -> None:
    lines = drawn(watching(running, count, summary()))
    assert len(lines) < LINES, "the cursor has a line too"
    assert all(len(line) <= COLUMNS for line in lines)
    text = "\n".join(lines)
    assert f"37 of 60: 21 complete, 9 pruned, 2 failed, 1 paused, 5 confirmed; {count} running" in text
    # One ended in a minute and 23 are to come.
    assert "1 min 30 s so far, about 22 min 30 s left" in text
    assert "spent    37 of 60 trials, 0.758 of 2 h, 2.8 of 12.5 money" in text
    assert "best     0021 hcd val/top1 0.9696 (0.9565 to 0.9827, 3 fresh seeds)" in text
    assert "running  0000 kd         epoch   0 of 60, rung at 6" in text
    assert "…" not in text.replace("sub_kl_weight", "").split("trial  method")[0], "numbers are never cut"
    assert sum(" kd " in line for line in lines) == (count if count < 9 else 11)
    assert ("more" in lines[-1]) == (count == 40)


def test_time_left_follows_the_clock_and_a_budget(running: Callable[[int], TrialFolder]) -> None:
    free = {"trials": None, "trainings": None, "hours": None, "gpu_hours": None, "money": None, "price": None}
    text = "\n".join(drawn(watching(running, 2, summary(budget=free))))
    assert "about 22 min 30 s left" in text
    assert "spent" not in text
    short = summary(budget={**free, "hours": 0.8})
    text = "\n".join(drawn(watching(running, 2, short)))
    assert "about 2 min 30 s left" in text, "the budget ends before the trials"
    assert "spent    0.758 of 0.8 h" in text


def test_before_the_first_result(running: Callable[[int], TrialFolder]) -> None:
    none = replace(PROGRESS, complete=0, pruned=0, failed=0, confirmations_done=0)
    told = summary(winner=None, scratch=None, leaders=(), budget={"trials": 60}, progress=none)
    terminal = SearchTerminal(fabricated.experiment(training={"epochs": 60}))
    terminal("start", running(3), told)
    text = "\n".join(drawn(terminal.view(LINES)))
    assert "best     no trial is complete yet" in text
    assert "left" not in text, "nothing is known of the pace"
    assert "running  0003 kd         epoch   3 of 60, rung at 6" in text


def test_a_folder_that_is_away_for_a_moment_ends_no_view(running: Callable[[int], TrialFolder]) -> None:
    terminal = watching(running, 2, summary())
    trial = terminal.running[1]
    (trial.path / "recipe.yaml").rename(trial.path / "elsewhere.yaml")
    assert "         0001" in drawn(terminal)
    (trial.path / "elsewhere.yaml").rename(trial.path / "recipe.yaml")
    (trial.path / "trial.json").write_text("{")
    assert "         0001" in drawn(terminal)


def test_what_is_known_of_a_leader() -> None:
    unsure = leader(1, low=None, high=None, seeds=(1000,))
    single = leader(2, confirmed=False, seeds=(0,))
    unknown = replace(single, number=4, low=None, high=None)
    lines = drawn(leader_table(summary(leaders=(leader(3), unsure, single, unknown), scratch=None)))
    assert "0.9565 to 0.9827, 3 fresh seeds" in lines[1]
    assert re.search(r"0\.9696 +1 fresh seed ", lines[2]), "no comma without an interval"
    assert "0.9565 to 0.9827, one seed" in lines[3], "noise is known before anything is repeated"
    assert re.search(r"0\.9696 +one seed ", lines[4])


def test_an_miou_says_how_many_classes_it_is_of() -> None:
    best, other = (replace(leader(number), iou_classes=counts) for number, counts in ((1, (11,)), (2, (9, 10))))
    found = summary(leaders=(best, other), scratch=None, metric="val/miou")
    head, *rows = drawn(leader_table(found))
    assert "mIoU (classes)" in head
    assert ["0.9696 (11)" in rows[0], "0.9696 (9 to 10)" in rows[1]] == [True, True]
    assert "classes" not in drawn(leader_table(summary(leaders=(leader(3),), scratch=None)))[0]


@pytest.mark.parametrize("front", [0, 7])
def test_the_summary_fits_a_small_screen(front: int) -> None:
    terminal = Terminal()
    file = StringIO()
    terminal.console = Console(file=file, width=COLUMNS, height=LINES, force_terminal=True, color_system=None)
    told = summary(
        front=tuple(leader(number, student=f"resnet{number}") for number in range(front)),
        students={f"resnet{number}": {"params_m": 1.5, "latency_ms": 3.25} for number in range(front)},
        cost_conditions={"latency_ms": "from a table of yours (search.costs)"} if front else {},
        left_out={name: f"{name} has 30.1 M parameters, more than search.max_params_m allows" for name in ("a", "b")},
        negative_transfer=(HarmfulTrial(3, "fitnet", 20),),
    )
    card = fabricated.card(val_score=0.9917)
    folder, store = StudyFolder(Path("runs/studies/quickstart")), "sqlite:////srv/experiments/vision/runs/mlflow.db"
    found = SearchResult(folder, told, card, store, ("digits-student", "1"))
    registered = "digits-student version 1, alias challenger   (next: heterokd promote quickstart)"
    print_summary(terminal, found, ("params_m", "latency_ms"), registered)
    lines = [line for text in file.getvalue().splitlines() for line in (text[:COLUMNS], text[COLUMNS:]) if line]
    assert len(lines) < LINES
    assert "The gain is significant: +0.0414 over scratch" in file.getvalue()
    assert "more remarks are in the report" in file.getvalue()
    assert ("cost     latency from a table of yours (search.costs)" in lines) == bool(front)
    assert ("and 4 more in the report" in file.getvalue()) == bool(front)


def test_a_pipe_gets_whole_lines(running: Callable[[int], TrialFolder], capsys: pytest.CaptureFixture[str]) -> None:
    terminal = SearchTerminal(fabricated.experiment())
    failed = running(7)
    fabricated.change(failed, status="failed")
    (failed.path / "error.txt").write_text("Traceback ...\nRuntimeError: " + "x" * 200)
    terminal("start", failed, summary())
    terminal("finish", failed, summary())
    assert not terminal.live.is_started
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("[ 37/60] 0007 kd       failed   RuntimeError: xxx")
    assert line.endswith("x" * 200)


def test_a_line_says_whom_a_trial_followed_and_what_it_repeats(
    running: Callable[[int], TrialFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = SearchTerminal(fabricated.experiment())
    ended = running(7)
    sample = {"method": "kd", "teacher.network": "resnet50"}
    fabricated.change(ended, status="complete", metrics={"val/top1": 0.91, "epoch": 60}, confirms=3, sample=sample)
    terminal("start", ended, summary())
    terminal("finish", ended, summary())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"after resnet50, seed {ended.recipe.training.seed} of trial 3")


def test_a_trial_that_was_ended_before_its_process_began_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = SearchTerminal(fabricated.experiment())
    terminal("finish", TrialFolder(tmp_path / "trials" / "0009"), summary())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("0009 ended before its process began")


def test_a_line_says_what_a_rung_compared(
    running: Callable[[int], TrialFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = SearchTerminal(fabricated.experiment())
    ended = running(8)
    curve = [report["val/top1"] for report in ended.metrics()]
    metrics = {"val/top1": curve[-1], "epoch": len(curve)}
    fabricated.change(ended, status="pruned", reason="behind", metrics=metrics)
    terminal("start", ended, summary())
    terminal("finish", ended, summary())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"val/top1 {curve[-1]:.4f} at epoch {len(curve)}, {statistics.fmean(curve):.4f} on average")


class Screen:
    """A terminal of 80 columns and 24 lines with a process in it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, LINES, history=5000)
        self.stream = pyte.ByteStream(self.screen)
        self.near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[3])}
        for name in ("COLUMNS", "LINES", "HETEROKD_ROOT"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, cwd=folder, env=environment, preexec_fn=_own_terminal
        )
        os.close(far)
        self.seen: list[list[str]] = []

    def read(self, seconds: float) -> bool:
        """Draw what comes; whether there is more to come."""
        ready, _, _ = select.select([self.near], [], [], seconds)
        if not ready:
            return self.process.poll() is None
        try:
            content = os.read(self.near, 65536)
        except OSError:  # its last process is gone
            return False
        if content:
            self.stream.feed(content)
            self.seen.append(list(self.screen.display))
        return bool(content)

    def until(self, found: Callable[[str], object], seconds: float = PATIENCE) -> str:
        ends = time.monotonic() + seconds
        while not found(self.text):
            assert time.monotonic() < ends, self.text
            assert self.read(1.0) or found(self.text), self.text
        return self.text

    def ended(self, seconds: float = PATIENCE) -> int:
        ends = time.monotonic() + seconds
        while self.read(1.0):
            assert time.monotonic() < ends, self.text
        return self.process.wait(30)

    @property
    def text(self) -> str:
        above = ["".join(line[column].data for column in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self.screen.display))

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.near)


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def screen(command: list[str], folder: Path) -> Iterator[Screen]:
    made = Screen(command, folder)
    try:
        yield made
    finally:
        made.close()


HETEROKD = [sys.executable, "-m", "heterokd"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_on_a_terminal_is_interrupted_and_goes_on(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    file = tiny_file(name="tiny", search={"trials": 6, "parallel": 1, "space": {"methods": ["scratch", "kd"]}})
    given = ["search", file.name, "--set", "training.epochs=6", "--root", "my runs"]
    with screen([*HETEROKD, *given], file.parent) as first:
        # The live view is up and one trial is done.
        first.until(lambda text: "complete val/top1" in text and "running  0001" in text)
        live = next(shown for shown in reversed(first.seen) if any("running  0001" in line for line in shown))
        for start in ("best     0000 scratch val/top1 0.", "trial  method", "running  0001 kd"):
            assert any(line.startswith(start) for line in live), live
        assert any(re.match(r"\d+ of \d+: 1 complete, 0 pruned, 0 failed", line) for line in live), live
        os.write(first.near, b"\x03")
        assert first.ended() == 130
        text = first.text
    assert "interrupted: all results are kept in my runs/studies/tiny" in text
    assert "Traceback" not in text
    said = re.search(r"continue with: (.+?--resume)", text.replace("\n", ""))
    assert said, text
    again = shlex.split(said[1])
    assert again == ["heterokd", *given, "--resume"]
    kept = {trial.number: trial.status for trial in Workspace(file.parent / "my runs").study("tiny").trials()}
    assert kept[0] == "complete"

    with screen([*HETEROKD, *given], file.parent) as second:
        assert second.ended() == 2
        assert "the study 'tiny' exists already" in second.text.replace("\n", "")
        assert "--resume" in second.text.replace("\n", "")

    with screen([*HETEROKD, *again[1:]], file.parent) as third:
        assert third.ended() == 0
        lines = third.text.rstrip().splitlines()
        assert "registry" in lines[-1] or "registry" in lines[-2], lines[-4:]
        assert "0000 scratch" not in "".join(line for line in lines if line.startswith("[")), "nothing twice"
    states = [trial.status for trial in Workspace(file.parent / "my runs").study("tiny").trials()]
    assert len(states) >= 6
    assert set(states) <= {"complete", "pruned"}


class ScreenFile(StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def fitted(terminal: Terminal, clock: list[float], epochs: int, pause: float) -> None:
    for epoch in range(1, epochs + 1):
        terminal.teacher_epoch({"epoch": epoch, "val/top1": epoch / 100}, "vit_tiny")
        clock[0] += pause


def test_a_fit_in_a_pipe_is_a_line_every_few_seconds() -> None:
    clock, file = [0.0], StringIO()
    fitted(Terminal(fit_epochs=60, seconds=lambda: clock[0], file=file), clock, 60, pause=0.1)
    lines = file.getvalue().splitlines()
    assert lines[0] == "fitting the teacher vit_tiny: epoch 1, top-1 0.0100 on val"
    assert lines[-1] == "fitting the teacher vit_tiny: epoch 60, top-1 0.6000 on val"
    assert len(lines) == 3, "three seconds apart at least, the last in any case"
    assert "\r" not in file.getvalue()


def test_a_slow_fit_in_a_pipe_is_a_line_every_half_minute() -> None:
    clock, file = [0.0], StringIO()
    fitted(Terminal(fit_epochs=60, seconds=lambda: clock[0], file=file), clock, 9, pause=16.0)
    shown = [line.partition("epoch ")[2].partition(",")[0] for line in file.getvalue().splitlines()]
    assert shown == ["1", "3", "5", "7", "9"]


def test_a_fit_on_a_screen_is_a_bar_with_the_time_left() -> None:
    clock, file = [0.0], ScreenFile()
    terminal = Terminal(fit_epochs=60, seconds=lambda: clock[0], file=file)
    terminal.console.width = 100
    fitted(terminal, clock, 30, pause=2.0)
    terminal.print_line("next")
    shown = pyte.Screen(100, 10)
    pyte.Stream(shown).feed(file.getvalue().replace("\n", "\r\n"))
    assert [line.rstrip() for line in shown.display if line.strip()] == [
        "fitting the teacher vit_tiny: epoch 1, top-1 0.0100 on val",
        "next",
    ], "the bar is gone"
    states = [part for part in file.getvalue().split("\r\x1b[2K") if part.strip()]
    assert (
        states[-2]
        == ("fitting the teacher vit_tiny ████████████░░░░░░░░░░░░ 30/60, at most 1 min 0 s left, top-1 0.3000 on val")[
            :99
        ]
    )
    assert all(len(state) < 100 for state in states[1:-1]), "a bar never wraps"


def test_a_fit_of_unknown_length_shows_its_epoch() -> None:
    clock, file = [0.0], ScreenFile()
    fitted(Terminal(seconds=lambda: clock[0], file=file), clock, 2, pause=2.0)
    assert "fitting the teacher vit_tiny epoch 2, top-1 0.0200" in file.getvalue()
