"""Five tasks of a new user, each with the commands of README's table or with clicks on the study's page.

The study is that of tests/golden: the names of README's study and files are replaced by its names.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import browser, needs_chromium
from command_line import Done, Run
from golden_files import GOLDEN, unpack
from playwright.sync_api import Page, expect
from safetensors.torch import load_file

README = Path(__file__).parents[1] / "README.md"
MOST_STEPS = 3
NAMES = {"experiments/quickstart.yaml": "finished.yaml", "birds.yaml": "finished.yaml", "quickstart": "finished"}
"""Names of README and of the golden study."""


def commands(task: str) -> list[list[str]]:
    """The commands of a row of README's table, as words."""
    section = README.read_text(encoding="utf-8").partition("\n## After the search")[2].partition("\n## ")[0]
    (row,) = re.findall(rf"^\| {task}\b.*? \| (.+) \|$", section, re.MULTILINE)
    found = [text for text in re.findall(r"`([^`]+)`", row) if text.startswith(("heterokd ", "python "))]
    assert 1 <= len(found) <= MOST_STEPS
    for old, new in NAMES.items():
        found = [re.sub(rf"(?<!\S){re.escape(old)}(?!\S)", new, text) for text in found]
    return [shlex.split(text) for text in found]


@pytest.fixture
def walk(cli: Run, tmp_path: Path) -> Run:
    """Runs README's commands in a folder with the finished study and its experiment."""
    unpack("finished", tmp_path)
    text = (GOLDEN / "finished.yaml").read_text(encoding="utf-8")
    (tmp_path / "finished.yaml").write_text(text, encoding="utf-8")

    def run(words: list[str], *more: str) -> Done:
        assert words[0] == "heterokd"
        done = cli(*words[1:], *more)
        assert done.code == 0, done.err
        return done

    return run


@pytest.fixture
def page(walk: Run, tmp_path: Path) -> Iterator[Page]:
    """The study's page in a browser."""
    walk(["heterokd", "report", "finished"])
    with browser() as context:
        opened = context.new_page()
        opened.goto((tmp_path / "runs/studies/finished/report.html").as_uri())
        yield opened


def test_the_winner_and_how_sure_it_is(walk: Run) -> None:
    (command,) = commands("find the winner")
    assert command.pop() == "--open"
    first, second, file = walk(command).out.splitlines()
    assert first == "kd (trial 2) gives the best student: top-1 on val 0.6243 (1 fresh seed)."
    assert second.startswith("One seed each, so the difference may be noise")
    assert Path(file).is_file()


def test_why_a_method_lost(walk: Run) -> None:
    (command,) = commands("find why a method lost")
    told = walk(command).out
    assert "scratch: -0.0276 to the winner: one seed each, so the difference may be noise." in told
    stopped = re.search(
        r"^fitnet: 2 of 2 trials were stopped early, trial 5 at epoch 2 of 8: (.+)$", told, re.MULTILINE
    )
    assert stopped is not None
    assert stopped[1] == "3rd of the 3 that have reached it, by the mean of 2 epochs."
    assert walk(command, "--json").last["methods"]["kd"] == "the winner"


@pytest.mark.slow
@pytest.mark.ray
def test_a_longer_search(walk: Run) -> None:
    (command,) = commands("extend the search")
    assert command[-1].startswith("search.trials=")
    done = walk([*command[:-1], "search.trials=7"], "--json").last
    assert done["standing"]["planned"] == 7
    assert done["standing"]["finished"]
    assert done["winner"]["number"] == 2


@pytest.mark.thorough
def test_promotion_and_plain_pytorch(walk: Run, tmp_path: Path) -> None:
    promote, export, load = commands("promote the student")
    assert "promoted" in walk(promote).out
    walk(export)
    # Neither heterokd nor what it needs can be imported there.
    blocked = f"import sys; sys.modules.update(dict.fromkeys({['heterokd', 'mlflow', 'timm', 'ray']!r}))\n"
    code = blocked + load[-1]
    assert load[:2] == ["python", "-c"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[")


def test_a_teacher_from_a_file(walk: Run, tmp_path: Path) -> None:
    (weights,) = (tmp_path / "runs/teachers").glob("*/teacher.safetensors")
    state = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"epoch": 16, "state_dict": state}, tmp_path / "birds-vit.pth")
    measure, search = commands("bring a teacher")
    fitted = json.loads((weights.parent / "teacher.json").read_text(encoding="utf-8"))
    card = walk(measure, "--json").last
    assert card["val_score"] == pytest.approx(fitted["val_score"], abs=0.003)
    assert not card["fitted"]
    assert search[1] == "search"
    assert search[2:] == measure[2:]


@needs_chromium
def test_the_page_answers_without_a_click_and_next_steps_are_copied_in_two(page: Page) -> None:
    answer = page.locator("#answer").inner_text()
    assert "kd gives the best student: top-1 0.6243 (1 fresh seed)." in answer
    assert "one seed" in answer
    for wanted in ("heterokd promote finished", "search.trials=12", "load_model"):
        block = page.locator("#next .copied", has_text=wanted).first
        if not block.is_visible():
            page.locator("#next summary").click()
        button = block.get_by_role("button")
        button.click()
        expect(button).to_have_text("Copied")


@needs_chromium
def test_why_a_method_lost_in_three_clicks(page: Page) -> None:
    page.get_by_role("link", name="Methods").click()
    row = page.locator("#by-method tr", has_text="fitnet")
    assert row.is_visible()
    assert "stopped early, trial 5 at epoch 2 of 8" in row.inner_text()
    page.get_by_role("link", name="Trials", exact=True).click()
    page.locator("#trials summary").click()
    page.locator("#trials select").first.select_option("fitnet")
    assert page.locator("#trials tbody tr:visible").count() == 2
