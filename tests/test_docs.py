"""The documentation keeps to the code: links and anchors lead somewhere, and what stands in code blocks works."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.main import get_command

from heterokd.cli.app import app
from heterokd.config.extension import read_extension
from heterokd.config.methods import method_class
from heterokd.config.reading import load_experiment
from heterokd.methods.conformance.checks import check_method

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain} | set(re.findall(r'(?:id|name)="([^"]+)"', text))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@every_page
def test_experiments_load(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for text in blocks(page, "yaml"):
        if re.search(r"^name:", text, re.MULTILINE) and re.search(r"^data:", text, re.MULTILINE):
            file = tmp_path / "block.yaml"
            file.write_text(text)
            assert load_experiment(file).methods


@every_page
def test_commands_exist(page: Path) -> None:
    commands = getattr(get_command(app), "commands")  # noqa: B009  typer's own type hides it
    for text in blocks(page, "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if len(words) < 2 or words[0] != "heterokd" or words[1].startswith("-"):
                continue
            assert words[1] in commands, line
            known = {option for parameter in commands[words[1]].params for option in parameter.opts}
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= known | {"--help"}, line


@every_page
def test_python_compiles(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


def test_a_method_and_the_losses_of_its_page_work(tmp_path: Path) -> None:
    (file, *loops) = blocks(REPOSITORY / "docs" / "your_method.md", "python")
    (tmp_path / "my_method.py").write_text(file)
    extension = read_extension(f"{tmp_path}/my_method.py:Logit", ())
    assert not check_method(method_class("logit", extension))
    names: dict[str, Any] = {}
    for text in loops:
        exec(text, names)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 10)) for _ in range(2))
    images, labels = torch.rand(4, 3, 2, 2), torch.arange(4)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    losses = [names["train_step"](student, teacher, optimizer, images, labels) for _ in range(5)]
    assert losses[-1] < losses[0]
    sides = (16, 8, 4, 2)
    maps, teachers = (
        tuple(torch.rand(4, width, side, side, requires_grad=True) for width, side in zip(widths, sides, strict=True))
        for widths in ((16, 32, 64, 128), (64, 128, 256, 512))
    )
    loss = names["distillation"](maps, teachers, images, labels, torch.arange(4), 0.5)
    loss.backward()
    assert all(weight.grad is not None for weight in names["weights"])


def test_every_page_is_reached_or_listed_by_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
        assert page.name in listed, "the site's menu leaves it out"
    html = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)[^"]+\.(?:js|css|woff2?)"', html), (
        "loads from elsewhere"
    )


def test_the_page_of_python_names_is_that_of_their_docstrings() -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "api_page.py"))["page"]
    assert (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_cell_of_the_comparison_has_a_source() -> None:
    text = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| | ")]
    assert len(rows) > 12, "two tables"
    for row in rows:
        for cell in row.strip("|").split(" | ")[1:]:
            has_source = "](" in cell or cell.strip() == "not read"
            assert has_source, f"{row.split('|')[1].strip()}: {cell}"
