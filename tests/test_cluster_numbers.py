"""The table of docs/cluster_numbers.md is what its command prints, and what can be counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster_numbers import Load, short, table

PAGE = Path(__file__).parents[1] / "docs/cluster_numbers.md"


def test_the_page_holds_the_commands_table() -> None:
    assert table([Load(1), Load(16), Load(128)]) in PAGE.read_text(encoding="utf-8")


def test_a_search_of_one_trial_each_100_seconds_by_hand() -> None:
    load = Load(nodes=1, seconds=100, reports=2, megabytes=50)
    assert load.events == pytest.approx(4 / 100)  # start, two reports, end
    assert load.puts == pytest.approx((4 * 3 + 20) / 100)  # three requests each; metrics every five seconds
    assert load.gets == pytest.approx(4 * 2 * 2 / 100)
    assert load.bytes_up == pytest.approx(1.0)
    assert replace(load, nodes=128).events == pytest.approx(128 * load.events)
    assert [short(value) for value in (0.01234, 123.4, 1.0)] == ["0.012", "120", "1"]
