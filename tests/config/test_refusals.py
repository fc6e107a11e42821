"""What files and folders show to be wrong is refused before torch and the libraries of a search are imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from command_line import Run
from golden_files import GOLDEN, unpack

HEAVY = ("torch", "timm", "optuna", "mlflow", "ray", "pandas", "sklearn", "scipy", "matplotlib")
"""One of them takes longer to import than a refusal may take."""

# What is wrong, and what the sentence says.
REFUSED = {
    "nowhere.yaml": "there is no such file",
    "folder": "cannot be read (Is a directory)",
    "pipe": "is a device or a pipe; give a YAML file",
    "empty.yaml": "is empty",
    "tiny.yaml --set techer=3": "there is no such key; did you mean 'teacher'?",
    "tiny.yaml --set training.epochs=many": "expected a whole number, got 'many'",
    "tiny.yaml --set training.warmup_epochs=9": "9 epochs of warm-up do not fit into 3",
    "tiny.yaml --set data.dataset=digit": "there is no data set 'digit'; did you mean 'digits'?",
    "tiny.yaml --set data.dataset=image_folder": "is read from a folder: set data.root to it",
    "tiny.yaml --set data={dataset: digit_scenes, labels_per_class: 3}": "for label maps set train_images",
    "tiny.yaml --set search.metric=val/miou": "'val/miou' is not measured in classification",
    "tiny.yaml --set search.objectives=[val/top1, student/params]": "there is no such cost of a student",
    "tiny.yaml --set search.space=nowhere.yaml": "there is no file 'nowhere.yaml'",
    "tiny.yaml --set search.space.methods=[kd, hdc]": "there is no method 'hdc'; did you mean 'hcd'?",
    "tiny.yaml --set search.space.overrides.kdd.weight=1": "there is no method 'kdd'; did you mean 'kd'?",
    "tiny.yaml --set search.space.shared={training.momentum: 2}": "must be below 1, got 2",
    "tiny.yaml --trials 0": "must be at least 1, got 0",
    "tiny.yaml": "the study 'tiny' exists already; go on with it (--resume)",
}
PROGRAM = """
import contextlib, io, json, sys
from heterokd.cli.app import main

answers = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main(["search", *arguments])
    except SystemExit as left:
        answers.append((left.code, said.getvalue(), sorted(sys.modules)))
print(json.dumps(answers))
"""


def test_a_search_that_cannot_be_is_refused_without_heavy_imports(
    tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    tiny_file()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.yaml").touch()
    os.mkfifo(tmp_path / "pipe")
    study = tmp_path / "runs/studies/tiny"
    study.mkdir(parents=True)
    (study / "experiment.yaml").touch()
    asked = []
    for words in REFUSED:
        file, option, value = (*words.split(" ", 2), "", "")[:3]
        asked.append([file, option, value] if option else [file])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    answers = json.loads(done.stdout)
    assert len(answers) == len(REFUSED)
    for (words, says), (code, sentence, modules) in zip(REFUSED.items(), answers, strict=True):
        assert says in sentence
        assert (code, len(sentence.splitlines())) == (2, 1), words
        assert not set(HEAVY) & set(modules), words


def test_a_changed_experiment_is_refused_before_work(cli: Run, tmp_path: Path) -> None:
    root = unpack("interrupted", tmp_path)
    shutil.rmtree(root / "teachers")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    nowhere = ["--address", "127.0.0.1:1"]  # had it begun with Ray, it would say that nobody answers there
    file = GOLDEN / "interrupted.yaml"
    done = cli("search", file, "--resume", "--root", root, "--set", "training.epochs=9", *nowhere)
    assert done.code == 2
    assert "training.epochs was 8 when this study started and is 9 now; set it back, or rename" in done.err
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before, "no teacher, no MLflow run, no log"
