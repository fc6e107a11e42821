"""Figures as people read them, and what their modules import."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

from heterokd import formatting
from heterokd.config.quantities import PERIODS, parse_quantity
from heterokd.errors import ConfigError
from heterokd.formatting import SIZES, epoch_score, format_duration, format_hours, format_size, metric_name
from heterokd.tasks import TASKS

HEAVY = ("torch", "timm", "optuna", "mlflow", "pandas", "ray")


def test_the_examples_in_the_docstrings() -> None:
    found = doctest.testmod(formatting)
    assert found.attempted >= 5
    assert not found.failed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (47 * 3600, "47 h 0 min")],
)
def test_durations_where_the_unit_changes(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_sizes_and_hours() -> None:
    assert [format_size(count) for count in (999, 1000, 2.5e12)] == ["999 B", "1.0 KB", "2.5 TB"]
    assert [format_hours(value) for value in (0.126, 9.96, 123.4)] == ["0.13", "10", "123"]


def test_quantities_of_the_command_line() -> None:
    read = [parse_quantity("--budget", text, PERIODS, "2h") / 3600 for text in ("30m", "2 h", "1.5h", "1d", "2W")]
    assert read == [0.5, 2.0, 1.5, 24.0, 336.0]
    assert parse_quantity("--max-size", "1.5gb", SIZES, "10GB") == 1.5e9
    for text in ("2", "h", "2 weeks", "-1h", ""):
        with pytest.raises(ConfigError, match=r"--budget .*expected a number and one of m, h, d, w, such as 2h"):
            parse_quantity("--budget", text, PERIODS, "2h")


def test_every_task_has_a_score_that_an_epoch_is_reported_by() -> None:
    for task in TASKS.values():
        assert epoch_score({"val/loss": 1.0, f"val/{task.score}": 0.5}) == f"{metric_name(task.score)} 0.5000"


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        ("heterokd", HEAVY),
        ("heterokd.formatting, heterokd.report.wording, heterokd.students.promotion.decision", HEAVY),
        ("heterokd.cli.app", HEAVY),
        ("heterokd.execution.study_actor", ("torch", "torchvision", "timm", "mlflow", "pandas", "ray")),
    ],
)
def test_leaves_import_nothing_heavy(modules: str, unneeded: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(unneeded) & set(done.stdout.split())
